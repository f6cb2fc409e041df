// The 16-bit element type of a kernel: what differs between fp16 and bf16. Used by every kernel of
// flash2/.
#pragma once
#include "common/ptx/convert.cuh"
#include "common/ptx/mma.cuh"

constexpr i32 kElemBytes = 2;

constexpr DEVICE i32 ceil_div(i32 a, i32 b) { return (a + b - 1) / b; }
constexpr DEVICE i32 round_up(i32 a, i32 b) { return ceil_div(a, b) * b; }
DEVICE i32 imin(i32 a, i32 b) { return a < b ? a : b; }
DEVICE i32 imax(i32 a, i32 b) { return a > b ? a : b; }

// n / divisor for 0 <= n < 2^31, without the 100 cycles of a division. by: flash2/fwd_tiles.py
// division(divisor).
DEVICE i32 divide(i32 n, u64 by) {
  return i32(u32(u64(2u * u32(n)) * u32(by) >> 32) >> u32(by >> 32));
}

template <bool kCondition, class Then, class Else>
struct SelectType {
  using Type = Then;
};
template <class Then, class Else>
struct SelectType<false, Then, Else> {
  using Type = Else;
};
template <bool kCondition, class Then, class Else>
using Select = typename SelectType<kCondition, Then, Else>::Type;

// Two fp32 values rounded to nearest into one register; lo is the element at the lower address.
template <bool kIsBf16>
DEVICE u32 pack2(f32 lo, f32 hi) {
  if constexpr (kIsBf16) {
    return cvt_bf16x2(lo, hi);
  } else {
    return cvt_f16x2(lo, hi);
  }
}

// rD (16 x 8) += A (16 x 16) B (16 x 8).
template <bool kIsBf16>
DEVICE void mma(f32 (&rD)[4], const u32 (&rA)[4], u32 rB0, u32 rB1) {
  if constexpr (kIsBf16) {
    mma_m16n8k16_bf16(rD, rA, rB0, rB1);
  } else {
    mma_m16n8k16_f16(rD, rA, rB0, rB1);
  }
}
