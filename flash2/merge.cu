// flash2/merge.cu: adds attention over more keys to a result, in place: out = w out + w' part, with
// weights from the logsumexps of both. Launched by flash2/merge.py for context parallelism, whose
// ranks see the keys of one another after each other. A warp per row (batch, query, head). Limited
// by memory bandwidth.
#include "prelude.cuh"  // generated for this problem: struct Cfg

#include "common/device/elem.cuh"
#include "common/device/softmax.cuh"
#include "common/ptx/barrier.cuh"

constexpr i32 kVectors = ceil_div(Cfg::kHeadDimV, 128);  // of four columns, per lane
constexpr i32 kOutBytes = Cfg::kOutF32 ? 4 : kElemBytes;

DEVICE f32 from_elem(u32 bits) {
  return Cfg::kBf16 ? bf16_to_f32(u16(bits)) : f16_to_f32(u16(bits));
}

// Four columns of a row of 16-bit elements, or of floats. Those beyond the row are 0.
template <bool kF32>
DEVICE void load_columns(f32 (&x)[4], const char* src, i32 valid) {
  if constexpr (Cfg::kWide && kF32) {
    u32 words[4];
    ld_global_v4(words, src);
#pragma unroll
    for (i32 i = 0; i < 4; ++i) {
      x[i] = bits_as_f32(words[i]);
    }
  } else if constexpr (Cfg::kWide) {
    const u64 word = ld_global_u64(src);
#pragma unroll
    for (i32 i = 0; i < 4; ++i) {
      x[i] = from_elem(u32(word >> (16 * i)));
    }
  } else {
#pragma unroll
    for (i32 i = 0; i < 4; ++i) {
      x[i] = 0.0f;
      if (i < valid) {
        x[i] = kF32 ? ld_global_f32(reinterpret_cast<const f32*>(src) + i)
                    : from_elem(ld_global_u16(src + i * kElemBytes));
      }
    }
  }
}

DEVICE void store_columns(char* dst, const f32 (&x)[4], i32 valid) {
  const u32 halves[2] = {pack2<Cfg::kBf16>(x[0], x[1]), pack2<Cfg::kBf16>(x[2], x[3])};
  if constexpr (Cfg::kWide && Cfg::kOutF32) {
    const u32 words[4] = {f32_as_bits(x[0]), f32_as_bits(x[1]), f32_as_bits(x[2]),
                          f32_as_bits(x[3])};
    st_global_v4(dst, words);
  } else if constexpr (Cfg::kWide) {
    st_global_u64(dst, u64(halves[1]) << 32 | halves[0]);
  } else {
#pragma unroll
    for (i32 i = 0; i < 4; ++i) {
      if (i < valid) {
        if constexpr (Cfg::kOutF32) {
          st_global_f32(reinterpret_cast<f32*>(dst) + i, x[i]);
        } else {
          st_global_u16(dst + i * kElemBytes, u16(halves[i / 2] >> (i % 2 * 16)));
        }
      }
    }
  }
}

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) flash2_merge(GRID_CONSTANT MergeParams p) {
  const i32 lane_idx = thread_idx() % 32;
  const i64 index = i64(block_idx()) * (Cfg::kNumThreads / 32) + thread_idx() / 32;
  if (index >= p.num_rows) {
    return;
  }
  const i64 token = index / p.num_heads;
  const i64 head_idx = index % p.num_heads;
  const i64 batch_idx = token / p.seqlen, part_row = token % p.seqlen;
  const i64 row = p.rows == nullptr ? part_row : ld_global_i64(p.rows + part_row);

  f32* lse = p.softmax_lse + batch_idx * p.lse_batch_stride + head_idx * p.lse_head_stride + row;
  const f32 before = ld_global_f32(lse);
  const f32 added = ld_global_f32(p.lse_part + batch_idx * p.lse_part_batch_stride +
                                  head_idx * p.lse_part_head_stride + part_row);
  if (added == bits_as_f32(kNegInfBits)) {
    return;  // the part has no key for this row
  }
  const f32 row_max = fmaxf(before, added);
  f32 weight = ex2_approx((before - row_max) * kLog2e);
  f32 weight_added = ex2_approx((added - row_max) * kLog2e);
  const f32 sum = weight + weight_added;
  weight /= sum;
  weight_added /= sum;

  char* out = static_cast<char*>(p.out) + (batch_idx * p.out_batch_stride + row * p.out_row_stride +
                                           head_idx * p.out_head_stride) *
                                              kOutBytes;
  const char* part = static_cast<const char*>(p.part) +
                     (batch_idx * p.part_batch_stride + part_row * p.part_row_stride +
                      head_idx * p.part_head_stride) *
                         kElemBytes;
#pragma unroll
  for (i32 j = 0; j < kVectors; ++j) {
    const i32 col = j * 128 + lane_idx * 4, valid = Cfg::kHeadDimV - col;
    if (valid > 0) {
      f32 x[4], y[4];
      load_columns<Cfg::kOutF32>(x, out + col * kOutBytes, valid);
      load_columns<false>(y, part + col * kElemBytes, valid);
#pragma unroll
      for (i32 i = 0; i < 4; ++i) {
        x[i] = weight * x[i] + weight_added * y[i];
      }
      store_columns(out + col * kOutBytes, x, valid);
    }
  }
  warp_sync();  // all lanes have read it
  if (lane_idx == 0) {
    st_global_f32(lse, row_max + kLn2 * lg2_approx(sum));
  }
}
