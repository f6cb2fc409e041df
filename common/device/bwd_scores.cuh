// Elementwise part of bwd.cu's step on transposed tiles: S^T -> P^T, dP^T -> dS^T, and their way to
// shared memory. Change elsewhere: mask rules -> mask.cuh, softcap and ALiBi -> score.cuh, dropout
// -> dropout_transposed.cuh.
#pragma once
#include "common/device/bwd_warps.cuh"
#include "common/device/mask.cuh"
#include "common/device/score.cuh"

// Two neighbouring floats of shared memory.
DEVICE void load_pair(f32 (&pair)[2], u32 address) {
  const u64 bits = ld_shared_u64(address);
  pair[0] = bits_as_f32(u32(bits));
  pair[1] = bits_as_f32(u32(bits >> 32));
}

// rS: S^T -> P^T, times softcap's derivative, sign bit set where dropped. rP: P^T as dV sees it.
// query, key: of the warp's tile. sLse: of its first query.
template <bool kMasked>
DEVICE void finish_scores(Fragments<kMTilesS, kNTilesS>& rS, Packed& rP, const BwdParams& p,
                          const KeyWork& work, const Score<Cfg>& score, const MaybeDropout& dropout,
                          const Lane& lane, i32 query, i32 key, u32 sLse) {
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
          x = ex2_approx(x * score.to_log2() - lse[e % 2]);
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
      }
    }
  }
}

// rDs = dS^T = P^T * (dP^T - D). Without dropout rDp starts at -D, see start_dp.
DEVICE void finish_ds(Packed& rDs, const Fragments<kMTilesS, kNTilesS>& rS,
                      const Fragments<kMTilesS, kNTilesS>& rDp, const BwdParams& p,
                      const Lane& lane, u32 sD) {
#pragma unroll
  for (i32 n = 0; n < kNTilesS; ++n) {
    f32 d[2] = {0.0f, 0.0f};
    if constexpr (Cfg::kDropout) {
      load_pair(d, sD + u32(lane.col(n, 0)) * 4);
    }
#pragma unroll
    for (i32 m = 0; m < kMTilesS; ++m) {
      f32 ds[4];
#pragma unroll
      for (i32 e = 0; e < 4; ++e) {
        if constexpr (Cfg::kDropout) {  // the factor keep_scale of dP waits in dqk_scale
          const bool keep = (f32_as_bits(rS[m][n][e]) >> 31) == 0;
          ds[e] =
              fabsf(rS[m][n][e]) * ((keep ? rDp[m][n][e] : 0.0f) - d[e % 2] * p.keep_probability);
        } else {
          ds[e] = rS[m][n][e] * rDp[m][n][e];
        }
      }
      rDs[m][n][0] = pack2<Cfg::kBf16>(ds[0], ds[1]);
      rDs[m][n][1] = pack2<Cfg::kBf16>(ds[2], ds[3]);
    }
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
