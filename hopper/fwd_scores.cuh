// The elementwise part of hopper/fwd.cu between its products, on a warpgroup's S and P in WGMMA's
// accumulator layout: scale, softcap, ALiBi, the mask, dropout. Included by fwd.cu and fwd_wide.cu,
// behind their layouts, which say kRegsS and kGqaGroup.
// Rules live elsewhere: score.cuh, mask.cuh, dropout.cuh.
#pragma once
#include "common/device/dropout.cuh"
#include "common/device/mask.cuh"
#include "common/device/score.cuh"
#include "common/device/softmax.cuh"
#include "hopper/softmax.cuh"

// Column of accumulator element i, counted from the lane's first.
DEVICE constexpr i32 col_of(i32 i) { return 8 * (i / 4) + i % 2; }

// How many of a lane's columns in a row are left of `col`, which counts from its first.
template <i32 kN>
DEVICE i32 cols_below(i32 col) {
  col = imax(imin(col, 2 * kN), 0);
  return col / 8 * 2 + imin(col % 8, 2);
}

// The lowest n of 32 bits: none for n <= 0, all for n >= 32.
DEVICE u32 lowest_bits(i32 n) { return u32((u64(1) << imax(imin(n, 32), 0)) - 1); }

// Masks row r of the lane but for columns begin .. end - 1, which count from its first. kBoth:
// begin is not always 0 or less.
template <bool kBoth, i32 kN>
DEVICE void mask_row(f32 (&rS)[kN], i32 r, i32 begin, i32 end) {
  if constexpr (kBoth) {
    // A bit per column first: one instruction makes predicates of seven bits, where two bounds
    // would take two comparisons each.
    const i32 from = cols_below<kN>(begin), to = cols_below<kN>(end);
#pragma unroll
    for (i32 word = 0; word < kN / 2; word += 32) {
      const u32 visible = lowest_bits(to - word) & ~lowest_bits(from - word);
#pragma unroll
      for (i32 n = word; n < imin(word + 32, kN / 2); ++n) {
        f32& s = rS[n / 2 * 4 + 2 * r + n % 2];
        s = (visible >> (n - word)) & 1u ? s : bits_as_f32(kNegInfBits);
      }
    }
  } else {
#pragma unroll
    for (i32 i = 0; i < kN; ++i) {
      if (row_of(i) == r) {
        rS[i] = col_of(i) < end ? rS[i] : bits_as_f32(kNegInfBits);
      }
    }
  }
}

// Not beside random numbers: there are too few registers.
constexpr bool kShortTanh = Cfg::kSoftcap && !Cfg::kDropout;

// Scale, softcap and ALiBi. row: as Item::row. first_col: of this lane.
template <bool kSmall>
DEVICE void transform_scores(f32 (&rS)[kRegsS], const Score<Cfg>& score, const SeqlenInfo& seq,
                             i32 row, i32 first_col) {
  f32 distance[2];  // of first_col, from the key on either row's diagonal
#pragma unroll
  for (i32 r = 0; r < 2; ++r) {
    distance[r] = f32((row + 8 * r) / kGqaGroup + seq.diagonal - first_col);
  }
#pragma unroll
  for (i32 i = 0; i < kRegsS; ++i) {
    rS[i] = score.template get<kSmall>(rS[i], distance[row_of(i)] - f32(col_of(i)));
  }
}
DEVICE void transform_scores(f32 (&rS)[kRegsS], const Score<Cfg>& score, const SeqlenInfo& seq,
                             i32 row, i32 first_col) {
  if constexpr (Score<Cfg>::kPrescaled) {
    if (kShortTanh && score.all_small(largest_of(rS))) {
      transform_scores<true>(rS, score, seq, row, first_col);
    } else {
      transform_scores<false>(rS, score, seq, row, first_col);
    }
  }
}

// -inf for keys that a row does not see. Arguments as above.
DEVICE void mask_scores(f32 (&rS)[kRegsS], const HopperFwdParams& p, const SeqlenInfo& seq, i32 row,
                        i32 first_col) {
#pragma unroll
  for (i32 r = 0; r < 2; ++r) {
    const KeyRange keys = row_keys<Cfg>(p, seq, (row + 8 * r) / kGqaGroup);
    mask_row<Cfg::kLocal || Cfg::kChunk>(rS, r, keys.begin - first_col, keys.end - first_col);
  }
}

// Zeroes the dropped elements of P. row, col: of the warp's first element.
DEVICE void drop(f32 (&rP)[kRegsS], const Dropout& dropout, i32 row, i32 col, i32 lane_idx) {
#pragma unroll
  for (i32 i = 0; i < kRegsS; i += 16) {
    const KeepBits kept = dropout.keep_bits(row, col + i / 16 * 32, lane_idx);
#pragma unroll
    for (i32 e = 0; e < 16; ++e) {
      rP[i + e] = kept.keep(e / 4, e % 4) ? rP[i + e] : 0.0f;
    }
  }
}
