// Rows of floats through shared memory by bulk copies: each warp loads its rows, doubles them and
// adds them to the row of out that the round names, where all warps of all CTAs meet. Two slots a
// warp, so that the additions of one round are under way in the next.
//   in: (grid, warps, rounds = which, Cfg::kRow) floats.  out: (rounds, Cfg::kRow) floats.
#include "prelude.cuh"

#include "common/ptx/barrier.cuh"
#include "common/ptx/bulk.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/memory.cuh"
#include "common/ptx/tma.cuh"
#include "tests/kernels/hopper_probe_params.cuh"

constexpr i32 kWarps = Cfg::kNumThreads / 32;
constexpr u32 kRowBytes = Cfg::kRow * 4;
static_assert(Cfg::kSmemBytes == 2 * kWarps * (kRowBytes + 8));

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) probe_bulk(GRID_CONSTANT HopperProbeParams p) {
  const i32 warp = thread_idx() / 32;
  const i32 lane = thread_idx() % 32;
  const u32 slots = smem_base() + 2u * u32(warp) * kRowBytes;
  const u32 bars = smem_base() + 2u * kWarps * kRowBytes + 16u * u32(warp);
  const u32* rows = p.in + (block_idx() * kWarps + warp) * p.which * Cfg::kRow;
  f32* out = static_cast<f32*>(static_cast<void*>(p.out));
  if (lane == 0) {
    mbarrier_init(bars, 1);
    mbarrier_init(bars + 8, 1);
    fence_mbarrier_init();
  }
  cta_sync();
  for (i32 round = 0; round < p.which; ++round) {
    const u32 slot = slots + u32(round % 2) * kRowBytes;
    const u32 bar = bars + u32(round % 2) * 8;
    if (lane == 0) {
      tma_store_wait_group_read<1>();
      mbarrier_arrive_expect_tx(bar, kRowBytes);
      bulk_load(slot, rows + round * Cfg::kRow, kRowBytes, bar);
    }
    while (!mbarrier_try_wait_parity(bar, u32(round / 2 % 2))) {
    }
    for (u32 i = u32(lane) * 4; i < kRowBytes; i += 128) {
      st_shared_f32(slot + i, 2.0f * ld_shared_f32(slot + i));
    }
    fence_proxy_async_shared();
    warp_sync();
    if (lane == 0) {
      bulk_reduce_add_f32(out + round * Cfg::kRow, slot, kRowBytes);
      tma_store_commit_group();
    }
  }
  if (lane == 0) {
    tma_store_wait_group<0>();
  }
}
