// Products of bwd.cu that sum up gradients, and the way of the sums to global memory. Reads Cfg:
// include "prelude.cuh" first. Change elsewhere: layout of dq_accum -> bwd_work.cuh, fragments and
// ldmatrix -> gemm.cuh, who computes what -> bwd_warps.cuh.
#pragma once
#include "flash2/device/bwd_loads.cuh"
#include "flash2/device/gemm.cuh"
#include "common/ptx/barrier.cuh"

struct NoStep {
  DEVICE void operator()(i32) const {}
};

// rD += A^T B for dK and dV: A^T = P^T or dS^T, B = rows of dO or Q from sB on.
template <class LayoutB, i32 kDepth, i32 kNTiles, class EachStep = NoStep>
DEVICE void accumulate_from_registers(Fragments<kMTilesKv, kNTiles>& rD, const Packed& packed,
                                      u32 sB, const Lane& lane, EachStep each_step = {}) {
  gemm_ab<Cfg::kBf16, LayoutB, kDepth>(
      rD, sB + lane_offset_b_trans<LayoutB>(lane.lane_idx),
      [&](u32(&rA)[4], i32 m, i32 k) {
#pragma unroll
        for (i32 i = 0; i < 4; ++i) {
          rA[i] = packed[m][2 * k + i / 2][i % 2];
        }
      },
      each_step);
}
template <class LayoutB, i32 kNTiles, class EachStep = NoStep>
DEVICE void accumulate_from_shared(Fragments<kMTilesKv, kNTiles>& rD, u32 sA, u32 sB,
                                   const Lane& lane, EachStep each_step = {}) {
  const u32 sA_lane =
      sA + u32(lane.kv_key * LayoutP::kRowBytes) + lane_offset_a<LayoutP>(lane.lane_idx);
  gemm_ab<Cfg::kBf16, LayoutB, Cfg::kBlockM>(
      rD,
      LayoutB::moved(sB + lane_offset_b_trans<LayoutB>(lane.lane_idx), 0,
                     lane.kv_part * kNTiles * 16),
      [&](u32(&rA)[4], i32 m, i32 k) { load_a<LayoutP>(rA, sA_lane, m, k); }, each_step);
}

// rDq += dS K: the warp's part of dQ of one step, from dS^T in shared memory.
template <class EachStep = NoStep>
DEVICE void accumulate_dq(Fragments<kMTilesDq, kNTilesDq>& rDq, const Lane& lane, u32 smem, u32 sDs,
                          EachStep each_step = {}) {
  const u32 sDs_lane =
      sDs + u32(lane.dq_query * kElemBytes) + lane_offset_b<LayoutP>(lane.lane_idx);
  const u32 sK_lane = LayoutK::moved(smem + Smem::kK + lane_offset_b_trans<LayoutK>(lane.lane_idx),
                                     0, lane.dq_part * kNTilesDq * 16);
  gemm_ab<Cfg::kBf16, LayoutK, Cfg::kBlockN>(
      rDq, sK_lane, [&](u32(&rA)[4], i32 m, i32 k) { load_a_trans<LayoutP>(rA, sDs_lane, m, k); },
      each_step);
}

// Adds part `part` of kParts of rDq to dq_accum, at the query tile `at`: spread over the steps of a
// product, additions do not fill the memory pipe's queue and hold up what comes behind them.
// num_rows: of the sequence; 0 where there is nothing to add.
template <i32 kParts>
DEVICE void add_dq(const Fragments<kMTilesDq, kNTilesDq>& rDq, const BwdParams& p,
                   const KeyWork& work, const Lane& lane, const Cursor& at, i32 num_rows,
                   i32 part) {
  const i32 first_row = at.m_block * Cfg::kBlockM + lane.dq_query;
  f32* dst = accum_rows<Cfg>(p, work.seq, work.batch_idx, at.head_idx, work.split, first_row) +
             lane.dq_part * kNTilesDq * kFragmentFloats +
             fragment_offset<Cfg::kVectorAtomics>(lane.lane_idx, 0);
#pragma unroll
  for (i32 m = 0; m < kMTilesDq; ++m) {
    if (first_row + m * 16 < num_rows) {
#pragma unroll
      for (i32 n = 0; n < kNTilesDq; ++n) {
        if ((m * kNTilesDq + n) * kParts / (kMTilesDq * kNTilesDq) == part) {
          f32* to = dst + m * 16 * LayoutQ::kCols + n * kFragmentFloats;
          if constexpr (Cfg::kVectorAtomics) {
            red_global_add_v4_f32(to, rDq[m][n]);
          } else {
#pragma unroll
            for (i32 e = 0; e < 4; ++e) {
              red_global_add_f32(to + e * 32, rDq[m][n][e]);
            }
          }
        }
      }
    }
  }
}

DEVICE void compute_and_add_dq(const BwdParams& p, const KeyWork& work, const Lane& lane,
                               const Cursor& at, u32 smem, u32 sDs) {
  Fragments<kMTilesDq, kNTilesDq> rDq;
  clear(rDq);
  accumulate_dq(rDq, lane, smem, sDs);
  add_dq<1>(rDq, p, work, lane, at, work.seq.seqlen_q, 0);
}

// Writes dK or dV as it is into fragments of dk_accum or dv_accum. dst: row 0 of the key tile.
// rows: keys of the sequence from there on.
template <class Layout, i32 kNTiles>
DEVICE void store_partial(const Fragments<kMTilesKv, kNTiles>& rD, f32* dst, i32 rows,
                          const Lane& lane) {
  f32* part = dst + lane.kv_key * Layout::kCols + lane.kv_part * kNTiles * kFragmentFloats +
              lane.lane_idx * 4;
#pragma unroll
  for (i32 m = 0; m < kMTilesKv; ++m) {
    if (lane.kv_key + m * 16 < rows) {
#pragma unroll
      for (i32 n = 0; n < kNTiles; ++n) {
        const u32 words[4] = {f32_as_bits(rD[m][n][0]), f32_as_bits(rD[m][n][1]),
                              f32_as_bits(rD[m][n][2]), f32_as_bits(rD[m][n][3])};
        st_global_v4(part + m * 16 * Layout::kCols + n * kFragmentFloats, words);
      }
    }
  }
}

// Writes dK or dV, scaled and rounded, through sTile: a tile of shared memory with the layout of K
// or V, of which a warp uses its own part.
template <i32 kHeadDim, class Layout, i32 kNTiles>
DEVICE void store_gradient_staged(const Fragments<kMTilesKv, kNTiles>& rD, u32 sTile, void* dst,
                                  i64 row_stride, i32 rows, f32 scale, const Lane& lane) {
  const i32 first_byte = lane.kv_part * kNTiles * 8 * kElemBytes;
#pragma unroll
  for (i32 m = 0; m < kMTilesKv; ++m) {
#pragma unroll
    for (i32 half = 0; half < 2; ++half) {
#pragma unroll
      for (i32 n = 0; n < kNTiles; ++n) {
        st_shared_u32(
            sTile + Layout::offset(lane.kv_key + lane.row(m, 2 * half),
                                   first_byte + lane.col(n, 0) * kElemBytes),
            pack2<Cfg::kBf16>(rD[m][n][2 * half] * scale, rD[m][n][2 * half + 1] * scale));
      }
    }
  }
  warp_sync();
  constexpr i32 kVectors = kNTiles;  // of 16 bytes in a row of the warp's part
  u16* g_part = static_cast<u16*>(dst) + lane.kv_key * row_stride + lane.kv_part * kNTiles * 8;
#pragma unroll 4
  for (i32 i = lane.lane_idx; i < kMTilesKv * 16 * kVectors; i += 32) {
    const i32 row = i / kVectors, vector = i % kVectors;
    if (lane.kv_key + row < rows && (lane.kv_part * kNTiles + vector) * 8 < kHeadDim) {
      store_vector<16>(reinterpret_cast<char*>(g_part + row * row_stride + vector * 8),
                       sTile + Layout::offset(lane.kv_key + row, first_byte + vector * 16));
    }
  }
}

// Writes dK or dV, scaled and rounded. dst: row 0 of the key tile. rows: that the sequence owns
// from there on.
template <i32 kHeadDim, i32 kNTiles>
DEVICE void store_gradient(const Fragments<kMTilesKv, kNTiles>& rD, void* dst, i64 row_stride,
                           i32 rows, f32 scale, const Lane& lane) {
#pragma unroll
  for (i32 m = 0; m < kMTilesKv; ++m) {
#pragma unroll
    for (i32 half = 0; half < 2; ++half) {
      const i32 row = lane.kv_key + lane.row(m, 2 * half);
      if (row < rows) {
        u16* g_row = static_cast<u16*>(dst) + row * row_stride;
#pragma unroll
        for (i32 n = 0; n < kNTiles; ++n) {
          const i32 col = lane.kv_part * kNTiles * 8 + lane.col(n, 0);
          const u32 pair =
              pack2<Cfg::kBf16>(rD[m][n][2 * half] * scale, rD[m][n][2 * half + 1] * scale);
          if constexpr (Cfg::kGradVectorBytes >= 4) {
            if (col < kHeadDim) {
              st_global_u32(g_row + col, pair);
            }
          } else {
            if (col < kHeadDim) {
              st_global_u16(g_row + col, u16(pair));
            }
            if (col + 1 < kHeadDim) {
              st_global_u16(g_row + col + 1, u16(pair >> 16));
            }
          }
        }
      }
    }
  }
}

// Writes dK or dV of a key tile to the gradient or, if there is an accumulator (see BwdParams), to
// that. sTile: as store_gradient_staged has it.
template <i32 kHeadDim, class Layout, i32 kNTiles>
DEVICE void store(const Fragments<kMTilesKv, kNTiles>& rD, const BwdParams& p, const KeyWork& work,
                  const Lane& lane, u32 sTile, i32 first_key, i32 head_idx, i32 qheads_per_head,
                  void* gradient, i64 batch_stride, i64 head_stride, i64 row_stride, f32* accum,
                  f32 scale) {
  if (accum != nullptr) {
    const i32 split = work.first_head % p.heads_per_group / p.heads_per_cta -
                      contributors(p, head_idx, qheads_per_head).first_cta;
    store_partial<Layout>(
        rD,
        key_accum_rows<Cfg>(accum, Layout::kCols, p, work.seq, work.batch_idx,
                            p.num_heads_q / qheads_per_head, head_idx, split, first_key),
        work.seq.seqlen_k - first_key, lane);
    return;
  }
  u16* dst = static_cast<u16*>(gradient) + work.batch_idx * batch_stride + head_idx * head_stride +
             (work.seq.k_row + first_key) * row_stride;
  const i32 rows = work.slot_k - first_key;
  if constexpr (Cfg::kGradVectorBytes == 16) {
    store_gradient_staged<kHeadDim, Layout>(rD, sTile, dst, row_stride, rows, scale, lane);
  } else {
    store_gradient<kHeadDim>(rD, dst, row_stride, rows, scale, lane);
  }
}
