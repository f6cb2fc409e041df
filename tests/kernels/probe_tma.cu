// One box: global -> shared (map_a, at p.from), a copy of the raw bytes to out, and shared ->
// global (map_b, at p.to).
//   out: (Cfg::kBoxBytes / 4,) words.
#include "prelude.cuh"

#include "common/ptx/barrier.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/memory.cuh"
#include "common/ptx/tma.cuh"
#include "tests/kernels/hopper_probe_params.cuh"

static_assert(Cfg::kSmemBytes == Cfg::kBoxBytes + 8);

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) probe_tma(GRID_CONSTANT HopperProbeParams p) {
  const u32 box = smem_base();
  const u32 bar = box + Cfg::kBoxBytes;
  if (thread_idx() == 0) {
    prefetch_tensor_map(&p.map_a);
    mbarrier_init(bar, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(bar, Cfg::kBoxBytes);
    const i32(&c)[5] = p.from;
    if constexpr (Cfg::kRank == 4) {
      tma_load_4d(box, &p.map_a, bar, c[0], c[1], c[2], c[3]);
    } else {
      tma_load_5d(box, &p.map_a, bar, c[0], c[1], c[2], c[3], c[4]);
    }
  }
  cta_sync();
  while (!mbarrier_try_wait_parity(bar, 0)) {
  }
  for (i32 i = thread_idx(); i < Cfg::kBoxBytes / 4; i += Cfg::kNumThreads) {
    st_global_u32(p.out + i, ld_shared_u32(box + 4u * u32(i)));
  }
  cta_sync();
  // The bytes are changed by ordinary stores, so that the proxy fence has work to do.
  for (i32 i = thread_idx(); i < Cfg::kBoxBytes / 4; i += Cfg::kNumThreads) {
    st_shared_u32(box + 4u * u32(i), ~ld_shared_u32(box + 4u * u32(i)));
  }
  fence_proxy_async_shared();
  cta_sync();
  if (thread_idx() == 0) {
    const i32(&c)[5] = p.to;
    if constexpr (Cfg::kRank == 4) {
      tma_store_4d(&p.map_b, box, c[0], c[1], c[2], c[3]);
    } else {
      tma_store_5d(&p.map_b, box, c[0], c[1], c[2], c[3], c[4]);
    }
    tma_store_commit_group();
    tma_store_wait_group_read<0>();
    st_shared_u32(box, 0);  // the source may go now
    tma_store_wait_group<0>();
  }
}
