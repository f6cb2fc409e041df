// From the raw product s = q.k to the score that the softmax sees: scale, softcap, ALiBi, in this
// order. Off costs nothing: the scale is folded into the softmax's exponent (softmax.cuh).
#pragma once
#include "common/device/params.cuh"
#include "common/device/seqlen.cuh"
#include "common/ptx/math.cuh"
#include "common/ptx/memory.cuh"
#include "common/ptx/shuffle.cuh"

constexpr f32 kLog2e = 1.44269504088896340736f;
constexpr f32 kLn2 = 0.69314718055994530942f;
constexpr u32 kNegInfBits = 0xff800000u;

// tanh(x) of y = 2 log2(e) x, from ex2 and rcp: absolute error 2e-7, where tanh.approx has 5e-4,
// too coarse once multiplied by a softcap of 50. Multiplied by one from 1000 on
// (Cfg::kLargeSoftcap), this is as well, but for large products.
DEVICE f32 tanh_of_log2(f32 y) { return 1.0f - 2.0f * rcp_approx(1.0f + ex2_approx(y)); }

// In a forward most |x| are small, and there special functions are what limits a softmax already.
// tanh(x) = x * (c0 + c1 x^2 + c2 x^4 + c3 x^6) for |x| <= kSmallTanh, relative error 6e-7.
constexpr f32 kSmallTanh = 0.5f;
struct SmallTanh {
  static constexpr f32 c0 = 0.999999456f, c1 = -0.333263179f, c2 = 0.131902966f,
                       c3 = -0.0444022258f;
};

// Largest absolute value of a lane's products: of a WGMMA's accumulator, or of fragments.
template <i32 kN>
DEVICE f32 largest_of(const f32 (&rS)[kN]) {
  f32 partial[2] = {fabsf(rS[0]), fabsf(rS[1])};
#pragma unroll
  for (i32 i = 2; i < kN; ++i) {
    partial[i % 2] = fmaxf(partial[i % 2], fabsf(rS[i]));
  }
  return fmaxf(partial[0], partial[1]);
}
template <i32 kMTiles, i32 kNTiles>
DEVICE f32 largest_of(const f32 (&rS)[kMTiles][kNTiles][4]) {
  f32 largest = 0.0f;
#pragma unroll
  for (i32 m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (i32 n = 0; n < kNTiles; ++n) {
      largest = fmaxf(largest, largest_of(rS[m][n]));
    }
  }
  return largest;
}
// What one (batch, head) pair needs.
template <class Cfg>
struct Score {
  // Scores in units of log2 already, so that the softmax multiplies by 1 instead of
  // softmax_scale_log2. Also the way for a softmax_scale <= 0, where the largest product is not the
  // largest score.
  static constexpr bool kPrescaled = Cfg::kSoftcap || Cfg::kAlibi || Cfg::kPrescale;
  f32 scale_log2, softcap_in_log2, softcap_out, slope_log2;
  f32 small_product;  // products up to this size are capped by the polynomial alone
  f32 poly[4];        // the polynomial, of a product rather than x

  template <class Params>
  DEVICE Score(const Params& p, i32 batch_idx, i32 head_idx) {
    scale_log2 = p.softmax_scale_log2;
    if constexpr (Cfg::kSoftcap) {
      softcap_in_log2 = p.softcap_in * (2.0f * kLog2e);
      softcap_out = p.softcap_out;
      const f32 square = p.softcap_in * p.softcap_in;
      const f32 factor = p.softcap_in * p.softcap_out;
      poly[0] = SmallTanh::c0 * factor;
      poly[1] = SmallTanh::c1 * factor * square;
      poly[2] = SmallTanh::c2 * factor * (square * square);
      poly[3] = SmallTanh::c3 * factor * (square * square * square);
      // Where products of huge or tiny scales leave the range of f32, terms are missing, or all is.
      const f32 last = fabsf(poly[3]);
      const f32 limit = last > 1e-36f ? kSmallTanh : 0.1f * kSmallTanh;
      small_product = last < 1e36f ? fabsf(limit / p.softcap_in) : -1.0f;
    }
    if constexpr (Cfg::kAlibi) {
      slope_log2 = ld_global_f32(p.alibi_slopes + batch_idx * p.alibi_batch_stride +
                                 head_idx * p.alibi_head_stride) *
                   kLog2e;
    }
  }

  // What the softmax multiplies scores by to get units of log2.
  DEVICE f32 to_log2() const { return kPrescaled ? 1.0f : scale_log2; }

  // Whether kSmall holds for all products of a warp. largest: |product|, of this lane's.
  DEVICE bool all_small(f32 largest) const { return !vote_any(!(largest <= small_product)); }

  // distance: of the key from the one on the row's diagonal, row + seqlen_k - seqlen_q.
  // kSmall: all_small() said so. Matters to softcap only.
  template <bool kSmall>
  DEVICE f32 get(f32 s, f32 distance) const {
    if constexpr (Cfg::kSoftcap && kSmall) {
      s = small_capped(s);
    } else if constexpr (Cfg::kLargeSoftcap) {
      s = fabsf(s) <= small_product ? small_capped(s)
                                    : softcap_out * tanh_of_log2(s * softcap_in_log2);
    } else if constexpr (Cfg::kSoftcap) {
      s = softcap_out - 2.0f * softcap_out * rcp_approx(1.0f + ex2_approx(s * softcap_in_log2));
    } else if constexpr (kPrescaled) {
      s *= scale_log2;
    }
    return biased(s, distance);
  }
  DEVICE f32 operator()(f32 s, i32 aligned, i32 col) const {
    return get<false>(s, f32(aligned - col));
  }

  // The same for the backward. derivative: of the score by softmax_scale * s, which only softcap
  // makes other than 1.
  DEVICE f32 with_derivative(f32 s, i32 aligned, i32 col, f32& derivative) const {
    derivative = 1.0f;
    if constexpr (Cfg::kSoftcap) {
      const f32 t = tanh_of_log2(s * softcap_in_log2);
      derivative = 1.0f - t * t;
      if constexpr (Cfg::kLargeSoftcap) {
        return get<false>(s, f32(aligned - col));
      }
      return biased(t * softcap_out, f32(aligned - col));
    }
    return (*this)(s, aligned, col);
  }

 private:
  DEVICE f32 small_capped(f32 s) const {
    const f32 square = s * s;
    return s * (poly[0] + square * (poly[1] + square * (poly[2] + square * poly[3])));
  }
  DEVICE f32 biased(f32 s, f32 distance) const {
    if constexpr (Cfg::kAlibi) {
      s -= slope_log2 * fabsf(distance);
    }
    return s;
  }
};
