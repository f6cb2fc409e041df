// dK and dV of 64 keys, from a warpgroup's registers to memory. Included by bwd.cu only.
#pragma once
#include "common/device/row_io.cuh"
#include "common/ptx/griddepcontrol.cuh"
#include "common/ptx/shuffle.cuh"
#include "hopper/bwd_layout.cuh"

// A quad of lanes holds four words each of a row, two columns a word: lane c has those at
// 8 j + 2 c. Afterwards it has the four words of columns 8 c .. 8 c + 7.
DEVICE void transpose_in_quad(u32 (&words)[4], i32 lane_idx) {
#pragma unroll
  for (i32 distance = 1; distance <= 2; distance *= 2) {
    const bool upper = (lane_idx & distance) != 0;
#pragma unroll
    for (i32 j = 0; j < 4; ++j) {
      if ((j & distance) == 0) {  // words j and j + distance trade places with the other lane's
        const u32 got = shfl_xor_u32(upper ? words[j] : words[j + distance], distance);
        words[j] = upper ? got : words[j];
        words[j + distance] = upper ? words[j + distance] : got;
      }
    }
  }
}

// What differs between dK and dV.
struct GradientPlace {
  void* gradient;
  i64 batch_stride, head_stride, row_stride;
  f32* accum;  // null: to the gradient
  i32 head_idx, qheads_per_head;
  f32 scale;
};

// Stores a sum: scaled and rounded to the gradient or, where other CTAs add to the same rows, as it
// is to this CTA's part of the accumulator.
//   first_row: key of the warp's first row, from the tile's first.
template <i32 kHeadDim, i32 kAccumColumns, i32 kParts, i32 kRegs>
DEVICE void store_gradient(const f32 (&rD)[kParts][kRegs], const BwdParams& p, const KeyTile& tile,
                           const GradientPlace& to, i32 first_row, i32 lane_idx) {
  const i32 first_key = tile.get(KeyTile::kFirstKey), batch_idx = tile.get(KeyTile::kBatchIdx);
  const SeqlenInfo seq = tile.seq();
  if (to.accum != nullptr) {
    if (first_row >= seq.seqlen_k - first_key) {
      return;
    }
    const i32 split = tile.get(KeyTile::kFirstHead) % p.heads_per_group / p.heads_per_cta -
                      contributors(p, to.head_idx, to.qheads_per_head).first_cta;
    f32* strip = key_accum_rows<Cfg>(to.accum, kAccumColumns, p, seq, batch_idx,
                                     p.num_heads_q / to.qheads_per_head, to.head_idx, split,
                                     first_key + first_row) +
                 lane_idx * 4;
#pragma unroll
    for (i32 part = 0; part < kParts; ++part) {
#pragma unroll
      for (i32 i = 0; i < kRegs; i += 4) {
        const i32 fragment = (part * kRegs + i) / 4;
        if (fragment * 8 < kAccumColumns) {
          const f32(&d)[kRegs] = rD[part];
          const u32 words[4] = {f32_as_bits(d[i]), f32_as_bits(d[i + 1]), f32_as_bits(d[i + 2]),
                                f32_as_bits(d[i + 3])};
          st_global_v4(strip + fragment * kFragmentFloats, words);
        }
      }
    }
    return;
  }
  const i32 rows = tile.rows();
  u16* dst = static_cast<u16*>(to.gradient) + batch_idx * to.batch_stride +
             to.head_idx * to.head_stride +
             (seq.k_row + first_key + first_row + lane_idx / 4) * to.row_stride;
  constexpr i32 kFragments = kRegs / 4;  // of 8 columns, in a part
#pragma unroll
  for (i32 part = 0; part < kParts; ++part) {
#pragma unroll
    for (i32 j = 0; j < kFragments; j += 4) {
#pragma unroll
      for (i32 half = 0; half < 2; ++half) {  // rows lane / 4 and + 8
        u32 words[4];
#pragma unroll
        for (i32 n = 0; n < 4; ++n) {
          const i32 i = (j + n < kFragments ? j + n : j) * 4 + 2 * half;
          words[n] = pack2<Cfg::kBf16>(rD[part][i] * to.scale, rD[part][i + 1] * to.scale);
        }
        transpose_in_quad(words, lane_idx);
        const i32 fragment = j + lane_idx % 4, column = (part * kFragments + fragment) * 8;
        if (fragment < kFragments && first_row + lane_idx / 4 + 8 * half < rows) {
          store_eight<Cfg::kGradVectorBytes>(dst + 8 * half * to.row_stride + column, words,
                                             kHeadDim - column);
        }
      }
    }
  }
}

// first_row: as above.
DEVICE void store_dk(const DkSum& rDk, const BwdParams& p, const KeyTile& tile, i32 first_row,
                     i32 lane_idx) {
  griddepcontrol_wait();  // nothing is written before the launch ahead has ended
  const i32 head = tile.get(KeyTile::kFirstHead) / p.qhead_per_khead;
  const GradientPlace to{p.dk, p.dk_batch_stride, p.dk_head_stride, p.dk_row_stride, p.dk_accum,
                         head, p.qhead_per_khead, p.dqk_scale};
  store_gradient<Cfg::kHeadDimQk, Cfg::kAccumColumns>(rDk, p, tile, to, first_row, lane_idx);
}
DEVICE void store_dv(const DvSum& rDv, const BwdParams& p, const KeyTile& tile, i32 first_row,
                     i32 lane_idx) {
  griddepcontrol_wait();  // nothing is written before the launch ahead has ended
  const i32 head = tile.get(KeyTile::kFirstHead) / p.qhead_per_vhead;
  const GradientPlace to{p.dv, p.dv_batch_stride, p.dv_head_stride, p.dv_row_stride, p.dv_accum,
                         head, p.qhead_per_vhead, p.dv_scale};
  store_gradient<Cfg::kHeadDimV, Cfg::kVColumns>(rDv, p, tile, to, first_row, lane_idx);
}
