// Vectors of 16-bit elements between global memory and registers, as wide as pointers and strides
// allow.
#pragma once
#include "common/device/elem.cuh"
#include "common/ptx/memory.cuh"

// kVectorBytes: 16, 8, 4 or 2. The last word of a 2-byte vector has a zero upper half.
template <i32 kVectorBytes>
constexpr i32 kVectorWords = kVectorBytes < 4 ? 1 : kVectorBytes / 4;

template <i32 kVectorBytes>
DEVICE void load_vector(u32 (&words)[kVectorWords<kVectorBytes>], const void* src) {
  if constexpr (kVectorBytes == 16) {
    ld_global_v4(words, src);
  } else if constexpr (kVectorBytes == 8) {
    const u64 bits = ld_global_u64(src);
    words[0] = u32(bits);
    words[1] = u32(bits >> 32);
  } else if constexpr (kVectorBytes == 4) {
    words[0] = ld_global_u32(src);
  } else {
    words[0] = ld_global_u16(src);
  }
}

// The inverse.
template <i32 kVectorBytes>
DEVICE void store_words(void* dst, const u32 (&words)[kVectorWords<kVectorBytes>]) {
  if constexpr (kVectorBytes == 16) {
    st_global_v4(dst, words);
  } else if constexpr (kVectorBytes == 8) {
    st_global_u64(dst, u64(words[1]) << 32 | words[0]);
  } else if constexpr (kVectorBytes == 4) {
    st_global_u32(dst, words[0]);
  } else {
    st_global_u16(dst, u16(words[0]));
  }
}

// Stores eight elements (four words) at dst in vectors of kVectorBytes, those of them that begin
// below `valid` elements.
template <i32 kVectorBytes>
DEVICE void store_eight(void* dst, const u32 (&words)[4], i32 valid) {
  char* to = static_cast<char*>(dst);
  if constexpr (kVectorBytes == 16) {
    if (valid > 0) {
      st_global_v4(to, words);
    }
  } else if constexpr (kVectorBytes == 8) {
#pragma unroll
    for (i32 i = 0; i < 2; ++i) {
      if (4 * i < valid) {
        st_global_u64(to + 8 * i, u64(words[2 * i + 1]) << 32 | words[2 * i]);
      }
    }
  } else if constexpr (kVectorBytes == 4) {
#pragma unroll
    for (i32 i = 0; i < 4; ++i) {
      if (2 * i < valid) {
        st_global_u32(to + 4 * i, words[i]);
      }
    }
  } else {
#pragma unroll
    for (i32 i = 0; i < 8; ++i) {
      if (i < valid) {
        st_global_u16(to + 2 * i, u16(words[i / 2] >> (i % 2 * 16)));
      }
    }
  }
}

template <bool kIsBf16>
DEVICE f32 low_as_f32(u32 word) {
  if constexpr (kIsBf16) {
    return bits_as_f32(word << 16);
  } else {
    return f16_to_f32(u16(word));
  }
}
template <bool kIsBf16>
DEVICE f32 high_as_f32(u32 word) {
  if constexpr (kIsBf16) {
    return bits_as_f32(word & 0xffff0000u);
  } else {
    return f16_to_f32(u16(word >> 16));
  }
}
