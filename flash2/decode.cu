// flash2/decode.cu: attention of few query rows over a KV cache, sm_80 and up. Launched by
// flash2/decode.py. Bound by reading the cache: nothing waits for the whole CTA between its first
// and last tile. CTA: kNumTeams teams of kRowWarps * kColWarps warps. A team owns every
// kNumTeams-th key tile of the CTA's split and copies it through a ring of its own. Its warps share
// the tile: each has 16 * kMTiles packed query rows and one of kColWarps parts of the columns of V.
// With qv, the scores are Q K^T + Qv V^T: V's tile is also a second K. Each of the warps that share
// rows multiplies its part of the columns, and they add up what they got before the softmax. The
// teams' results are merged at the end; those of the splits by the last CTAs that finish one.
// Change here: pipeline, scores. Change elsewhere: who has which rows and columns, shared memory ->
// decode_layout.cuh, products by warpgroups (Cfg::kWgmma) -> decode_wgmma.cuh, merges ->
// decode_output.cuh, what a CTA works on -> decode_work.cuh, pages -> paged_rows.cuh, tile sizes ->
// decode_tiles.py, the number of splits -> decode_splits.py.
#include "prelude.cuh"  // generated for this problem: struct Cfg

#include "flash2/device/decode_work.cuh"
#include "flash2/device/gemm.cuh"
#include "flash2/device/paged_rows.cuh"
#include "common/device/score.cuh"
#include "common/device/softmax.cuh"
#include "common/ptx/barrier.cuh"
#include "flash2/device/decode_layout.cuh"
#include "flash2/device/decode_output.cuh"
#include "flash2/device/decode_wgmma.cuh"

template <class Layout, i32 kHeadDim, i32 kThreads, bool kReadOnce = false>
using Rows =
    TileCopy<Layout, kHeadDim, kThreads, Cfg::kVectorBytes, Cfg::kWideRowStrides, kReadOnce>;
using CopyQ = PackedRowsCopy<Rows<LayoutQ, Cfg::kHeadDimQk, Cfg::kNumThreads>>;
using CopyQv = PackedRowsCopy<Rows<LayoutQv, Cfg::kHeadDimV, Cfg::kNumThreads>>;
using RowsK = Rows<LayoutK, Cfg::kHeadDimQk, kTeamThreads, Cfg::kReadOnce>;
using RowsV = Rows<LayoutV, Cfg::kHeadDimV, kTeamThreads, Cfg::kReadOnce>;
using CopyK = Select<Cfg::kPaged, LookedUpCopy<RowsK>, RowsK>;
using CopyV = Select<Cfg::kPaged, LookedUpCopy<RowsV>, RowsV>;

// What a warp carries from tile to tile.
struct WarpState {
  f32 rO[kMTiles][kNTilesO][4];
  OnlineSoftmax<kMTiles> softmax;
  u32 rQ[Cfg::kQInRegisters ? kMTiles : 1][Cfg::kQInRegisters ? kStepsQ : 1][4];  // Q, then Qv
};

// What differs between the rows of a lane, [m][r] as in OnlineSoftmax.
struct LaneRows {
  KeyRange keys[kMTiles][2];
  i32 aligned[kMTiles][2];  // the key on the row's diagonal
  f32 slope_log2[kMTiles][2];

  DEVICE LaneRows(const DecodeParams& p, const DecodeWork& work, const Lane& lane) {
#pragma unroll
    for (i32 m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (i32 r = 0; r < 2; ++r) {
        const i32 row = work.first_row + lane.row(m, 2 * r);
        const i32 token = divide(row, p.by_heads_per_unit);
        keys[m][r] = row_keys<Cfg>(p, work.seq, token);
        aligned[m][r] = token + work.seq.diagonal;
        if constexpr (Cfg::kAlibi) {
          const i32 head = work.first_head + row - token * p.heads_per_unit;
          slope_log2[m][r] = Score<Cfg>(p, work.batch_idx, head).slope_log2;
        }
      }
    }
  }
};

// The team's ring of key tiles. Tile i of the team is tile `first + i * kNumTeams` of the sequence.
// Each tile is one cp.async group; groups are committed past the last tile too, empty, so that the
// number in flight is a constant.
struct Ring {
  CopyK copy_k;
  CopyV copy_v;
  PageTable table;
  i32 first, count;
  i32 num_keys, lane_idx;
  u32 smem;

  DEVICE u32 sK(i32 i) const {
    return smem + u32((i + Smem::kFirstStage) % Cfg::kNumStages) * Smem::kStageBytes;
  }
  DEVICE u32 sV(i32 i) const { return sK(i) + LayoutK::kBytes; }
  DEVICE i32 tile(i32 i) const { return first + i * kNumTeams; }
  DEVICE i32 first_key(i32 i) const { return tile(i) * Cfg::kBlockN; }

  using Pages = TilePages<Cfg::kBlockN>;
  DEVICE void look_up(Pages& pages, i32 i) const {
    if constexpr (Cfg::kPaged) {
      pages.look_up(table, first_key(i), i < count ? num_keys : 0, lane_idx);
    }
  }
  // Loads tile i. Keys past the last become zeros: what lies there may be NaN.
  DEVICE void copy(const Pages& pages, i32 i) const {
    if (i < count) {
      load_rows(copy_k, sK(i), pages, i);
      load_rows(copy_v, sV(i), pages, i);
    }
  }
  DEVICE void load(const Pages& pages, i32 i) const {
    copy(pages, i);
    cp_async_commit_group();
  }

 private:
  template <class Copy>
  DEVICE void load_rows(const Copy& copy, u32 s_tile, const Pages& pages, i32 i) const {
    if constexpr (Cfg::kPaged) {
      copy.load(s_tile, first_key(i), num_keys, table, pages);
    } else {
      copy.load(s_tile, first_key(i), num_keys);
    }
  }
};

// The warp's operands A of the scores: its rows and part of the depth of Q, and of Qv.
struct QueryTile {
  u32 sQ_lane, sQv_lane;

  DEVICE QueryTile(const Lane& lane, u32 smem)
      : sQ_lane(smem + Smem::kQ + u32(lane.warp_row * LayoutQ::kRowBytes) +
                lane_offset_a<LayoutQ>(lane.lane_idx)),
        sQv_lane(smem + Smem::kQv + u32(lane.warp_row * LayoutQv::kRowBytes) +
                 lane_offset_a<LayoutQv>(lane.lane_idx) + u32(lane.warp_col * kElemBytes)) {
    if constexpr (Cfg::kQv) {
      sQ_lane += u32(lane.col_warp * kDepthQk * kElemBytes);
    }
  }
  // Depth step k of row tile m: first those of Q, then those of Qv.
  DEVICE void load(u32 (&rA)[4], i32 m, i32 k) const {
    if (k < kDepthQk / 16) {
      load_a<LayoutQ>(rA, sQ_lane, m, k);
    } else {
      load_a<LayoutQv>(rA, sQv_lane, m, k - kDepthQk / 16);
    }
  }
};

DEVICE void load_q(WarpState& state, const QueryTile& query) {
#pragma unroll
  for (i32 m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (i32 k = 0; k < kStepsQ; ++k) {
      query.load(state.rQ[m][k], m, k);
    }
  }
}

// Scale, softcap and ALiBi, and the mask where `masked`.
DEVICE void finish_scores(f32 (&rS)[kMTiles][kNTilesS][4], const LaneRows& rows, Score<Cfg> score,
                          const Lane& lane, i32 first_key, bool masked) {
#pragma unroll
  for (i32 m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (i32 n = 0; n < kNTilesS; ++n) {
#pragma unroll
      for (i32 e = 0; e < 4; ++e) {
        if constexpr (Score<Cfg>::kPrescaled) {
          if constexpr (Cfg::kAlibi) {
            score.slope_log2 = rows.slope_log2[m][e / 2];
          }
          rS[m][n][e] = score(rS[m][n][e], rows.aligned[m][e / 2], first_key + lane.col(n, e));
        }
      }
    }
  }
  if (masked) {
#pragma unroll
    for (i32 m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (i32 n = 0; n < kNTilesS; ++n) {
#pragma unroll
        for (i32 e = 0; e < 4; ++e) {
          const KeyRange& keys = rows.keys[m][e / 2];
          const i32 key = first_key + lane.col(n, e);
          const bool visible =
              key < keys.end && (!(Cfg::kLocal || Cfg::kChunk) || key >= keys.begin);
          rS[m][n][e] = visible ? rS[m][n][e] : bits_as_f32(kNegInfBits);
        }
      }
    }
  }
}

// rS becomes the sum over the warps that share its rows, each of which has a part of the depth; in
// the same order in each, so that all go on with the same bits.
DEVICE void sum_scores(f32 (&rS)[kMTiles][kNTilesS][4], const Lane& lane, u32 smem) {
  const u32 s_lane = smem + Smem::kScores +
                     u32(lane.team_idx * kTeamThreads / 32) * Smem::kScoresBytes +
                     u32(lane.lane_idx * 16);
  const auto address = [&](i32 col_warp, i32 m, i32 n) {
    return s_lane + u32(col_warp * kRowWarps + lane.row_warp) * Smem::kScoresBytes +
           u32((m * kNTilesS + n) * 32 * 16);
  };
#pragma unroll
  for (i32 m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (i32 n = 0; n < kNTilesS; ++n) {
      const u32 words[4] = {f32_as_bits(rS[m][n][0]), f32_as_bits(rS[m][n][1]),
                            f32_as_bits(rS[m][n][2]), f32_as_bits(rS[m][n][3])};
      st_shared_v4(address(lane.col_warp, m, n), words);
    }
  }
  lane.row_sync();
#pragma unroll
  for (i32 m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (i32 n = 0; n < kNTilesS; ++n) {
      if constexpr (kColWarps == 2) {  // a sum of two is the same in either order
        u32 words[4];
        ld_shared_v4(words, address(1 - lane.col_warp, m, n));
#pragma unroll
        for (i32 e = 0; e < 4; ++e) {
          rS[m][n][e] += bits_as_f32(words[e]);
        }
      } else {
        u32 words[kColWarps][4];
#pragma unroll
        for (i32 c = 0; c < kColWarps; ++c) {
          ld_shared_v4(words[c], address(c, m, n));
        }
#pragma unroll
        for (i32 e = 0; e < 4; ++e) {
          rS[m][n][e] = bits_as_f32(words[0][e]);
#pragma unroll
          for (i32 c = 1; c < kColWarps; ++c) {
            rS[m][n][e] += bits_as_f32(words[c][e]);
          }
        }
      }
    }
  }
}

// The warp's part of the scores of a key tile: of all columns, or of its own if the scores are
// summed.
DEVICE void multiply_keys(f32 (&rS)[kMTiles][kNTilesS][4], const WarpState& state, const Lane& lane,
                          const QueryTile& query, u32 sK, u32 sV) {
  const auto each_step = [](i32) {};
  const auto load = [&](u32(&rA)[4], i32 m, i32 k) {
    if constexpr (Cfg::kQInRegisters) {
#pragma unroll
      for (i32 i = 0; i < 4; ++i) {
        rA[i] = state.rQ[m][k][i];
      }
    } else {
      query.load(rA, m, k);
    }
  };
  clear(rS);
  const i32 first_col = Cfg::kQv ? lane.col_warp * kDepthQk : 0;
  gemm_abt<Cfg::kBf16, LayoutK, kDepthQk>(
      rS, LayoutK::moved(sK + lane_offset_b<LayoutK>(lane.lane_idx), 0, first_col * kElemBytes),
      load, each_step);
  if constexpr (Cfg::kQv) {
    gemm_abt<Cfg::kBf16, LayoutV, kDepthQv>(
        rS,
        LayoutV::moved(sV + lane_offset_b<LayoutV>(lane.lane_idx), 0, lane.warp_col * kElemBytes),
        [&](u32(&rA)[4], i32 m, i32 k) { load(rA, m, kDepthQk / 16 + k); }, each_step);
  }
}

// O += P V of a key tile, the warp's columns.
DEVICE void multiply_values(WarpState& state, const f32 (&rP)[kMTiles][kNTilesS][4],
                            const Lane& lane, u32 sV) {
  gemm_ab<Cfg::kBf16, LayoutV, Cfg::kBlockN>(
      state.rO,
      LayoutV::moved(sV + lane_offset_b_trans<LayoutV>(lane.lane_idx), 0,
                     lane.warp_col * kElemBytes),
      [&](u32(&rA)[4], i32 m, i32 k) { accumulator_as_a<Cfg::kBf16>(rA, rP, m, k); }, [](i32) {});
}

// One key tile of the team. meanwhile(): called with WGMMA only, while it computes scores.
template <class Meanwhile>
DEVICE void step(WarpState& state, const LaneRows& rows, const Score<Cfg>& score, const Lane& lane,
                 const QueryTile& query, u32 smem, u32 sK, u32 sV, i32 first_key, bool masked,
                 Meanwhile meanwhile) {
  f32 rS[kMTiles][kNTilesS][4];
  if constexpr (Cfg::kWgmma) {
    wgmma_multiply_keys<LayoutQ, LayoutQv, LayoutK, LayoutV>(rS, state.rQ, lane, smem, sK, sV,
                                                             meanwhile);
  } else {
    multiply_keys(rS, state, lane, query, sK, sV);
  }
  if constexpr (kSumsScores) {
    sum_scores(rS, lane, smem);
  }
  finish_scores(rS, rows, score, lane, first_key, masked);
  state.softmax.update(rS, state.rO, score.to_log2());
  if constexpr (Cfg::kWgmma) {
    wgmma_multiply_values<LayoutV>(state.rO, rS, lane, sV);
  } else {
    multiply_values(state, rS, lane, sV);
  }
}

// First element of one head of one sequence.
DEVICE const void* head_base(const void* base, i64 offset) {
  return static_cast<const char*>(base) + offset * kElemBytes;
}

template <class Copy>
DEVICE Copy key_copy(const DecodeWork& work, const void* base, i64 cache_row, i64 batch_stride,
                     i64 row_stride, i64 head_offset, i32 team_thread) {
  if constexpr (Cfg::kPaged) {
    return Copy(head_base(base, head_offset), batch_stride, row_stride, team_thread);
  } else {
    return Copy(
        head_base(base, cache_row * batch_stride + head_offset + work.seq.k_row * row_stride),
        row_stride, team_thread);
  }
}

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm)
flash2_decode(GRID_CONSTANT DecodeParams p) {
  const Lane lane;
  const DecodeWork work = decode_work<Cfg>(p, lane.lane_idx);
  const SeqlenInfo& seq = work.seq;
  if (work.first_row >= seq.slot_q * p.heads_per_unit) {
    return;  // a tile past the end of a packed buffer
  }
  const u32 smem = smem_base();
  const TileRange tiles = split_tiles<Cfg, kNumTeams>(p, work);
  const i64 row = cache_row<Cfg>(p, work.batch_idx);
  const i32 first = tiles.begin + lane.team_idx;
  const i32 team_tiles = ceil_div(imax(tiles.end - first, 0), kNumTeams);
  const Ring ring{
      key_copy<CopyK>(work, p.k, row, p.k_batch_stride, p.k_row_stride,
                      divide(work.first_head, p.by_khead) * p.k_head_stride, lane.team_thread),
      key_copy<CopyV>(work, p.v, row, p.v_batch_stride, p.v_row_stride,
                      divide(work.first_head, p.by_vhead) * p.v_head_stride, lane.team_thread),
      PageTable(p, row, seq.k_row),
      first,
      team_tiles,
      seq.seqlen_k,
      lane.lane_idx,
      smem + Smem::kRings + u32(lane.team_idx * Cfg::kNumStages) * Smem::kStageBytes};
  Ring::Pages pages[Cfg::kNumStages + 1];
#pragma unroll
  for (i32 i = 0; i < Cfg::kNumStages + 1; ++i) {
    ring.look_up(pages[i], i);
  }
  ring.copy(pages[0], 0);  // before Q, as these come from further away
  CopyQ(head_base(p.q, work.batch_idx * p.q_batch_stride + work.first_head * p.q_head_stride +
                           seq.q_row * p.q_row_stride),
        p.q_row_stride, p.q_head_stride, p.heads_per_unit, p.by_heads_per_unit, lane.thread_idx)
      .load(smem + Smem::kQ, work.first_row, seq.seqlen_q * p.heads_per_unit);
  if constexpr (Cfg::kQv) {
    CopyQv(head_base(p.qv, work.batch_idx * p.qv_batch_stride + work.first_head * p.qv_head_stride +
                               seq.q_row * p.qv_row_stride),
           p.qv_row_stride, p.qv_head_stride, p.heads_per_unit, p.by_heads_per_unit,
           lane.thread_idx)
        .load(smem + Smem::kQv, work.first_row, seq.seqlen_q * p.heads_per_unit);
  }
  cp_async_commit_group();
  constexpr i32 kFirstLoads = Cfg::kNumStages - (Cfg::kWgmma ? 1 : 0);
#pragma unroll
  for (i32 i = 1; i < kFirstLoads; ++i) {
    ring.load(pages[i], i);
  }
  Ring::Pages& next = pages[Cfg::kNumStages];  // of the tile to be loaded next

  const LaneRows rows(p, work, lane);
  const Score<Cfg> score(p, work.batch_idx, work.first_head);
  const QueryTile query(lane, smem);
  WarpState state;
  clear(state.rO);
  cp_async_wait_group<kFirstLoads - 1>();
  if constexpr (Cfg::kWgmma) {
    fence_proxy_async_shared();
  }
  cta_sync();  // tile 0, Q and Qv have landed
  if constexpr (Cfg::kWgmma) {
    wgmma_load_q<LayoutQv>(state.rQ, lane, smem);
    cta_sync();  // all have: the last stage is free
    ring.load(pages[kFirstLoads], kFirstLoads);
  } else if constexpr (Cfg::kQInRegisters) {
    load_q(state, query);
  }

  // Loads a tile to the place of tile i, with which the team is done.
  const auto refill = [&](i32 i) {
    ring.load(next, i + Cfg::kNumStages);
    ring.look_up(next, i + Cfg::kNumStages + 1);  // a whole step before it is needed
  };
  for (i32 i = 0; i < ring.count; ++i) {
    const i32 tile = ring.tile(i);
    step(state, rows, score, lane, query, smem, ring.sK(i), ring.sV(i), tile * Cfg::kBlockN,
         tile < tiles.interior_begin || tile >= tiles.interior_end, [&] {
           if (i > 0) {
             refill(i - 1);
           }
         });
    if (Cfg::kWgmma || !p.refill_first) {
      cp_async_wait_group<Cfg::kNumStages - 2>();
    }
    if constexpr (Cfg::kWgmma) {
      fence_proxy_async_shared();
    }
    lane.team_sync();  // the team is done with tile i; unless refill_first, i + 1 has landed
    if constexpr (!Cfg::kWgmma) {
      refill(i);
      if (p.refill_first) {
        cp_async_wait_group<Cfg::kNumStages - 1>();
        lane.team_sync();
      }
    }
  }

  cp_async_wait_group<0>();
  cta_sync();  // all are done with shared memory: the merge may overlay it
  hand_over(state.rO, state.softmax, lane, smem, score.to_log2());
  cta_sync();
  store_output(p, work, lane, smem);
  if constexpr (Cfg::kSplit) {
    if (p.split_counters != nullptr) {
      merge_splits(p, work, lane, smem);
    }
  }
}
