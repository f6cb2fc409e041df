// Merges attention over disjoint sets of keys: weights of the splits of a row from their
// logsumexps, and the weighted sum. In the order of the splits, so that results do not depend on
// timing. Called by flash2/combine.cu; flash2/decode.cu merges its own splits by split_sum.cuh.
#pragma once
#include "common/device/sink.cuh"
#include "common/device/softmax.cuh"

constexpr i32 kMaxSplits = 256;

DEVICE f32 warp_max(f32 x) {
#pragma unroll
  for (i32 mask = 16; mask > 0; mask /= 2) {
    x = fmaxf(x, shfl_xor_f32(x, mask));
  }
  return x;
}
DEVICE f32 warp_sum(f32 x) {
#pragma unroll
  for (i32 mask = 16; mask > 0; mask /= 2) {
    x += shfl_xor_f32(x, mask);
  }
  return x;
}

// Puts the weights of one row's splits into shared memory, kMaxSplits floats, and returns the row's
// softmax_lse. A split with -inf has no keys and gets 0. By one warp, for others after a barrier.
//   lse_partial: the row's in split 0.  sink: of the row's head, with Cfg::kSink.
DEVICE f32 weigh_splits(const f32* lse_partial, i64 split_stride, i32 num_splits, const f32* sink,
                        u32 s_weights, i32 lane_idx) {
  f32 lse[kMaxSplits / 32];
  f32 row_max = bits_as_f32(kNegInfBits);
#pragma unroll
  for (i32 i = 0; i < kMaxSplits / 32; ++i) {
    const i32 split = i * 32 + lane_idx;
    lse[i] = bits_as_f32(kNegInfBits);
    if (split < num_splits) {
      lse[i] = ld_global_f32(lse_partial + split * split_stride);
    }
    row_max = fmaxf(row_max, lse[i]);
  }
  row_max = warp_max(row_max);
  const bool empty = row_max == bits_as_f32(kNegInfBits);
  f32 sum = 0.0f;
#pragma unroll
  for (i32 i = 0; i < kMaxSplits / 32; ++i) {
    lse[i] = empty ? 0.0f : ex2_approx((lse[i] - row_max) * kLog2e);
    sum += lse[i];
  }
  sum = warp_sum(sum);
  f32 scale = empty ? 0.0f : 1.0f / sum;
  SinkRow with;
  if constexpr (Cfg::kSink) {
    with = with_sink(empty ? row_max : row_max + kLn2 * lg2_approx(sum), ld_global_f32(sink));
    scale *= with.share;
  }
#pragma unroll
  for (i32 i = 0; i < kMaxSplits / 32; ++i) {
    st_shared_f32(s_weights + u32(i * 32 + lane_idx) * 4, lse[i] * scale);
  }
  return Cfg::kSink ? with.lse : empty ? row_max : row_max + kLn2 * lg2_approx(sum);
}

// Four columns of a split's row. Without kWide their address is aligned to one only.
template <bool kWide>
DEVICE void load_four(f32 (&x)[4], const f32* src, i32 valid) {
  if constexpr (kWide) {
    u32 words[4];
    ld_global_v4(words, src);
#pragma unroll
    for (i32 i = 0; i < 4; ++i) {
      x[i] = bits_as_f32(words[i]);
    }
  } else {
#pragma unroll
    for (i32 i = 0; i < 4; ++i) {
      x[i] = i < valid ? ld_global_f32(src + i) : 0.0f;
    }
  }
}

// Adds splits first, first + step... of one row to rO, which holds a lane's columns lane_idx * 4 +
// 128 * j. A split without keys is not read.
//   partial: this lane's first column in split 0.  kLoadsAhead: splits that are under way together.
template <i32 kColumns, i32 kLoadsAhead, bool kWide, i32 kVectors>
DEVICE void add_splits(f32 (&rO)[kVectors][4], const f32* partial, i64 split_stride, i32 num_splits,
                       i32 first, i32 step, u32 s_weights, i32 lane_idx) {
  static_assert(kVectors * 128 >= kColumns);
  for (i32 begin = first; begin < num_splits; begin += kLoadsAhead * step) {
    f32 weight[kLoadsAhead], x[kLoadsAhead][kVectors][4];
#pragma unroll
    for (i32 i = 0; i < kLoadsAhead; ++i) {
      const i32 split = begin + i * step;
      weight[i] = split < num_splits ? ld_shared_f32(s_weights + u32(split) * 4) : 0.0f;
    }
#pragma unroll
    for (i32 i = 0; i < kLoadsAhead; ++i) {
#pragma unroll
      for (i32 j = 0; j < kVectors; ++j) {
        const i32 valid = kColumns - j * 128 - lane_idx * 4;
        x[i][j][0] = x[i][j][1] = x[i][j][2] = x[i][j][3] = 0.0f;
        if (weight[i] != 0.0f && valid > 0) {
          load_four<kWide>(x[i][j], partial + (begin + i * step) * split_stride + j * 128, valid);
        }
      }
    }
#pragma unroll
    for (i32 i = 0; i < kLoadsAhead; ++i) {
#pragma unroll
      for (i32 j = 0; j < kVectors; ++j) {
#pragma unroll
        for (i32 c = 0; c < 4; ++c) {
          rO[j][c] += weight[i] * x[i][j][c];
        }
      }
    }
  }
}
