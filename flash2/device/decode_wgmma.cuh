// The products of flash2/decode.cu by warpgroups, where Cfg::kWgmma: by warps
// they take twice the time on sm_90. A warpgroup's fragments are those of four
// warps. Included by decode.cu only, after the prelude. Scores of a tile beside
// P V of the one before leave registers for tiles of 32 keys, which is slower
// than 64 one after the other: 1.64 against 1.98 TB/s with 128 heads (H100, 64
// x 8192).
#pragma once
#include "common/ptx/tma.cuh"
#include "common/ptx/wgmma.cuh"
#include "flash2/device/decode_layout.cuh"

// The accumulators of all n tiles, as WGMMA wants them.
template <i32 kMTiles_, i32 kNTiles>
DEVICE f32 (&flat(f32 (&rD)[kMTiles_][kNTiles][4]))
    [kMTiles_ * kNTiles * 4] { return reinterpret_cast<f32(&)[kMTiles_ * kNTiles * 4]>(rD); }

// What is kept of the warp's Qv in registers.
template <class LayoutQv_, class Query>
DEVICE void wgmma_load_q(Query& rQ, const Lane& lane, u32 smem) {
  const i32 row = lane.warp_row + lane.lane_idx % 16;
#pragma unroll
  for (i32 k = 0; k < kStepsQ; ++k) {
    const u32 chunk = LayoutQv_::part_chunk(smem + Smem::kQv, lane.col_warp, 1 + k / 4);
    ldmatrix_x4(rQ[0][k][0], rQ[0][k][1], rQ[0][k][2], rQ[0][k][3],
                LayoutQv_::Chunk::unit_address(chunk, row, k % 4 * 2 + lane.lane_idx / 16));
  }
}

// S = Q K^T + Qv V^T of the warpgroup's part of the depth. meanwhile(): what to
// do while the tensor cores are at work.
template <class LayoutQ_, class LayoutQv_, class LayoutK_, class LayoutV_, class Scores,
          class Query, class Meanwhile>
DEVICE void wgmma_multiply_keys(Scores& rS, const Query& rQ, const Lane& lane, u32 smem, u32 sK,
                                u32 sV, Meanwhile meanwhile) {
  const u64 desc_q = LayoutQ_::k_major(smem + Smem::kQ, lane.col_warp * kDepthQk);
  const u64 desc_k = LayoutK_::k_major(sK, lane.col_warp * kDepthQk);
  wgmma_fence();
#pragma unroll
  for (i32 k = 0; k < kDepthQk / 16; ++k) {
    wgmma_ss<Cfg::kBf16, false>(flat(rS), wgmma_desc_advance(desc_q, LayoutQ_::k_major_step(k)),
                                wgmma_desc_advance(desc_k, LayoutK_::k_major_step(k)), k > 0);
  }
  const u64 desc_qv =
      LayoutQv_::Chunk::k_major(LayoutQv_::part_chunk(smem + Smem::kQv, lane.col_warp, 0));
  const u64 desc_v = LayoutV_::k_major(sV, lane.warp_col);
#pragma unroll
  for (i32 k = 0; k < kDepthQv / 16; ++k) {
    const u64 desc_v_step = wgmma_desc_advance(desc_v, LayoutV_::k_major_step(k));
    if (k < 4) {
      wgmma_ss<Cfg::kBf16, false>(flat(rS), wgmma_desc_advance(desc_qv, u32(k * 32)), desc_v_step,
                                  true);
    } else {
      wgmma_rs<Cfg::kBf16, false>(flat(rS), rQ[0][k - 4], desc_v_step, true);
    }
  }
  wgmma_commit_group();
  meanwhile();
  wgmma_wait_group<0>();
  wgmma_hold(flat(rS));
}

// O += P V, the warpgroup's columns.
template <class LayoutV_, class Output, class Scores>
DEVICE void wgmma_multiply_values(Output& rO, const Scores& rP, const Lane& lane, u32 sV) {
  constexpr i32 kSteps = Cfg::kBlockN / 16;
  u32 rA[kSteps][4];
#pragma unroll
  for (i32 k = 0; k < kSteps; ++k) {
    accumulator_as_a<Cfg::kBf16>(rA[k], rP, 0, k);
  }
  const u64 desc_v = LayoutV_::mn_major(sV, lane.warp_col);
  wgmma_fence();
#pragma unroll
  for (i32 k = 0; k < kSteps; ++k) {
    wgmma_rs<Cfg::kBf16, true>(flat(rO), rA[k],
                               wgmma_desc_advance(desc_v, LayoutV_::mn_major_step(k)), true);
  }
  wgmma_commit_group();
  wgmma_wait_group<0>();
  wgmma_hold(flat(rO));
}
