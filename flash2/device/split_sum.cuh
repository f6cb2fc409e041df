// Weighted sum over some of the splits of a row, and sums of such sums: the merge at the end of
// flash2/decode.cu. In an order that does not depend on timing.
#pragma once
#include "flash2/device/split_merge.cuh"
#include "common/ptx/cp_async.cuh"

// By one warp: a lane has columns lane_idx * 4 + 128 * j.
template <i32 kColumns>
struct SplitSum {
  static constexpr i32 kVectors = ceil_div(kColumns, 128);
  static constexpr u32 kRowBytes = kVectors * 512;

  f32 max = bits_as_f32(kNegInfBits);  // of the splits' softmax_lse
  f32 weight = 0.0f;                   // sum of exp(softmax_lse - max)
  f32 rO[kVectors][4] = {};            // sum of exp(softmax_lse - max) O

  // Adds num_splits splits, of which up to kAhead are under way together. Through shared memory:
  // many loads without many registers, and little code, which no CTA has fetched before.
  //   partial, lse_partial: the row's in the first of them; strides: to the next of them. What a
  //   split with -inf has in partial is ignored.
  //   smem: this warp's own, kAhead * kRowBytes.
  template <i32 kAhead>
  DEVICE void add(const f32* partial, i64 split_stride, const f32* lse_partial,
                  i64 lse_split_stride, i32 num_splits, u32 smem, i32 lane_idx) {
    static_assert(kAhead <= 32, "a lane has the weight of one of them");
    const u32 s_lane = smem + u32(lane_idx) * 16;
    const f32* row = partial + lane_idx * 4;
#pragma unroll 1
    for (i32 begin = 0; begin < num_splits; begin += kAhead) {
      const i32 count = imin(num_splits - begin, kAhead);
      f32 lse = bits_as_f32(kNegInfBits);
      if (lane_idx < count) {
        lse = ld_global_f32(lse_partial + (begin + lane_idx) * lse_split_stride);
      }
#pragma unroll 4
      for (i32 i = 0; i < count; ++i, row += split_stride) {
#pragma unroll
        for (i32 j = 0; j < kVectors; ++j) {
          if (j * 128 + lane_idx * 4 < kColumns) {
            cp_async_16(s_lane + u32(i) * kRowBytes + j * 512, row + j * 128, 16);
          }
        }
      }
      cp_async_commit_group();
      const f32 new_max = fmaxf(max, warp_max(lse));
      const bool empty = new_max == bits_as_f32(kNegInfBits);
      const f32 lane_weight = empty ? 0.0f : ex2_approx((lse - new_max) * kLog2e);
      rescale(empty ? 0.0f : ex2_approx((max - new_max) * kLog2e));
      weight += warp_sum(lane_weight);
      max = new_max;
      cp_async_wait_group<0>();  // a lane reads what it has copied itself
#pragma unroll 4
      for (i32 i = 0; i < count; ++i) {
        const f32 w = bits_as_f32(shfl_idx_u32(f32_as_bits(lane_weight), i));
        if (w > 0.0f) {
          add_row(s_lane + u32(i) * kRowBytes, w, lane_idx);
        }
      }
    }
  }

  // Puts the sum where add_sum() finds it. smem: kRowBytes; stats: 8 bytes.
  DEVICE void hand_over(u32 smem, u32 stats, i32 lane_idx) const {
#pragma unroll
    for (i32 j = 0; j < kVectors; ++j) {
      const u32 words[4] = {f32_as_bits(rO[j][0]), f32_as_bits(rO[j][1]), f32_as_bits(rO[j][2]),
                            f32_as_bits(rO[j][3])};
      st_shared_v4(smem + u32(lane_idx) * 16 + j * 512, words);
    }
    if (lane_idx == 0) {
      st_shared_f32(stats, max);
      st_shared_f32(stats + 4, weight);
    }
  }
  DEVICE void add_sum(u32 smem, u32 stats, i32 lane_idx) {
    const f32 other = ld_shared_f32(stats);
    const f32 new_max = fmaxf(max, other);
    if (new_max == bits_as_f32(kNegInfBits)) {
      return;
    }
    rescale(ex2_approx((max - new_max) * kLog2e));
    max = new_max;
    const f32 w = ex2_approx((other - new_max) * kLog2e);
    weight += w * ld_shared_f32(stats + 4);
    add_row(smem + u32(lane_idx) * 16, w, lane_idx);
  }

  DEVICE f32 lse() const { return weight > 0.0f ? max + kLn2 * lg2_approx(weight) : max; }

 private:
  DEVICE void rescale(f32 by) {
    weight *= by;
#pragma unroll
    for (i32 j = 0; j < kVectors; ++j) {
#pragma unroll
      for (i32 c = 0; c < 4; ++c) {
        rO[j][c] *= by;
      }
    }
  }
  DEVICE void add_row(u32 s_lane, f32 w, i32 lane_idx) {
#pragma unroll
    for (i32 j = 0; j < kVectors; ++j) {
      if (j * 128 + lane_idx * 4 < kColumns) {
        u32 words[4];
        ld_shared_v4(words, s_lane + j * 512);
#pragma unroll
        for (i32 c = 0; c < 4; ++c) {
          rO[j][c] += w * bits_as_f32(words[c]);
        }
      }
    }
  }
};
