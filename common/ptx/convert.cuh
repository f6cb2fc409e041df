// Conversions between fp32 and the 16-bit formats, held as bits. Towards 16 bits they round to
// nearest even, overflow to infinity and keep subnormals; NaN becomes 0x7fff.
#pragma once
#include "common/ptx/base.cuh"

// Packs two fp16 values, lo in the lower half. PTX: cvt.rn.f16x2.f32 (sm_80+).
DEVICE u32 cvt_f16x2(f32 lo, f32 hi) {
  u32 packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}

// Packs two bf16 values, lo in the lower half. PTX: cvt.rn.bf16x2.f32 (sm_80+).
DEVICE u32 cvt_bf16x2(f32 lo, f32 hi) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}

// Exact. PTX: cvt.f32.f16.
DEVICE f32 f16_to_f32(u16 bits) {
  f32 value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// Exact: bf16 is the upper half of an fp32. PTX: shl.b32.
DEVICE f32 bf16_to_f32(u16 bits) { return bits_as_f32(static_cast<u32>(bits) << 16); }

// PTX: cvt.rn.f16.f32.
DEVICE u16 f32_to_f16(f32 value) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// PTX: cvt.rn.bf16.f32 (sm_80+).
DEVICE u16 f32_to_bf16(f32 value) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
