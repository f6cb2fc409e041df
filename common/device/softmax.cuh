// Online softmax of a warp's score tile (fragment layout of gemm.cuh): running row maxima and sums,
// and the LSE.
#pragma once
#include "common/device/score.cuh"
#include "common/ptx/shuffle.cuh"

// P may grow to 2^8 before the reference follows the maximum: far from fp16's 65504.
constexpr f32 kRescaleSlackLog2 = 8.0f;

// The four lanes of a quad hold one row.
DEVICE f32 quad_max(f32 x) {
  x = fmaxf(x, shfl_xor_f32(x, 1));
  return fmaxf(x, shfl_xor_f32(x, 2));
}
DEVICE f32 quad_sum(f32 x) {
  x += shfl_xor_f32(x, 1);
  return x + shfl_xor_f32(x, 2);
}

// State of the 2 * kMTiles rows of a lane: row r of m tile m is at [m][r], lane / 4 + 8 * r inside
// the tile.
template <i32 kMTiles>
struct OnlineSoftmax {
  f32 row_max[kMTiles][2];  // the reference, in score units: a recent maximum of the row
  f32 row_sum[kMTiles][2];  // this lane's columns only, until finish()

  DEVICE OnlineSoftmax() {
#pragma unroll
    for (i32 m = 0; m < kMTiles; ++m) {
      row_max[m][0] = row_max[m][1] = bits_as_f32(kNegInfBits);
      row_sum[m][0] = row_sum[m][1] = 0.0f;
    }
  }

  // rS becomes exp(score - reference) and rO, the output so far, is brought to the same reference.
  // The reference of a row is its maximum so far, or one that lies at most 2^kRescaleSlackLog2
  // below it: any reference gives the same quotient, and most tiles then leave rO alone. to_log2
  // turns a score into units of log2. Masked scores are -inf.
  template <i32 kNTiles, i32 kNTilesO>
  DEVICE void update(f32 (&rS)[kMTiles][kNTiles][4], f32 (&rO)[kMTiles][kNTilesO][4], f32 to_log2) {
    follow_max(rS, rO, to_log2);
    exponentiate(rS, to_log2);
  }

  // update() in two halves: rO is ready after the first, rS after the second.
  template <i32 kNTiles, i32 kNTilesO>
  DEVICE void follow_max(const f32 (&rS)[kMTiles][kNTiles][4], f32 (&rO)[kMTiles][kNTilesO][4],
                         f32 to_log2) {
    f32 rescale[kMTiles][2];
    bool moved = false;
#pragma unroll
    for (i32 m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (i32 r = 0; r < 2; ++r) {
        f32 tile_max = fmaxf(rS[m][0][2 * r], rS[m][0][2 * r + 1]);
#pragma unroll
        for (i32 n = 1; n < kNTiles; ++n) {
          tile_max = fmaxf(tile_max, fmaxf(rS[m][n][2 * r], rS[m][n][2 * r + 1]));
        }
        tile_max = quad_max(tile_max);
        rescale[m][r] = 1.0f;
        // A row that has seen no key has the reference -inf and takes the first maximum it gets.
        if ((tile_max - row_max[m][r]) * to_log2 > kRescaleSlackLog2) {
          rescale[m][r] = ex2_approx((row_max[m][r] - tile_max) * to_log2);
          row_max[m][r] = tile_max;
          moved = true;
        }
      }
    }
    if (vote_any(moved)) {
#pragma unroll
      for (i32 m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (i32 r = 0; r < 2; ++r) {
          row_sum[m][r] *= rescale[m][r];
#pragma unroll
          for (i32 n = 0; n < kNTilesO; ++n) {
            rO[m][n][2 * r] *= rescale[m][r];
            rO[m][n][2 * r + 1] *= rescale[m][r];
          }
        }
      }
    }
  }
  template <i32 kNTiles>
  DEVICE void exponentiate(f32 (&rS)[kMTiles][kNTiles][4], f32 to_log2) {
#pragma unroll
    for (i32 m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (i32 r = 0; r < 2; ++r) {
        // Without a key so far any finite reference will do: every exponent is -inf.
        const f32 reference =
            row_max[m][r] == bits_as_f32(kNegInfBits) ? 0.0f : row_max[m][r] * to_log2;
#pragma unroll
        for (i32 n = 0; n < kNTiles; ++n) {
#pragma unroll
          for (i32 c = 2 * r; c < 2 * r + 2; ++c) {
            rS[m][n][c] = ex2_approx(rS[m][n][c] * to_log2 - reference);
            row_sum[m][r] += rS[m][n][c];
          }
        }
      }
    }
  }

  // Completes the sums over the quad. Call once, by all lanes.
  DEVICE void finish() {
#pragma unroll
    for (i32 m = 0; m < kMTiles; ++m) {
      row_sum[m][0] = quad_sum(row_sum[m][0]);
      row_sum[m][1] = quad_sum(row_sum[m][1]);
    }
  }

  // log(sum exp(score)), natural; -inf for a row without keys. After finish().
  DEVICE f32 lse(i32 m, i32 r, f32 to_log2) const {
    return row_sum[m][r] > 0.0f
               ? row_max[m][r] * (to_log2 * kLn2) + kLn2 * lg2_approx(row_sum[m][r])
               : bits_as_f32(kNegInfBits);
  }
};
