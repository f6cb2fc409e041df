// A ring of two slots between a producer warp and a consumer warp, as in a real pipeline: words go
// through shared memory, mbarriers say when a slot is full and when it is empty.
//   in, out: (rounds = which, 32) words.  The last word of out: whether a fresh barrier passes a
//   wait for parity 1, plus 2 if it passes one for parity 0 after an expect_tx of nothing.
#include "prelude.cuh"

#include "common/ptx/barrier.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/memory.cuh"
#include "tests/kernels/hopper_probe_params.cuh"

constexpr i32 kSlots = 2;
static_assert(Cfg::kSmemBytes == kSlots * 128 + 40);

DEVICE u32 slot_of(i32 slot) { return smem_base() + 128u * u32(slot); }
DEVICE u32 full(i32 slot) { return smem_base() + 128u * kSlots + 8u * u32(slot); }
DEVICE u32 empty(i32 slot) { return full(kSlots + slot); }
DEVICE u32 extra() { return full(2 * kSlots); }

DEVICE void wait(u32 bar, u32 parity) {
  while (!mbarrier_try_wait_parity(bar, parity)) {
  }
}

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) probe_mbarrier(GRID_CONSTANT HopperProbeParams p) {
  const i32 lane = thread_idx() % 32;
  if (thread_idx() == 0) {
    for (i32 slot = 0; slot < kSlots; ++slot) {
      mbarrier_init(full(slot), 32);  // every lane of the producer
      mbarrier_init(empty(slot), 1);  // lane 0 of the consumer
    }
    mbarrier_init(extra(), 1);
    fence_mbarrier_init();
  }
  cta_sync();
  for (i32 round = 0; round < p.which; ++round) {
    const i32 slot = round % kSlots;
    const u32 parity = u32(round / kSlots % 2);
    if (thread_idx() < 32) {
      wait(empty(slot), parity ^ 1);
      st_shared_u32(slot_of(slot) + 4u * u32(lane), ld_global_u32(p.in + round * 32 + lane));
      mbarrier_arrive(full(slot));
    } else {
      wait(full(slot), parity);
      // From another lane: its store must be visible, not only this lane's own.
      const u32 word = ld_shared_u32(slot_of(slot) + 4u * u32(31 - lane));
      st_global_u32(p.out + round * 32 + 31 - lane, word);
      warp_sync();
      if (lane == 0) {
        mbarrier_arrive(empty(slot));
      }
    }
  }
  if (thread_idx() == 0) {
    u32 seen = mbarrier_try_wait_parity(extra(), 1) ? 1 : 0;
    mbarrier_arrive_expect_tx(extra(), 0);
    wait(extra(), 0);
    st_global_u32(p.out + p.which * 32, seen + 2);
  }
}
