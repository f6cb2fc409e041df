// flash2/combine.cu: merges attention over disjoint sets of keys: out = sum of w out_partial, w =
// exp(lse_partial - softmax_lse). Launched for flash_attn_combine, and by flash2/decode.py where
// decode.cu does not merge its splits itself. A row (batch, query, head) is worked on by
// kWarpsPerRow warps of a CTA, each taking every kWarpsPerRow-th split.
#include "prelude.cuh"  // generated for this problem: struct Cfg

#include "common/device/elem.cuh"
#include "flash2/device/split_merge.cuh"
#include "common/ptx/barrier.cuh"

constexpr i32 kRowsPerCta = Cfg::kNumThreads / 32 / Cfg::kWarpsPerRow;
constexpr i32 kLaneVectors = ceil_div(Cfg::kHeadDimV, 128);  // of four columns
constexpr i32 kLoadsAhead = 4;

struct Smem {
  static constexpr u32 kWeights = 0;  // [row of the CTA][split]
  static constexpr u32 kSums =
      kWeights + kRowsPerCta * kMaxSplits * 4;  // [row][warp of the row][column]
  static constexpr u32 kRowBytes = kLaneVectors * 512;
  static constexpr u32 kBytes =
      kSums + (Cfg::kWarpsPerRow > 1 ? kRowsPerCta * Cfg::kWarpsPerRow * kRowBytes : 0);
};
static_assert(Smem::kBytes == Cfg::kSmemBytes,
              "flash2/decode_tiles.py and this file agree on shared memory");
static_assert(Cfg::kNumThreads % (32 * Cfg::kWarpsPerRow) == 0);

struct Row {
  i64 batch_idx, row, head_idx;
};

// Adds what the row's other warps have accumulated. Called by the whole CTA; the sum is the row's
// first warp's.
DEVICE void add_warps(f32 (&rO)[kLaneVectors][4], u32 s_row, i32 warp_of_row, i32 lane_idx) {
  const u32 s_lane = s_row + u32(lane_idx) * 16;
#pragma unroll
  for (i32 j = 0; j < kLaneVectors; ++j) {
    if (warp_of_row > 0) {
      const u32 words[4] = {f32_as_bits(rO[j][0]), f32_as_bits(rO[j][1]), f32_as_bits(rO[j][2]),
                            f32_as_bits(rO[j][3])};
      st_shared_v4(s_lane + u32(warp_of_row) * Smem::kRowBytes + j * 512, words);
    }
  }
  cta_sync();
  if (warp_of_row == 0) {
#pragma unroll
    for (i32 w = 1; w < Cfg::kWarpsPerRow; ++w) {
#pragma unroll
      for (i32 j = 0; j < kLaneVectors; ++j) {
        u32 words[4];
        ld_shared_v4(words, s_lane + w * Smem::kRowBytes + j * 512);
#pragma unroll
        for (i32 c = 0; c < 4; ++c) {
          rO[j][c] += bits_as_f32(words[c]);
        }
      }
    }
  }
}

// Writes columns col .. col + 3 of a row that begins at dst, those below kHeadDimV.
DEVICE void store_four(char* dst, const f32 (&x)[4], i32 col) {
  constexpr i32 kColumnBytes = Cfg::kOutF32 ? 4 : kElemBytes;
  dst += col * kColumnBytes;
  const u32 halves[2] = {pack2<Cfg::kBf16>(x[0], x[1]), pack2<Cfg::kBf16>(x[2], x[3])};
  if constexpr (Cfg::kWideStores && Cfg::kOutF32) {
    const u32 words[4] = {f32_as_bits(x[0]), f32_as_bits(x[1]), f32_as_bits(x[2]),
                          f32_as_bits(x[3])};
    st_global_v4(dst, words);
  } else if constexpr (Cfg::kWideStores) {
    st_global_u64(dst, u64(halves[1]) << 32 | halves[0]);
  } else {
#pragma unroll
    for (i32 i = 0; i < 4; ++i) {
      if (col + i < Cfg::kHeadDimV) {
        if constexpr (Cfg::kOutF32) {
          st_global_f32(dst + i * 4, x[i]);
        } else {
          st_global_u16(dst + i * 2, u16(halves[i / 2] >> (i % 2 * 16)));
        }
      }
    }
  }
}

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) flash2_combine(GRID_CONSTANT CombineParams p) {
  const i32 lane_idx = thread_idx() % 32, warp_idx = thread_idx() / 32;
  const i32 row_of_cta = warp_idx / Cfg::kWarpsPerRow, warp_of_row = warp_idx % Cfg::kWarpsPerRow;
  const i64 index = i64(block_idx()) * kRowsPerCta + row_of_cta;
  const bool exists = index < p.num_rows;
  const i64 token = index / p.num_heads;
  const Row row{token / p.seqlen, token % p.seqlen, index % p.num_heads};
  const u32 s_weights = smem_base() + Smem::kWeights + u32(row_of_cta * kMaxSplits) * 4;

  if (exists && warp_of_row == 0) {
    const f32 lse = weigh_splits(p.lse_partial + row.batch_idx * p.lse_partial_batch_stride +
                                     row.head_idx * p.lse_partial_head_stride + row.row,
                                 p.lse_partial_split_stride, p.num_splits, p.s_aux + row.head_idx,
                                 s_weights, lane_idx);
    if (p.softmax_lse != nullptr && lane_idx == 0) {
      st_global_f32(p.softmax_lse + row.batch_idx * p.lse_batch_stride +
                        row.head_idx * p.lse_head_stride + row.row,
                    lse);
    }
  }
  cta_sync();  // the weights are there
  f32 rO[kLaneVectors][4] = {};
  if (exists) {
    add_splits<Cfg::kHeadDimV, kLoadsAhead, Cfg::kWideLoads>(
        rO,
        p.out_partial + row.batch_idx * p.partial_batch_stride + row.row * p.partial_row_stride +
            row.head_idx * p.partial_head_stride + lane_idx * 4,
        p.partial_split_stride, p.num_splits, warp_of_row, Cfg::kWarpsPerRow, s_weights, lane_idx);
  }
  if constexpr (Cfg::kWarpsPerRow > 1) {
    add_warps(rO, smem_base() + Smem::kSums + u32(row_of_cta * Cfg::kWarpsPerRow) * Smem::kRowBytes,
              warp_of_row, lane_idx);
  }
  if (exists && warp_of_row == 0) {
    char* out = static_cast<char*>(p.out) +
                (row.batch_idx * p.out_batch_stride + row.row * p.out_row_stride +
                 row.head_idx * p.out_head_stride) *
                    (Cfg::kOutF32 ? 4 : kElemBytes);
#pragma unroll
    for (i32 j = 0; j < kLaneVectors; ++j) {
      const i32 col = j * 128 + lane_idx * 4;
      if (col < Cfg::kHeadDimV) {
        store_four(out, rO[j], col);
      }
    }
  }
}
