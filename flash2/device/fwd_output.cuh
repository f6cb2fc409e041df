// The end of a query tile in flash2/fwd.cu: a warp's O and softmax_lse on their way to memory.
// Included by fwd.cu only, after its layout.
#pragma once
#include "common/device/params.cuh"
#include "common/device/row_io.cuh"
#include "common/device/sink.cuh"
#include "common/device/softmax.cuh"

// Normalises O and writes the rows that the tile owns; writes softmax_lse if it is wanted. Rows
// without visible keys get zeros and -inf. Straight from registers, 64 bytes of a row at a time:
// through shared memory it takes 1000 cycles more.
DEVICE void store_output(WarpState& state, const FwdParams& p, const Work& work, const Lane& lane,
                         f32 to_log2) {
  state.softmax.finish();
  const i32 rows_left = work.seq.slot_q - work.first_row;
  const i32 queries_left = work.seq.seqlen_q - work.first_row;
  bool empty[kMTiles][2], any_empty = false;
  SinkRow with[kMTiles][2];
#pragma unroll
  for (i32 m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (i32 r = 0; r < 2; ++r) {
      const i32 row = lane.row(m, 2 * r);
      empty[m][r] = row >= queries_left || !(state.softmax.row_sum[m][r] > 0.0f);
      any_empty = any_empty || empty[m][r];
      if constexpr (Cfg::kSink) {
        with[m][r] =
            with_sink(empty[m][r] ? bits_as_f32(kNegInfBits) : state.softmax.lse(m, r, to_log2),
                      ld_global_f32(p.s_aux + work.head_idx));
      }
      if (p.softmax_lse != nullptr && lane.lane_idx % 4 == 0 && row < rows_left) {
        f32* lse = p.softmax_lse + work.batch_idx * p.lse_batch_stride +
                   work.head_idx * p.lse_head_stride + work.seq.q_row;
        st_global_f32(lse + work.first_row + row, Cfg::kSink    ? with[m][r].lse
                                                  : empty[m][r] ? bits_as_f32(kNegInfBits)
                                                                : state.softmax.lse(m, r, to_log2));
      }
    }
  }
  if (vote_any(any_empty)) {  // seldom; O of such a row may be anything, NaN too
#pragma unroll
    for (i32 m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (i32 n = 0; n < kNTilesO; ++n) {
#pragma unroll
        for (i32 e = 0; e < 4; ++e) {
          state.rO[m][n][e] = empty[m][e / 2] ? 0.0f : state.rO[m][n][e];
        }
      }
    }
  }

  const i32 quad_lane = lane.lane_idx % 4;
  char* out = static_cast<char*>(p.out) +
              (work.batch_idx * p.out_batch_stride + work.head_idx * p.out_head_stride +
               (work.seq.q_row + work.first_row) * p.out_row_stride + quad_lane * 8) *
                  kElemBytes;
#pragma unroll
  for (i32 m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (i32 r = 0; r < 2; ++r) {
      const i32 row = lane.row(m, 2 * r);
      f32 scale = empty[m][r] ? 0.0f : 1.0f / state.softmax.row_sum[m][r];
      if constexpr (Cfg::kSink) {
        scale *= with[m][r].share;
      }
      if constexpr (Cfg::kDropout) {
        scale *= p.keep_scale;
      }
      char* out_row = out + row * p.out_row_stride * kElemBytes;
#pragma unroll
      for (i32 n = 0; n < kNTilesO; n += 4) {
        u32 words[4] = {};
#pragma unroll
        for (i32 i = 0; i < 4 && n + i < kNTilesO; ++i) {
          const f32* rO = state.rO[m][n + i] + 2 * r;
          words[i] = pack2<Cfg::kBf16>(rO[0] * scale, rO[1] * scale);
        }
        transpose_quad(words, lane.lane_idx);
        const i32 left = Cfg::kHeadDimV - n * 8;  // columns
        if (row < rows_left) {
          store_eight<Cfg::kOutVectorBytes>(out_row + n * 8 * kElemBytes, words,
                                            left >= 32 ? 8 : left - quad_lane * 8);
        }
      }
    }
  }
}
