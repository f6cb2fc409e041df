// D = A B, or D0 + A B, by one warpgroup, in every mode: A in shared memory or registers, B K-major
// or MN-major, each swizzle. Ordinary stores lay the matrices out.
//   in: A (64, depth) 16-bit, then B: (n, depth), or (depth, n) if Cfg::kTransB, then D0 (64, n)
//   fp32 out: D (64, n) fp32
// which: 0 overwrites, 1 accumulates onto D0. Two commit groups, waited for one after the other.
#include "prelude.cuh"

#include "common/device/wgmma_desc.cuh"
#include "common/ptx/barrier.cuh"
#include "common/ptx/memory.cuh"
#include "common/ptx/tma.cuh"
#include "common/ptx/wgmma.cuh"
#include "tests/kernels/hopper_probe_params.cuh"

constexpr i32 kN = Cfg::kWgmmaTestN;
constexpr i32 kDepth = Cfg::kDepth;
constexpr i32 kSteps = kDepth / 16;
using Chunk = SwizzledChunk<Cfg::kSwizzleBytes>;
static_assert(kDepth % Chunk::kCols == 0);

constexpr i32 kBRows = Cfg::kTransB ? kDepth : kN;
constexpr i32 kBCols = Cfg::kTransB ? kN : kDepth;
constexpr i32 kAChunkBytes = 64 * Cfg::kSwizzleBytes;
constexpr i32 kBChunkBytes = kBRows * Cfg::kSwizzleBytes;
constexpr i32 kABytes = kDepth / Chunk::kCols * kAChunkBytes;
constexpr i32 kBChunks = (kBCols + Chunk::kCols - 1) / Chunk::kCols;
static_assert(Cfg::kSmemBytes == kABytes + kBChunks * kBChunkBytes);

// Lays a (rows, cols) matrix out in chunks.
template <i32 kRows, i32 kCols>
DEVICE void lay_out(u32 s_first, const u32* source) {
  for (i32 i = thread_idx(); i < kRows * kCols / 8; i += Cfg::kNumThreads) {
    const i32 row = i / (kCols / 8);
    const i32 unit = i % (kCols / 8);
    const i32 chunk = unit / (Chunk::kCols / 8);
    u32 words[4];
    ld_global_v4(words, source + i * 4);
    st_shared_v4(Chunk::unit_address(s_first + u32(chunk * kRows * Cfg::kSwizzleBytes), row,
                                     unit % (Chunk::kCols / 8)),
                 words);
  }
}

DEVICE void product(f32 (&d)[kN / 2], const u32 (&a)[kSteps][4], u32 s_a, u32 s_b, i32 k,
                    bool accumulate) {
  u64 desc_b;
  if constexpr (Cfg::kTransB) {
    desc_b = wgmma_desc_advance(Chunk::mn_major(s_b, kBChunkBytes), Chunk::mn_major_step(k));
  } else {
    desc_b = wgmma_desc_advance(Chunk::k_major(s_b), Chunk::k_major_step(k, kBChunkBytes));
  }
  if constexpr (Cfg::kRegisterA) {
    wgmma_rs<Cfg::kBf16, Cfg::kTransB>(d, a[k], desc_b, accumulate);
  } else {
    const u32 step = Chunk::k_major_step(k, kAChunkBytes);
    wgmma_ss<Cfg::kBf16, Cfg::kTransB>(d, wgmma_desc_advance(Chunk::k_major(s_a), step), desc_b,
                                       accumulate);
  }
}

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) probe_wgmma(GRID_CONSTANT HopperProbeParams p) {
  const u32 s_a = smem_base();
  const u32 s_b = s_a + kABytes;
  const u32* b = p.in + 64 * kDepth / 2;
  const f32* d0 = reinterpret_cast<const f32*>(b + kN * kDepth / 2);
  lay_out<64, kDepth>(s_a, p.in);
  lay_out<kBRows, kBCols>(s_b, b);
  fence_proxy_async_shared();
  cta_sync();

  const i32 lane = thread_idx() % 32;
  const i32 first_row = thread_idx() / 32 * 16 + lane / 4;
  u32 a[kSteps][4];
#pragma unroll
  for (i32 k = 0; k < kSteps; ++k) {
#pragma unroll
    for (i32 i = 0; i < 4; ++i) {
      const i32 row = first_row + 8 * (i % 2);
      const i32 col = 16 * k + 2 * (lane % 4) + 8 * (i / 2);
      a[k][i] = Cfg::kRegisterA ? ld_global_u32(p.in + (row * kDepth + col) / 2) : 0;
    }
    wgmma_pin(a[k]);
  }
  f32 d[kN / 2];
#pragma unroll
  for (i32 i = 0; i < kN / 2; ++i) {
    const i32 row = first_row + 8 * (i / 2 % 2);
    d[i] = ld_global_f32(d0 + row * kN + 8 * (i / 4) + 2 * (lane % 4) + i % 2);
  }
  wgmma_fence();
  product(d, a, s_a, s_b, 0, p.which != 0);
  wgmma_commit_group();
#pragma unroll
  for (i32 k = 1; k < kSteps; ++k) {
    product(d, a, s_a, s_b, k, true);
  }
  wgmma_commit_group();
  wgmma_wait_group<1>();
  wgmma_wait_group<0>();
  wgmma_hold(d);
  f32* out = reinterpret_cast<f32*>(p.out);
#pragma unroll
  for (i32 i = 0; i < kN / 2; ++i) {
    const i32 row = first_row + 8 * (i / 2 % 2);
    st_global_f32(out + row * kN + 8 * (i / 4) + 2 * (lane % 4) + i % 2, d[i]);
  }
}
