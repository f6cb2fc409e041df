// Values change threads through shared memory, once per kind of barrier.
//   in: (num_threads,).  out: (4, num_threads), the value that a thread got
//     with cta_sync, from the thread mirrored in the CTA
//     with warp_sync, from the lane mirrored in the warp
//     with named_barrier_sync, from the same lane of the other warp of a pair; a barrier per pair
//     with named_barrier_arrive: the second half of the CTA consumes what the first one produces
#include "prelude.cuh"

#include "common/ptx/barrier.cuh"
#include "common/ptx/memory.cuh"
#include "tests/kernels/probe_params.cuh"

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) probe_barrier(GRID_CONSTANT ProbeParams p) {
  constexpr i32 kHalf = Cfg::kNumThreads / 2;
  const i32 thread = thread_idx();
  const i32 warp = thread / 32;
  const u32 value = ld_global_u32(p.in + thread);
  const auto slot = [](i32 region, i32 i) {
    return smem_base() + u32(4 * (region * Cfg::kNumThreads + i));
  };

  st_shared_u32(slot(0, thread), value);
  cta_sync();
  st_global_u32(p.out + thread, ld_shared_u32(slot(0, Cfg::kNumThreads - 1 - thread)));

  st_shared_u32(slot(1, thread), value);
  warp_sync();
  st_global_u32(p.out + Cfg::kNumThreads + thread, ld_shared_u32(slot(1, thread ^ 31)));

  st_shared_u32(slot(2, thread), value);
  named_barrier_sync(1 + warp / 2, 64);
  st_global_u32(p.out + 2 * Cfg::kNumThreads + thread, ld_shared_u32(slot(2, thread ^ 32)));

  constexpr i32 kProduced = 15;
  if (thread < kHalf) {
    st_shared_u32(slot(3, thread), value + 1);
    named_barrier_arrive(kProduced, Cfg::kNumThreads);
    st_global_u32(p.out + 3 * Cfg::kNumThreads + thread, value);
  } else {
    named_barrier_sync(kProduced, Cfg::kNumThreads);
    st_global_u32(p.out + 3 * Cfg::kNumThreads + thread, ld_shared_u32(slot(3, thread - kHalf)));
  }
}
