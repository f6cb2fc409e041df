// fp32 sums in fragments (bwd_work.cuh) -> rows of 16 bits. Used by bwd_convert.cu and bwd_sum.cu.
#pragma once
#include "common/device/bwd_work.cuh"
#include "common/device/row_io.cuh"

// Adds 2 rows x 8 columns of one split, those of an item of convert_strips. src: the fragment.
template <bool kLaneByLane>
DEVICE void add_item(f32 (&sum)[2][8], const f32* src, i32 row) {
#pragma unroll
  for (i32 i = 0; i < 4; ++i) {
    u32 words[4];
    if constexpr (kLaneByLane) {  // the four elements of lane 4 * row + i
      ld_global_v4(words, src + fragment_offset<true>(4 * row + i, 0));
#pragma unroll
      for (i32 e = 0; e < 4; ++e) {
        sum[e / 2][2 * i + e % 2] += bits_as_f32(words[e]);
      }
    } else {  // one element of the four lanes that have row + r
      const i32 r = i / 2, parity = i % 2;
      ld_global_v4(words, src + fragment_offset<false>(4 * (row % 8 + r), 2 * (row / 8) + parity));
#pragma unroll
      for (i32 q = 0; q < 4; ++q) {
        sum[r][2 * q + parity] += bits_as_f32(words[q]);
      }
    }
  }
}

// By all threads of a CTA: adds up num_splits sums in order, scales and rounds them. Rows from
// num_sums on become zero.
//   src: a strip's first fragment, of split 0; a row has kColumns floats.
//   dst: its first row; num_rows of them are written.
template <class Cfg, i32 kHeadDim, i32 kColumns, bool kLaneByLane>
DEVICE void convert_strips(const f32* src, i64 split_stride, i32 num_splits, u16* dst,
                           i64 row_stride, i32 num_rows, i32 num_sums, f32 scale) {
  // Columns of a strip are cut into pieces of 8, the width of a fragment. An item is one such piece
  // of two rows, `row` and `row + kRowStep`: 64 contiguous bytes of the fragment, or 32 contiguous
  // bytes of each element index.
  constexpr i32 kPieces = kColumns / 8;
  constexpr i32 kItemsPerStrip = kPieces * 8;
  constexpr i32 kRowStep = kLaneByLane ? 8 : 1;
  const i32 strips = ceil_div(num_rows, kAccumRows);
#pragma unroll 2
  for (i32 i = thread_idx(); i < strips * kItemsPerStrip; i += Cfg::kNumThreads) {
    const i32 strip = i / kItemsPerStrip, piece = i % kPieces;
    const i32 row = i / kPieces % 8 * (kLaneByLane ? 1 : 2);
    const i32 first = strip * kAccumRows + row;
    f32 sum[2][8] = {};
    if (first < num_sums) {
      const f32* item = src + strip * kAccumRows * kColumns + piece * kFragmentFloats;
      for (i32 split = 0; split < num_splits; ++split) {
        add_item<kLaneByLane>(sum, item + split * split_stride, row);
      }
    }
#pragma unroll
    for (i32 r = 0; r < 2; ++r) {
      const i32 out_row = first + r * kRowStep;
      if (out_row < num_rows) {
        u32 words[4];
#pragma unroll
        for (i32 q = 0; q < 4; ++q) {
          const u32 pair = pack2<Cfg::kBf16>(sum[r][2 * q] * scale, sum[r][2 * q + 1] * scale);
          words[q] = out_row < num_sums ? pair : 0;
        }
        store_eight<Cfg::kGradVectorBytes>(dst + out_row * row_stride + piece * 8, words,
                                           kHeadDim - piece * 8);
      }
    }
  }
}
