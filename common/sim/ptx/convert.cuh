// Twin of common/ptx/convert.cuh for the simulator.
#pragma once
#include "common/ptx/base.cuh"

DEVICE f32 f16_to_f32(u16 bits) {
  const u32 magnitude = bits & 0x7fffu;
  const u32 sign = static_cast<u32>(bits & 0x8000u) << 16;
  if (magnitude >= 0x7c00u) {
    return bits_as_f32(sign | 0x7f800000u | magnitude << 13);
  }
  return bits_as_f32(sign | f32_as_bits(bits_as_f32(magnitude << 13) * 0x1p112f));
}

DEVICE f32 bf16_to_f32(u16 bits) { return bits_as_f32(static_cast<u32>(bits) << 16); }

DEVICE u16 f32_to_f16(f32 value) {
  const u32 bits = f32_as_bits(value);
  const u32 magnitude = bits & 0x7fffffffu;
  const u16 sign = static_cast<u16>(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) {
    return 0x7fff;
  }
  if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    return sign | 0x7c00;
  }
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 rounds at 2 ** -24
    return sign | static_cast<u16>(f32_as_bits(bits_as_f32(magnitude) + 0.5f) - 0x3f000000u);
  }
  return sign | static_cast<u16>((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}

DEVICE u16 f32_to_bf16(f32 value) {
  const u32 bits = f32_as_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return 0x7fff;
  }
  return static_cast<u16>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

DEVICE u32 cvt_f16x2(f32 lo, f32 hi) {
  return static_cast<u32>(f32_to_f16(hi)) << 16 | f32_to_f16(lo);
}

DEVICE u32 cvt_bf16x2(f32 lo, f32 hi) {
  return static_cast<u32>(f32_to_bf16(hi)) << 16 | f32_to_bf16(lo);
}
