// Twin of common/ptx/math.cuh for the simulator: exact to fp32 where the GPU approximates.
#pragma once
#include "common/ptx/base.cuh"

namespace flash_sim {
// Subnormals become zero of their sign (.ftz).
inline f32 flush(f32 x) {
  return (f32_as_bits(x) & 0x7f800000u) == 0 ? bits_as_f32(f32_as_bits(x) & 0x80000000u) : x;
}
}  // namespace flash_sim

DEVICE f32 ex2_approx(f32 x) { return flash_sim::flush(__builtin_exp2f(flash_sim::flush(x))); }

DEVICE f32 lg2_approx(f32 x) { return __builtin_log2f(flash_sim::flush(x)); }

DEVICE f32 rcp_approx(f32 x) { return flash_sim::flush(1.0f / flash_sim::flush(x)); }

DEVICE f32 tanh_approx(f32 x) { return __builtin_tanhf(x); }
