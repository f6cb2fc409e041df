// Elementwise part of bwd.cu's step on transposed tiles: S^T -> P^T, dP^T -> dS^T, and their way to
// shared memory. Change elsewhere: mask rules -> mask.cuh, softcap and ALiBi -> score.cuh, dropout
// -> dropout_transposed.cuh.
#pragma once
#include "flash2/device/bwd_warps.cuh"
#include "common/device/mask.cuh"
#include "common/device/row_io.cuh"
#include "common/device/score.cuh"

// Two neighbouring floats of shared memory.
DEVICE void load_pair(f32 (&pair)[2], u32 address) {
  const u64 bits = ld_shared_u64(address);
  pair[0] = bits_as_f32(u32(bits));
  pair[1] = bits_as_f32(u32(bits >> 32));
}

struct NoFragment {
  DEVICE void operator()(i32, i32) const {}
};

// rS: S^T -> P^T * 2^kProbabilityShift, times softcap's derivative, sign bit set where dropped. rP:
// P^T as dV sees it. query, key: of the warp's tile. sLse: of its first query. done(m, n): fragment
// [m][n] is complete.
template <bool kMasked, class Done>
DEVICE void finish_scores(Fragments<kMTilesS, kNTilesS>& rS, Packed& rP, const BwdParams& p,
                          const KeyWork& work, const Score<Cfg>& score, const MaybeDropout& dropout,
                          const Lane& lane, i32 query, i32 key, u32 sLse, Done done) {
  QueryRange visible[kMTilesS][2];
  if constexpr (kMasked) {
#pragma unroll
    for (i32 m = 0; m < kMTilesS; ++m) {
      visible[m][0] = key_queries<Cfg>(p, work.seq, key + lane.row(m, 0));
      visible[m][1] = key_queries<Cfg>(p, work.seq, key + lane.row(m, 2));
    }
  }
#pragma unroll
  for (i32 n2 = 0; n2 < kNTilesS; n2 += 2) {
    const auto kept = dropout.strip<kMTilesS>(query + n2 * 8, key, lane.lane_idx);
#pragma unroll
    for (i32 n = n2; n < n2 + 2; ++n) {
      f32 lse[2];
      load_pair(lse, sLse + u32(lane.col(n, 0)) * 4);
#pragma unroll
      for (i32 m = 0; m < kMTilesS; ++m) {
        f32 probability[4];  // as dV sees it
#pragma unroll
        for (i32 e = 0; e < 4; ++e) {
          f32& x = rS[m][n][e];
          const i32 row = query + lane.col(n, e);
          f32 derivative = 1.0f;
          if constexpr (Score<Cfg>::kPrescaled) {
            x = score.with_derivative(x, row + work.seq.diagonal, key + lane.row(m, e), derivative);
          }
          x = ex2_approx(x * score.to_log2() - (lse[e % 2] - f32(Cfg::kProbabilityShift)));
          if constexpr (kMasked) {
            const QueryRange& range = visible[m][e / 2];
            x = row >= range.begin && row < range.end ? x : 0.0f;
          }
          probability[e] = x;
          if constexpr (Cfg::kSoftcap) {
            x *= derivative;
          }
          if constexpr (Cfg::kDropout) {
            const bool keep = kept.keep(m, n, e);
            probability[e] = keep ? probability[e] : 0.0f;
            x = keep ? x : -x;
          }
        }
        rP[m][n][0] = pack2<Cfg::kBf16>(probability[0], probability[1]);
        rP[m][n][1] = pack2<Cfg::kBf16>(probability[2], probability[3]);
        done(m, n);
      }
    }
  }
}

// sTile: of P^T or dS^T. query: of the warp's part.
DEVICE void store_packed(u32 sTile, const Packed& packed, const Lane& lane, i32 query) {
#pragma unroll
  for (i32 m = 0; m < kMTilesS; ++m) {
#pragma unroll
    for (i32 half = 0; half < 2; ++half) {
      const u32 row = sTile + u32((lane.s_key + lane.row(m, 2 * half)) * LayoutP::kRowBytes +
                                  query * kElemBytes);
#pragma unroll
      for (i32 n = 0; n < kNTilesS; ++n) {
        st_shared_u32(row + u32(lane.col(n, 0) * kElemBytes), packed[m][n][half]);
      }
    }
  }
}

// rDs = dS^T = P^T * (dP^T - D), times ds_scale. Without dropout rDp starts at -D, see start_dp.
// load(rP, m, n): fragments n and n + 1 of P^T as finish_scores leaves it.
template <class Load>
DEVICE void finish_ds(Packed& rDs, const Fragments<kMTilesS, kNTilesS>& rDp, const BwdParams& p,
                      const Lane& lane, u32 sD, Load load) {
#pragma unroll
  for (i32 n2 = 0; n2 < kNTilesS; n2 += 2) {
    f32 d[2][2] = {};
    if constexpr (Cfg::kDropout) {
      load_pair(d[0], sD + u32(lane.col(n2, 0)) * 4);
      load_pair(d[1], sD + u32(lane.col(n2 + 1, 0)) * 4);
    }
#pragma unroll
    for (i32 m = 0; m < kMTilesS; ++m) {
      f32 rP[2][4];
      load(rP, m, n2);
#pragma unroll
      for (i32 i = 0; i < 2; ++i) {
        f32 ds[4];
#pragma unroll
        for (i32 e = 0; e < 4; ++e) {
          const f32 x = rP[i][e], dp = rDp[m][n2 + i][e];
          if constexpr (Cfg::kDropout) {  // the factor keep_scale of dP waits in dqk_scale
            const bool keep = (f32_as_bits(x) >> 31) == 0;
            ds[e] = fabsf(x) * ((keep ? dp : 0.0f) - d[i][e % 2] * p.keep_probability);
          } else {
            ds[e] = x * dp;
          }
          if constexpr (Cfg::kScaleDs) {
            ds[e] *= p.ds_scale;
          }
        }
        rDs[m][n2 + i][0] = pack2<Cfg::kBf16>(ds[0], ds[1]);
        rDs[m][n2 + i][1] = pack2<Cfg::kBf16>(ds[2], ds[3]);
      }
    }
  }
}

// A fragment of P^T on its way to the warp that has the same part of dP^T, at the place of dS^T:
// fp16, which loses nothing against the rounding of dS^T that follows. sX_lane: of this lane's
// first element.
DEVICE void store_handoff(u32 sX_lane, const f32 (&x)[4], i32 m, i32 n) {
  const u32 address = sX_lane + u32(m * 16 * LayoutP::kRowBytes + n * 16);
  st_shared_u32(address, cvt_f16x2(x[0], x[1]));
  st_shared_u32(address + 8 * LayoutP::kRowBytes, cvt_f16x2(x[2], x[3]));
}

// Fragments n and n + 1 of what store_handoff stored. sX_lane: lane_offset_a of the warp's part.
DEVICE void load_handoff(f32 (&rP)[2][4], u32 sX_lane, i32 m, i32 n) {
  u32 words[4];
  load_a<LayoutP>(words, sX_lane, m, n / 2);
#pragma unroll
  for (i32 i = 0; i < 4; ++i) {
    rP[i / 2][i % 2 * 2] = low_as_f32<false>(words[i]);
    rP[i / 2][i % 2 * 2 + 1] = high_as_f32<false>(words[i]);
  }
}

DEVICE void start_dp(Fragments<kMTilesS, kNTilesS>& rDp, const Lane& lane, u32 sD) {
  if constexpr (Cfg::kDropout) {
    clear(rDp);
    return;
  }
#pragma unroll
  for (i32 n = 0; n < kNTilesS; ++n) {
    f32 d[2];
    load_pair(d, sD + u32(lane.col(n, 0)) * 4);
#pragma unroll
    for (i32 m = 0; m < kMTilesS; ++m) {
      rDp[m][n][0] = rDp[m][n][2] = -d[0];
      rDp[m][n][1] = rDp[m][n][3] = -d[1];
    }
  }
}
