// Online softmax of a warpgroup's score tile in WGMMA's accumulator layout: element i of a lane is
// in its row i / 2 % 2, and a quad of lanes shares a row. The rule is that of
// common/device/softmax.cuh; here bringing O to a new reference is left to the caller, whose O is
// still being accumulated.
#pragma once
#include "common/device/softmax.cuh"

// Row 0 or 1 of the lane that accumulator element i belongs to.
DEVICE constexpr i32 row_of(i32 i) { return i / 2 % 2; }

struct RowSoftmax {
  f32 row_max[2];  // the reference, in score units: a recent maximum of the row
  f32 row_sum[2];  // this lane's columns only, until finish()

  // The state before any key: gives the defined empty row.
  DEVICE void clear() {
    row_max[0] = row_max[1] = bits_as_f32(kNegInfBits);
    row_sum[0] = row_sum[1] = 0.0f;
  }

  // rS becomes exp(score - reference). Returns whether any row of the warp has a new reference; the
  // O accumulated so far is then to be multiplied by rescale[row]. kFirst: there is no O so far.
  template <bool kFirst, i32 kN>
  DEVICE bool update(f32 (&rS)[kN], f32 (&rescale)[2], f32 to_log2) {
    f32 partial[4] = {rS[0], rS[1], rS[2], rS[3]};
#pragma unroll
    for (i32 i = 4; i < kN; ++i) {
      partial[i % 4] = fmaxf(partial[i % 4], rS[i]);
    }
    const f32 tile_max[2] = {quad_max(fmaxf(partial[0], partial[1])),
                             quad_max(fmaxf(partial[2], partial[3]))};
    bool moved = false;
    if constexpr (kFirst) {
      row_max[0] = tile_max[0];
      row_max[1] = tile_max[1];
    } else {
      const bool grown[2] = {(tile_max[0] - row_max[0]) * to_log2 > kRescaleSlackLog2,
                             (tile_max[1] - row_max[1]) * to_log2 > kRescaleSlackLog2};
      moved = vote_any(grown[0] || grown[1]);
      if (moved) {
#pragma unroll
        for (i32 r = 0; r < 2; ++r) {
          rescale[r] = grown[r] ? ex2_approx((row_max[r] - tile_max[r]) * to_log2) : 1.0f;
          row_max[r] = grown[r] ? tile_max[r] : row_max[r];
          row_sum[r] *= rescale[r];
        }
      }
    }
    f32 reference[2];
#pragma unroll
    for (i32 r = 0; r < 2; ++r) {
      // Without a key so far any finite reference will do: every exponent is -inf.
      reference[r] = row_max[r] == bits_as_f32(kNegInfBits) ? 0.0f : row_max[r] * to_log2;
    }
#pragma unroll
    for (i32 i = 0; i < kN; ++i) {
      rS[i] = ex2_approx(rS[i] * to_log2 - reference[row_of(i)]);
      partial[i % 4] = i < 4 ? rS[i] : partial[i % 4] + rS[i];
    }
#pragma unroll
    for (i32 r = 0; r < 2; ++r) {
      const f32 tile_sum = partial[2 * r] + partial[2 * r + 1];
      row_sum[r] = kFirst ? tile_sum : row_sum[r] + tile_sum;
    }
    return moved;
  }

  // Completes the sums over the quad. Call once, by all lanes.
  DEVICE void finish() {
    row_sum[0] = quad_sum(row_sum[0]);
    row_sum[1] = quad_sum(row_sum[1]);
  }

  // log(sum exp(score)), natural. After finish(), for a row with keys.
  DEVICE f32 lse(i32 r, f32 to_log2) const {
    return row_max[r] * (to_log2 * kLn2) + kLn2 * lg2_approx(row_sum[r]);
  }
};
