// CTAs that add their row of floats to each row of out by bulk copies, in an order: row t gets
// those of CTA t, t - 1, ..., so each waits for others.
//   in: (grid, Cfg::kRow) floats.  out: (grid, Cfg::kRow) floats, then as many counters of the
//   additions that are in memory, 0 before.
//   p.which: 1: they are counted once their sources have been read, which is too early.
#include "prelude.cuh"

#include "common/device/global_wait.cuh"
#include "common/ptx/barrier.cuh"
#include "common/ptx/bulk.cuh"
#include "common/ptx/cluster.cuh"
#include "common/ptx/memory.cuh"
#include "common/ptx/tma.cuh"
#include "tests/kernels/hopper_probe_params.cuh"

static_assert(Cfg::kSmemBytes == 4 * Cfg::kRow);

CLUSTER_KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm, Cfg::kClusterSize)
probe_ordered_adds(GRID_CONSTANT HopperProbeParams p) {
  const i32 rows = grid_dim();
  f32* out = static_cast<f32*>(static_cast<void*>(p.out));
  for (i32 i = thread_idx(); i < Cfg::kRow; i += Cfg::kNumThreads) {
    st_shared_u32(smem_base() + 4u * u32(i), ld_global_u32(p.in + block_idx() * Cfg::kRow + i));
  }
  fence_proxy_async_shared();
  cta_sync();
  for (i32 i = 0; i < rows && thread_idx() == 0; ++i) {
    const i32 row = (block_idx() + i) % rows;
    u32* counter = p.out + rows * Cfg::kRow + row;
    wait_global_at_least(counter, u32(i));
    fence_proxy_async_global();  // additions of bulk copies follow those that were waited for
    bulk_reduce_add_f32(out + row * Cfg::kRow, smem_base(), 4 * Cfg::kRow);
    tma_store_commit_group();
    if (p.which == 1) {
      tma_store_wait_group_read<0>();
    } else {
      tma_store_wait_group<0>();
    }
    red_release_global_add_u32(counter, 1);
  }
  cluster_arrive();
  cluster_wait();
}
