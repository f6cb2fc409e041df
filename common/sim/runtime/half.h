// 16-bit formats to fp32, exact.
#pragma once
#include <bit>

#include "calls.h"

namespace flash_sim {

inline f32 f16_as_f32(u16 bits) {
  const u32 magnitude = bits & 0x7fffu;
  f32 value = std::bit_cast<f32>(magnitude << 13) * 0x1p112f;  // subnormals included
  if (magnitude >= 0x7c00u) {
    value = std::bit_cast<f32>(0x7f800000u | magnitude << 13);
  }
  return std::bit_cast<f32>(std::bit_cast<u32>(value) | static_cast<u32>(bits & 0x8000u) << 16);
}

inline f32 bf16_as_f32(u16 bits) { return std::bit_cast<f32>(static_cast<u32>(bits) << 16); }

}  // namespace flash_sim
