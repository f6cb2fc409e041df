// From the raw product s = q.k to the score that the softmax sees: scale, softcap, ALiBi, in this
// order. Off costs nothing: the scale is folded into the softmax's exponent (softmax.cuh).
#pragma once
#include "common/device/params.cuh"
#include "common/device/seqlen.cuh"
#include "common/ptx/math.cuh"
#include "common/ptx/memory.cuh"

constexpr f32 kLog2e = 1.44269504088896340736f;
constexpr f32 kLn2 = 0.69314718055994530942f;

// tanh(x) of y = 2 log2(e) x, from ex2 and rcp: absolute error 2e-7, where tanh.approx has 5e-4,
// too coarse once multiplied by a softcap of 50.
DEVICE f32 tanh_of_log2(f32 y) { return 1.0f - 2.0f * rcp_approx(1.0f + ex2_approx(y)); }

// What one (batch, head) pair needs.
template <class Cfg>
struct Score {
  // Scores in units of log2 already, so that the softmax multiplies by 1 instead of
  // softmax_scale_log2. Also the way for a softmax_scale <= 0, where the largest product is not the
  // largest score.
  static constexpr bool kPrescaled = Cfg::kSoftcap || Cfg::kAlibi || Cfg::kPrescale;
  f32 scale_log2, softcap_in_log2, softcap_out, slope_log2;

  template <class Params>
  DEVICE Score(const Params& p, i32 batch_idx, i32 head_idx) {
    scale_log2 = p.softmax_scale_log2;
    if constexpr (Cfg::kSoftcap) {
      softcap_in_log2 = p.softcap_in * (2.0f * kLog2e);
      softcap_out = p.softcap_out;
    }
    if constexpr (Cfg::kAlibi) {
      slope_log2 =
          ld_global_f32(p.alibi_slopes + batch_idx * p.alibi_batch_stride + head_idx) * kLog2e;
    }
  }

  // What the softmax multiplies scores by to get units of log2.
  DEVICE f32 to_log2() const { return kPrescaled ? 1.0f : scale_log2; }

  // aligned: row + seqlen_k - seqlen_q, the key on the row's diagonal.
  DEVICE f32 operator()(f32 s, i32 aligned, i32 col) const {
    f32 derivative;
    return with_derivative(s, aligned, col, derivative);
  }

  // The same for the backward. derivative: of the score by softmax_scale * s, which only softcap
  // makes other than 1.
  DEVICE f32 with_derivative(f32 s, i32 aligned, i32 col, f32& derivative) const {
    derivative = 1.0f;
    if constexpr (Cfg::kSoftcap) {
      const f32 t = tanh_of_log2(s * softcap_in_log2);
      derivative = 1.0f - t * t;
      s = t * softcap_out;
    } else if constexpr (kPrescaled) {
      s *= scale_log2;
    }
    if constexpr (Cfg::kAlibi) {
      s -= slope_log2 * fabsf(f32(aligned - col));
    }
    return s;
  }
};
