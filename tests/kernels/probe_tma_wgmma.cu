// The skeleton of an attention forward without its softmax, O = round(Q K^T) V for one tile of 64
// queries and kN keys: a producer warp loads by TMA, a warpgroup multiplies from shared memory,
// then from registers, and stores by stmatrix and TMA. Shows that TMA's layout, the descriptors and
// the fragments agree.
//   map_a: Q (64, d).  map_b: K (kN, d).  map_c: V (kN, d).  map_d: O.  Boxes of 64 columns.
#include "prelude.cuh"

#include "common/device/wgmma_desc.cuh"
#include "common/ptx/barrier.cuh"
#include "common/ptx/convert.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/stmatrix.cuh"
#include "common/ptx/tma.cuh"
#include "common/ptx/wgmma.cuh"
#include "tests/kernels/hopper_probe_params.cuh"

constexpr i32 kN = Cfg::kWgmmaQkN;
constexpr i32 kHeadDim = Cfg::kWgmmaPvN;
using Chunk = SwizzledChunk<128>;
constexpr i32 kChunks = kHeadDim / Chunk::kCols;
constexpr i32 kQChunkBytes = 64 * 128;
constexpr i32 kKChunkBytes = kN * 128;
constexpr i32 kQBytes = kChunks * kQChunkBytes;
constexpr i32 kKBytes = kChunks * kKChunkBytes;
static_assert(Cfg::kSmemBytes == kQBytes + 2 * kKBytes + 16);

DEVICE void wait(u32 bar) {
  while (!mbarrier_try_wait_parity(bar, 0)) {
  }
}

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) probe_tma_wgmma(GRID_CONSTANT HopperProbeParams p) {
  static_assert(Cfg::kNumThreads == 256);
  const u32 s_q = smem_base();
  const u32 s_k = s_q + kQBytes;
  const u32 s_v = s_k + kKBytes;
  const u32 bar_qk = s_v + kKBytes;
  const u32 bar_v = bar_qk + 8;
  if (thread_idx() == 0) {
    mbarrier_init(bar_qk, 1);
    mbarrier_init(bar_v, 1);
    fence_mbarrier_init();
  }
  cta_sync();
  if (thread_idx() >= 128) {
    if (thread_idx() == 128) {
      mbarrier_arrive_expect_tx(bar_qk, kQBytes + kKBytes);
      for (i32 c = 0; c < kChunks; ++c) {
        tma_load_4d(s_q + u32(c * kQChunkBytes), &p.map_a, bar_qk, 64 * c, 0, 0, 0);
        tma_load_4d(s_k + u32(c * kKChunkBytes), &p.map_b, bar_qk, 64 * c, 0, 0, 0);
      }
      mbarrier_arrive_expect_tx(bar_v, kKBytes);
      for (i32 c = 0; c < kChunks; ++c) {
        tma_load_4d(s_v + u32(c * kKChunkBytes), &p.map_c, bar_v, 64 * c, 0, 0, 0);
      }
    }
    return;
  }
  f32 s[kN / 2];
  wait(bar_qk);
  wgmma_fence();
#pragma unroll
  for (i32 k = 0; k < kHeadDim / 16; ++k) {
    wgmma_ss<Cfg::kBf16, false>(
        s, wgmma_desc_advance(Chunk::k_major(s_q), Chunk::k_major_step(k, kQChunkBytes)),
        wgmma_desc_advance(Chunk::k_major(s_k), Chunk::k_major_step(k, kKChunkBytes)), k != 0);
  }
  wgmma_commit_group();
  wgmma_wait_group<0>();
  wgmma_hold(s);
  u32 fragments[kN / 16][4];  // the accumulator's layout is that of A
#pragma unroll
  for (i32 i = 0; i < kN / 4; ++i) {
    fragments[i / 4][i % 4] =
        Cfg::kBf16 ? cvt_bf16x2(s[2 * i], s[2 * i + 1]) : cvt_f16x2(s[2 * i], s[2 * i + 1]);
  }
  f32 o[kHeadDim / 2];
  wait(bar_v);
  wgmma_fence();
#pragma unroll
  for (i32 k = 0; k < kN / 16; ++k) {
    wgmma_rs<Cfg::kBf16, true>(
        o, fragments[k],
        wgmma_desc_advance(Chunk::mn_major(s_v, kKChunkBytes), Chunk::mn_major_step(k)), k != 0);
  }
  wgmma_commit_group();
  wgmma_wait_group<0>();
  wgmma_hold(o);
  // Over Q, whose reads are done. A warp owns 16 rows; one stmatrix stores 16 rows x 16 columns.
  named_barrier_sync(1, 128);
  const i32 lane = thread_idx() % 32;
  const i32 row = thread_idx() / 32 * 16 + lane % 16;
#pragma unroll
  for (i32 i = 0; i < kHeadDim / 16; ++i) {
    u32 words[4];
#pragma unroll
    for (i32 j = 0; j < 4; ++j) {
      const f32 lo = o[8 * i + 2 * j];
      const f32 hi = o[8 * i + 2 * j + 1];
      words[j] = Cfg::kBf16 ? cvt_bf16x2(lo, hi) : cvt_f16x2(lo, hi);
    }
    const u32 chunk = s_q + u32(i / 4 * kQChunkBytes);
    stmatrix_x4(Chunk::unit_address(chunk, row, i % 4 * 2 + lane / 16), words[0], words[1],
                words[2], words[3]);
  }
  fence_proxy_async_shared();
  named_barrier_sync(1, 128);
  if (thread_idx() == 0) {
    for (i32 c = 0; c < kChunks; ++c) {
      tma_store_4d(&p.map_d, s_q + u32(c * kQChunkBytes), 64 * c, 0, 0, 0);
    }
    tma_store_commit_group();
    tma_store_wait_group<0>();
  }
}
