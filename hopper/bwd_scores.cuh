// Products and elementwise part of hopper/bwd.cu on tiles of 64 keys x kM queries, transposed: keys
// are rows. S^T -> P^T, dP^T -> dS^T. Included by bwd.cu only.
// Change elsewhere: mask rules -> mask.cuh, softcap and ALiBi -> score.cuh, dropout ->
// dropout_transposed.cuh.
#pragma once
#include "common/device/dropout_transposed.cuh"
#include "common/device/row_io.cuh"
#include "common/device/score.cuh"
#include "common/ptx/wgmma.cuh"
#include "hopper/bwd_layout.cuh"

using MaybeDropout = TransposedDropout<Cfg::kDropout>;

// Of a product's accumulator: element i of a lane is at row lane / 4 + row_of(i) of its warp's 16
// and at column 2 * (lane % 4) + col_of(i).
constexpr DEVICE i32 row_of(i32 i) { return i / 2 % 2 * 8; }
constexpr DEVICE i32 col_of(i32 i) { return i / 4 * 8 + i % 2; }

// rS = A B^T, and with kAux minus lse or D. a: shared address of 64 rows of K or V. b: of a tile of
// Q or dO. aux: of the rows that the constant ones are multiplied by.
template <i32 kHeadDim, bool kAux>
DEVICE void issue_scores(f32 (&rS)[kRegsS], u32 a, u32 b, u32 ones, u32 aux) {
  const u64 desc_a = Chunk::k_major(a), desc_b = Chunk::k_major(b);
#pragma unroll
  for (i32 k = 0; k < ceil_div(kHeadDim, 16); ++k) {
    wgmma_ss<Cfg::kBf16, false>(
        rS, wgmma_desc_advance(desc_a, Chunk::k_major_step(k, kKeyChunkBytes)),
        wgmma_desc_advance(desc_b, Chunk::k_major_step(k, kQueryChunkBytes)), k > 0);
  }
  if constexpr (kAux) {
    wgmma_ss<Cfg::kBf16, false>(rS, Aux::k_major(ones), Aux::k_major(aux), true);
  }
  wgmma_commit_group();
}

// rD += A B: A = P^T or dS^T of 64 keys, B = rows of dO or Q.
template <i32 kParts, i32 kRegs>
DEVICE void issue_gradient(f32 (&rD)[kParts][kRegs], const Packed& rA, u32 b) {
#pragma unroll
  for (i32 part = 0; part < kParts; ++part) {
    const u32 first_chunk = u32(part * (2 * kRegs / Chunk::kCols)) * kQueryChunkBytes;
    const u64 desc_b = Chunk::mn_major(b + first_chunk, kQueryChunkBytes);
#pragma unroll
    for (i32 k = 0; k < kStepsM; ++k) {
      wgmma_rs<Cfg::kBf16, true>(rD[part], rA[k],
                                 wgmma_desc_advance(desc_b, Chunk::mn_major_step(k)), true);
    }
  }
  wgmma_commit_group();
}

template <i32 kParts, i32 kRegs>
DEVICE void hold(f32 (&rD)[kParts][kRegs]) {
#pragma unroll
  for (i32 part = 0; part < kParts; ++part) {
    wgmma_hold(rD[part]);
  }
}

template <i32 kParts, i32 kRegs>
DEVICE void clear(f32 (&rD)[kParts][kRegs]) {
#pragma unroll
  for (i32 part = 0; part < kParts; ++part) {
#pragma unroll
    for (i32 i = 0; i < kRegs; ++i) {
      rD[part][i] = 0.0f;
    }
  }
}

// lse or D of 16 queries for this lane: [0], [1]: of its first two columns, [2], [3]: 8 further.
DEVICE void load_stats(f32 (&stats)[4], u32 stage, i32 k, i32 lane_idx) {
  u32 words[4];
  ld_shared_v4(words, stage + stat_offset(16 * k + 2 * (lane_idx % 4)));
#pragma unroll
  for (i32 i = 0; i < 4; ++i) {
    stats[i] = bits_as_f32(words[i]);
  }
}

// A warp's part of S^T: 16 keys, kM queries.
struct ScoreTile {
  const HopperBwdParams& p;
  const KeyTile& tile;
  i32 row;  // first key, from the tile's first
  i32 lane_idx;

  // rS: S^T -> P^T. rP: P^T as dV sees it. rX: as dS^T sees it: times softcap's derivative, sign
  // bit set where dropped; the same as rP without these. lse: of the tile's queries, if not in S^T.
  DEVICE void finish_scores(f32 (&rS)[kRegsS], Packed& rP, Packed& rX, i32 head, i32 m_block,
                            u32 lse) const {
    if constexpr (Cfg::kCausal || Cfg::kLocal || Cfg::kChunk) {
      if (tile.masked(m_block)) {
        if constexpr (Cfg::kSoftcap) {  // which makes any score finite
          finish<true>(rS, rP, rX, head, m_block, lse);
          return;
        }
        hide(rS, m_block);
      }
    }
    finish<false>(rS, rP, rX, head, m_block, lse);
  }

  // Scores that a mask hides become what the scale turns into minus infinity. Apart from the rest,
  // which needs no second version then: with two, steps without a mask were 13 % slower.
  DEVICE void hide(f32 (&rS)[kRegsS], i32 m_block) const {
    const SeqlenInfo seq = tile.seq();
    const i32 first_row = tile.get(KeyTile::kFirstKey) + row + lane_idx / 4;
    const i32 query = m_block * kM + 2 * (lane_idx % 4);
    const f32 hidden = bits_as_f32(p.softmax_scale_log2 > 0.0f ? 0xff800000u : 0x7f800000u);
#pragma unroll
    for (i32 r = 0; r < 2; ++r) {
      const QueryRange range = key_queries<Cfg>(p, seq, first_row + 8 * r);
      const i32 begin = range.begin - query, end = range.end - query;
#pragma unroll
      for (i32 i = 2 * r; i < kRegsS; i += 4) {
#pragma unroll
        for (i32 j = i; j < i + 2; ++j) {
          rS[j] = col_of(j) >= begin && col_of(j) < end ? rS[j] : hidden;
        }
      }
    }
  }

  template <bool kMasked>
  DEVICE void finish(f32 (&rS)[kRegsS], Packed& rP, Packed& rX, i32 head, i32 m_block,
                     u32 lse) const {
    const i32 batch_idx = kNeedsPlace ? tile.get(KeyTile::kBatchIdx) : 0;
    const i32 key = tile.get(KeyTile::kFirstKey) + row;
    const Score<Cfg> score(p, batch_idx, head);
    const MaybeDropout dropout(p, batch_idx, head);
    const i32 first_query = m_block * kM, query = first_query + 2 * (lane_idx % 4);
    const i32 first_row = key + lane_idx / 4;
    const i32 diagonal = Cfg::kAlibi ? tile.seq().diagonal : 0;
    // P of keys behind the last must be 0, their K and V are.
    const i32 seqlen_k = tile.get(KeyTile::kSeqlenK);
    const f32 bias[2] = {first_row < seqlen_k ? 0.0f : bits_as_f32(0xff800000u),
                         first_row + 8 < seqlen_k ? 0.0f : bits_as_f32(0xff800000u)};
    QueryRange visible[2];
    if constexpr (kMasked) {
      const SeqlenInfo seq = tile.seq();
      visible[0] = key_queries<Cfg>(p, seq, first_row);
      visible[1] = key_queries<Cfg>(p, seq, first_row + 8);
    }
#pragma unroll
    for (i32 k = 0; k < kStepsM; ++k) {
      const auto kept = dropout.template strip<1>(first_query + 16 * k, key, lane_idx);
      f32 stats[4] = {};
      if constexpr (!Cfg::kAuxLse) {
        load_stats(stats, lse, k, lane_idx);
      }
      f32 for_ds[8];
#pragma unroll
      for (i32 e = 0; e < 8; ++e) {
        f32& x = rS[8 * k + e];
        const i32 column = query + 16 * k + col_of(e);
        f32 derivative = 1.0f;
        if constexpr (Score<Cfg>::kPrescaled) {
          x = score.with_derivative(x, column + diagonal, first_row + row_of(e), derivative);
        }
        x = x * score.to_log2() + bias[row_of(e) / 8];
        x = ex2_approx(Cfg::kAuxLse ? x : x - stats[e / 4 * 2 + e % 2]);
        if constexpr (kMasked) {
          const QueryRange& range = visible[row_of(e) / 8];
          x = column >= range.begin && column < range.end ? x : 0.0f;
        }
        for_ds[e] = Cfg::kSoftcap ? x * derivative : x;
        if constexpr (Cfg::kDropout) {
          const bool keep = kept.keep(0, e / 4, e % 4);
          x = keep ? x : 0.0f;
          for_ds[e] = keep ? for_ds[e] : -for_ds[e];
        }
      }
#pragma unroll
      for (i32 i = 0; i < 4; ++i) {
        rP[k][i] = pack2<Cfg::kBf16>(rS[8 * k + 2 * i], rS[8 * k + 2 * i + 1]);
        rX[k][i] = kOnePacked ? 0 : pack2<Cfg::kBf16>(for_ds[2 * i], for_ds[2 * i + 1]);
      }
      wgmma_pin(rP[k]);
      if constexpr (kOnePacked) {
#pragma unroll
        for (i32 i = 0; i < 4; ++i) {
          rX[k][i] = rP[k][i];
        }
      }
    }
  }

  // dS^T = P^T * (dP^T - D), times ds_scale. rX: of finish_scores. d: of the tile's queries, if not
  // in dP^T.
  DEVICE void finish_ds(Packed& rDs, const Packed& rX, const f32 (&rDp)[kRegsS], u32 d) const {
#pragma unroll
    for (i32 k = 0; k < kStepsM; ++k) {
      f32 stats[4] = {};
      if constexpr (!Cfg::kAuxD) {
        load_stats(stats, d, k, lane_idx);
      }
#pragma unroll
      for (i32 i = 0; i < 4; ++i) {
        const i32 e = 8 * k + 2 * i, of_query = i / 2 * 2;
        rDs[k][i] = pack2<Cfg::kBf16>(
            ds(low_as_f32<Cfg::kBf16>(rX[k][i]), rDp[e], stats[of_query]),
            ds(high_as_f32<Cfg::kBf16>(rX[k][i]), rDp[e + 1], stats[of_query + 1]));
      }
    }
  }

  static constexpr bool kOnePacked = !Cfg::kSoftcap && !Cfg::kDropout;
  static constexpr bool kNeedsPlace = Cfg::kAlibi || Cfg::kDropout;

 private:
  DEVICE f32 ds(f32 x, f32 dp, f32 d) const {
    return Cfg::kScaleDs ? unscaled_ds(x, dp, d) * p.ds_scale : unscaled_ds(x, dp, d);
  }
  DEVICE f32 unscaled_ds(f32 x, f32 dp, f32 d) const {
    if constexpr (Cfg::kDropout) {  // the factor keep_scale of dP waits in dqk_scale
      const bool keep = (f32_as_bits(x) >> 31) == 0;
      return fabsf(x) * ((keep ? dp : 0.0f) - d * p.keep_probability);
    } else if constexpr (Cfg::kAuxD) {
      return x * dp;
    } else {
      return x * (dp - d);
    }
  }
};

// dS^T of 64 keys as the A of dQ: a tile whose rows are queries.
DEVICE void store_ds(u32 tile, const Packed& rDs, const Warp& warp) {
  const i32 row = warp.lane_idx / 16 * 8 + warp.lane_idx % 8;
  const u32 first = Chunk::unit_address(tile, row, warp.warp_idx * 2 + warp.lane_idx / 8 % 2);
#pragma unroll
  for (i32 k = 0; k < kStepsM; ++k) {
    stmatrix_x4_trans(first + u32(k * 16 * 128), rDs[k][0], rDs[k][1], rDs[k][2], rDs[k][3]);
  }
  fence_proxy_async_shared();
}
