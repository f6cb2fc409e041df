// Approximate functions of the special function unit. Subnormal inputs and results count as zero,
// except in tanh_approx. Error bounds are the PTX manual's.
#pragma once
#include "common/ptx/base.cuh"

// 2 ** x, relative error at most 2 ** -22; ex2_approx(-inf) is +0. PTX: ex2.approx.ftz.f32.
DEVICE f32 ex2_approx(f32 x) {
  f32 result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// log2(x), -inf at 0, NaN below. Absolute error at most 2 ** -22 for x in [0.5, 2], else relative.
// PTX: lg2.approx.ftz.f32.
DEVICE f32 lg2_approx(f32 x) {
  f32 result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 1 / x, relative error at most 2 ** -23; infinity of x's sign at 0. PTX: rcp.approx.ftz.f32.
DEVICE f32 rcp_approx(f32 x) {
  f32 result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Hyperbolic tangent, relative error at most 2 ** -11. PTX: tanh.approx.f32 (sm_75+).
DEVICE f32 tanh_approx(f32 x) {
  f32 result;
  asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
