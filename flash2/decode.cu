// flash2/decode.cu: attention of few query rows over a KV cache, sm_80 and up. Launched by
// flash2/decode.py. Bound by reading the cache: nothing waits for the whole CTA between its first
// and last tile. CTA: kNumTeams teams of kRowWarps * kColWarps warps. A team owns every
// kNumTeams-th key tile of the CTA's split and copies it through a ring of its own. Its warps share
// the tile: each has 16 * kMTiles packed query rows and one of kColWarps parts of the columns of V.
// The teams' results are merged at the end; those of the splits by the last CTA that finishes one.
// Change here: pipeline, merges, epilogue. Change elsewhere: what a CTA works on ->
// decode_work.cuh, pages -> paged_rows.cuh, weights of splits -> split_merge.cuh, tile sizes and
// the number of splits -> decode_tiles.py.
#include "prelude.cuh"  // generated for this problem: struct Cfg

#include "common/device/decode_work.cuh"
#include "common/device/gemm.cuh"
#include "common/device/paged_rows.cuh"
#include "common/device/score.cuh"
#include "common/device/softmax.cuh"
#include "common/device/split_merge.cuh"
#include "common/ptx/barrier.cuh"

using LayoutQ = TileLayout<Cfg::kBlockM, Cfg::kHeadDimQk>;
using LayoutK = TileLayout<Cfg::kBlockN, Cfg::kHeadDimQk>;
using LayoutV = TileLayout<Cfg::kBlockN, Cfg::kHeadDimV, 16 * Cfg::kColWarps>;

constexpr i32 kNumTeams = Cfg::kNumTeams;
constexpr i32 kRowWarps = Cfg::kRowWarps;
constexpr i32 kColWarps = Cfg::kColWarps;
constexpr i32 kTeamThreads = 32 * kRowWarps * kColWarps;
constexpr i32 kMTiles = Cfg::kBlockM / (16 * kRowWarps);
constexpr i32 kNTilesS = Cfg::kBlockN / 8;
constexpr i32 kWarpCols = LayoutV::kCols / kColWarps;
constexpr i32 kNTilesO = kWarpCols / 8;
constexpr i32 kDepthQk = LayoutQ::kCols;
static_assert(Cfg::kNumThreads == kNumTeams * kTeamThreads);
static_assert(Cfg::kBlockM == 16 * kRowWarps * kMTiles && Cfg::kNumStages >= 2);

// Shared memory in address order. What the teams hand over for their merge overlays all of it, and
// so does the merge of the splits after that.
struct Smem {
  static constexpr u32 kStageBytes = LayoutK::kBytes + LayoutV::kBytes;
  static constexpr u32 kQ = 0;
  static constexpr u32 kRings = kQ + LayoutQ::kBytes;  // [team][stage]: K tile, V tile
  static constexpr u32 kRingsEnd = kRings + kNumTeams * Cfg::kNumStages * kStageBytes;
  // [team][row][column] of O, fp32. The padding puts the rows that a store touches in other banks.
  static constexpr u32 kORowBytes = (LayoutV::kCols + 8) * 4;
  static constexpr u32 kO = 0;
  static constexpr u32 kStats =
      kO + kNumTeams * Cfg::kBlockM * kORowBytes;  // [team][row]: maximum (log2), sum
  static constexpr u32 kMergeEnd = kStats + kNumTeams * Cfg::kBlockM * 8;
  // What the last CTA of a tile needs to merge the splits: [warp][split].
  static constexpr u32 kSplitWeights = 0;
  static constexpr u32 kSplitsEnd = Cfg::kNumThreads / 32 * kMaxSplits * 4;
  static constexpr u32 kTeamsEnd = kRingsEnd > kMergeEnd ? kRingsEnd : kMergeEnd;
  static constexpr u32 kBytes = kTeamsEnd > kSplitsEnd ? kTeamsEnd : kSplitsEnd;
};
static_assert(Smem::kBytes == Cfg::kSmemBytes,
              "flash2/decode_tiles.py and this file agree on shared memory");

using RowStride = Select<Cfg::kWideRowStrides, i64, i32>;
template <class Layout, i32 kHeadDim, i32 kThreads>
using Rows = TileCopy<Layout, kHeadDim, kThreads, Cfg::kVectorBytes, RowStride>;
using CopyQ = PackedRowsCopy<Rows<LayoutQ, Cfg::kHeadDimQk, Cfg::kNumThreads>>;
using RowsK = Rows<LayoutK, Cfg::kHeadDimQk, kTeamThreads>;
using RowsV = Rows<LayoutV, Cfg::kHeadDimV, kTeamThreads>;
using CopyK = Select<Cfg::kPaged, LookedUpCopy<RowsK>, RowsK>;
using CopyV = Select<Cfg::kPaged, LookedUpCopy<RowsV>, RowsV>;

struct Lane {
  i32 thread_idx, warp_idx, lane_idx;
  i32 team_idx, team_thread;
  i32 warp_row;  // first row of the warp within the query tile
  i32 warp_col;  // its first column of V
  DEVICE Lane()
      : thread_idx(::thread_idx()),
        warp_idx(thread_idx / 32),
        lane_idx(thread_idx % 32),
        team_idx(thread_idx / kTeamThreads),
        team_thread(thread_idx % kTeamThreads),
        warp_row(team_thread / 32 % kRowWarps * 16 * kMTiles),
        warp_col(team_thread / 32 / kRowWarps * kWarpCols) {}
  // Row within the query tile, and column within a key tile, of fragment element rS[m][n][e].
  DEVICE i32 row(i32 m, i32 e) const { return warp_row + m * 16 + lane_idx / 4 + 8 * (e / 2); }
  DEVICE i32 col(i32 n, i32 e) const { return n * 8 + 2 * (lane_idx % 4) + e % 2; }

  DEVICE void team_sync() const {
    if constexpr (kTeamThreads == 32) {
      warp_sync();
    } else {
      named_barrier_sync(1 + team_idx, kTeamThreads);
    }
  }
};

// What a warp carries from tile to tile.
struct WarpState {
  f32 rO[kMTiles][kNTilesO][4];
  OnlineSoftmax<kMTiles> softmax;
  u32 rQ[Cfg::kQInRegisters ? kMTiles : 1][Cfg::kQInRegisters ? kDepthQk / 16 : 1][4];
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
        const i32 token = row / p.heads_per_unit;
        keys[m][r] = row_keys<Cfg>(p, work.seq, token);
        aligned[m][r] = token + work.seq.diagonal;
        if constexpr (Cfg::kAlibi) {
          const i32 head = work.first_head + row % p.heads_per_unit;
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

  DEVICE u32 sK(i32 i) const { return smem + u32(i % Cfg::kNumStages) * Smem::kStageBytes; }
  DEVICE u32 sV(i32 i) const { return sK(i) + LayoutK::kBytes; }
  DEVICE i32 first_key(i32 i) const { return (first + i * kNumTeams) * Cfg::kBlockN; }

  using Pages = TilePages<Cfg::kBlockN>;
  DEVICE void look_up(Pages& pages, i32 i) const {
    if constexpr (Cfg::kPaged) {
      pages.look_up(table, first_key(i), i < count ? num_keys : 0, lane_idx);
    }
  }
  // Loads tile i. Keys past the last become zeros: what lies there may be NaN.
  DEVICE void load(const Pages& pages, i32 i) const {
    if (i < count) {
      load_rows(copy_k, sK(i), pages, i);
      load_rows(copy_v, sV(i), pages, i);
    }
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

DEVICE u32 lane_address_q(const Lane& lane, u32 smem) {
  return smem + Smem::kQ + u32(lane.warp_row * LayoutQ::kRowBytes) +
         lane_offset_a<LayoutQ>(lane.lane_idx);
}

DEVICE void load_q(WarpState& state, u32 sQ_lane) {
#pragma unroll
  for (i32 m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (i32 k = 0; k < kDepthQk / 16; ++k) {
      load_a<LayoutQ>(state.rQ[m][k], sQ_lane, m, k);
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

// One key tile of the team.
DEVICE void step(WarpState& state, const LaneRows& rows, const Score<Cfg>& score, const Lane& lane,
                 u32 sQ_lane, u32 sK, u32 sV, i32 first_key, bool masked) {
  f32 rS[kMTiles][kNTilesS][4];
  clear(rS);
  const auto each_step = [](i32) {};
  gemm_abt<Cfg::kBf16, LayoutK, kDepthQk>(
      rS, sK + lane_offset_b<LayoutK>(lane.lane_idx),
      [&](u32(&rA)[4], i32 m, i32 k) {
        if constexpr (Cfg::kQInRegisters) {
#pragma unroll
          for (i32 i = 0; i < 4; ++i) {
            rA[i] = state.rQ[m][k][i];
          }
        } else {
          load_a<LayoutQ>(rA, sQ_lane, m, k);
        }
      },
      each_step);
  finish_scores(rS, rows, score, lane, first_key, masked);
  state.softmax.update(rS, state.rO, score.to_log2());
  gemm_ab<Cfg::kBf16, LayoutV, Cfg::kBlockN>(
      state.rO, sV + lane_offset_b_trans<LayoutV>(lane.lane_idx) + u32(lane.warp_col * kElemBytes),
      [&](u32(&rA)[4], i32 m, i32 k) { accumulator_as_a<Cfg::kBf16>(rA, rS, m, k); }, each_step);
}

// Puts the warp's rows of O and their statistics into shared memory for the merge.
DEVICE void hand_over(WarpState& state, const Lane& lane, u32 smem, f32 to_log2) {
  state.softmax.finish();
#pragma unroll
  for (i32 m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (i32 r = 0; r < 2; ++r) {
      const u32 team_row = u32(lane.team_idx * Cfg::kBlockM + lane.row(m, 2 * r));
      const f32 sum = state.softmax.row_sum[m][r];
      if (lane.lane_idx % 4 == 0 && lane.warp_col == 0) {
        const u32 stats = smem + Smem::kStats + team_row * 8;
        // A team without a key for the row takes no part, whatever its maximum.
        st_shared_f32(
            stats, sum > 0.0f ? state.softmax.row_max[m][r] * to_log2 : bits_as_f32(kNegInfBits));
        st_shared_f32(stats + 4, sum);
      }
      const u32 sO = smem + Smem::kO + team_row * Smem::kORowBytes;
#pragma unroll
      for (i32 n = 0; n < kNTilesO; ++n) {
        st_shared_u64(
            sO + u32((lane.warp_col + lane.col(n, 0)) * 4),
            u64(f32_as_bits(state.rO[m][n][2 * r + 1])) << 32 | f32_as_bits(state.rO[m][n][2 * r]));
      }
    }
  }
}

// Stores four elements at dst in vectors of kOutVectorBytes, those that begin below `valid`
// elements.
DEVICE void store_four(char* dst, const f32 (&x)[4], i32 valid) {
  const u32 words[2] = {pack2<Cfg::kBf16>(x[0], x[1]), pack2<Cfg::kBf16>(x[2], x[3])};
  if constexpr (Cfg::kOutVectorBytes == 8) {
    st_global_u64(dst, u64(words[1]) << 32 | words[0]);
  } else {
#pragma unroll
    for (i32 i = 0; i < 4; i += Cfg::kOutVectorBytes / 2) {
      if (i < valid) {
        if constexpr (Cfg::kOutVectorBytes == 4) {
          st_global_u32(dst + 2 * i, words[i / 2]);
        } else {
          st_global_u16(dst + 2 * i, u16(words[i / 2] >> (i % 2 * 16)));
        }
      }
    }
  }
}

// Rows of the tile that exist, those behind the last query of a packed buffer included.
DEVICE i32 rows_of_tile(const DecodeParams& p, const DecodeWork& work) {
  return imin(work.seq.slot_q * p.heads_per_unit - work.first_row, i32(Cfg::kBlockM));
}

// Merges the teams' results, a row per warp and four columns per lane, and writes the rows that the
// tile owns. Rows without visible keys get zeros and -inf; of a split only -inf.
DEVICE void store_output(const DecodeParams& p, const DecodeWork& work, const Lane& lane,
                         u32 smem) {
  for (i32 row = lane.warp_idx; row < rows_of_tile(p, work); row += Cfg::kNumThreads / 32) {
    f32 team_max[kNumTeams];
    f32 row_max = bits_as_f32(kNegInfBits);
#pragma unroll
    for (i32 t = 0; t < kNumTeams; ++t) {
      team_max[t] = ld_shared_f32(smem + Smem::kStats + u32(t * Cfg::kBlockM + row) * 8);
      row_max = fmaxf(row_max, team_max[t]);
    }
    const i32 token = (work.first_row + row) / p.heads_per_unit;
    const i32 head = work.first_head + (work.first_row + row) % p.heads_per_unit;
    const bool empty = row_max == bits_as_f32(kNegInfBits) || token >= work.seq.seqlen_q;
    f32 weight[kNumTeams];
    f32 sum = 0.0f;
#pragma unroll
    for (i32 t = 0; t < kNumTeams; ++t) {
      weight[t] = empty ? 0.0f : ex2_approx(team_max[t] - row_max);
      sum += weight[t] * ld_shared_f32(smem + Smem::kStats + u32(t * Cfg::kBlockM + row) * 8 + 4);
    }
    if (p.softmax_lse != nullptr && lane.lane_idx == 0) {
      f32* lse = p.softmax_lse + work.split_idx * p.lse_split_stride +
                 work.batch_idx * p.lse_batch_stride + head * p.lse_head_stride + work.seq.q_row;
      st_global_f32(lse + token,
                    empty ? bits_as_f32(kNegInfBits) : kLn2 * (row_max + lg2_approx(sum)));
    }
    if (Cfg::kSplit && empty) {
      continue;
    }
    const f32 scale = empty ? 0.0f : 1.0f / sum;
    const i64 out_row = work.split_idx * p.out_split_stride + work.batch_idx * p.out_batch_stride +
                        head * p.out_head_stride + (work.seq.q_row + token) * p.out_row_stride;
#pragma unroll
    for (i32 col = lane.lane_idx * 4; col < Cfg::kHeadDimV; col += 128) {
      f32 x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (i32 t = 0; t < kNumTeams; ++t) {
        u32 bits[4];
        ld_shared_v4(
            bits, smem + Smem::kO + u32(t * Cfg::kBlockM + row) * Smem::kORowBytes + u32(col) * 4);
#pragma unroll
        for (i32 i = 0; i < 4; ++i) {
          x[i] += weight[t] * bits_as_f32(bits[i]);
        }
      }
      if constexpr (Cfg::kSplit) {  // rows are padded to four columns
        const u32 words[4] = {f32_as_bits(x[0] * scale), f32_as_bits(x[1] * scale),
                              f32_as_bits(x[2] * scale), f32_as_bits(x[3] * scale)};
        st_global_v4(static_cast<f32*>(p.out) + out_row + col, words);
      } else {
#pragma unroll
        for (i32 i = 0; i < 4; ++i) {
          x[i] *= scale;
        }
        store_four(static_cast<char*>(p.out) + (out_row + col) * kElemBytes, x,
                   Cfg::kHeadDimV - col);
      }
    }
  }
}

// Whether all splits of the tile have been written, of which this CTA's is the last. To be called
// by the whole CTA.
DEVICE bool all_splits_written(const DecodeParams& p, const Lane& lane, u32 smem) {
  cta_sync();  // all have written, and are done with shared memory
  const u32 last = u32(p.num_splits - 1);
  if (lane.thread_idx == 0) {
    u32* counter = p.split_counters + block_idx() % (p.num_units * p.num_tiles);
    st_shared_u32(smem, atomic_inc_acq_rel_global_u32(counter, last));
  }
  cta_sync();
  const bool all = ld_shared_u32(smem) == last;
  cta_sync();  // all have read it: shared memory is free
  return all;
}

// Merges the tile's splits, a row per warp.
DEVICE void merge_splits(const DecodeParams& p, const DecodeWork& work, const Lane& lane,
                         u32 smem) {
  constexpr i32 kVectors = ceil_div(Cfg::kHeadDimV, 128);
  const u32 s_weights = smem + Smem::kSplitWeights + u32(lane.warp_idx * kMaxSplits * 4);
  for (i32 row = lane.warp_idx; row < rows_of_tile(p, work); row += Cfg::kNumThreads / 32) {
    const i64 token = work.seq.q_row + (work.first_row + row) / p.heads_per_unit;
    const i32 head = work.first_head + (work.first_row + row) % p.heads_per_unit;
    const i64 lse_row = work.batch_idx * p.lse_batch_stride + head * p.lse_head_stride + token;
    warp_sync();  // the weights of the row before have been read
    const f32 lse = weigh_splits(p.softmax_lse + lse_row, p.lse_split_stride, p.num_splits,
                                 s_weights, lane.lane_idx);
    if (p.merged_lse != nullptr && lane.lane_idx == 0) {
      st_global_f32(p.merged_lse + lse_row, lse);
    }
    warp_sync();  // the weights are there
    f32 rO[kVectors][4] = {};
    add_splits<Cfg::kHeadDimV, 16 / kVectors, true>(
        rO,
        static_cast<const f32*>(p.out) + work.batch_idx * p.out_batch_stride +
            head * p.out_head_stride + token * p.out_row_stride + lane.lane_idx * 4,
        p.out_split_stride, p.num_splits, 0, 1, s_weights, lane.lane_idx);
    char* out = static_cast<char*>(p.merged_out) +
                (work.batch_idx * p.merged_batch_stride + head * p.merged_head_stride +
                 token * p.merged_row_stride) *
                    kElemBytes;
#pragma unroll
    for (i32 j = 0; j < kVectors; ++j) {
      const i32 col = j * 128 + lane.lane_idx * 4;
      if (col < Cfg::kHeadDimV) {
        store_four(out + col * kElemBytes, rO[j], Cfg::kHeadDimV - col);
      }
    }
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

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) flash2_decode(GRID_CONSTANT DecodeParams p) {
  const Lane lane;
  const DecodeWork work = decode_work<Cfg>(p, lane.lane_idx);
  const SeqlenInfo& seq = work.seq;
  if (work.first_row >= seq.slot_q * p.heads_per_unit) {
    return;  // a tile past the end of a packed buffer
  }
  const u32 smem = smem_base();
  const TileRange tiles = split_tiles<Cfg, kNumTeams>(p, work);
  CopyQ(head_base(p.q, work.batch_idx * p.q_batch_stride + work.first_head * p.q_head_stride +
                           seq.q_row * p.q_row_stride),
        p.q_row_stride, p.q_head_stride, p.heads_per_unit, lane.thread_idx)
      .load(smem + Smem::kQ, work.first_row, seq.seqlen_q * p.heads_per_unit);
  cp_async_commit_group();

  const i64 row = cache_row<Cfg>(p, work.batch_idx);
  const i32 first = tiles.begin + lane.team_idx;
  const Ring ring{
      key_copy<CopyK>(work, p.k, row, p.k_batch_stride, p.k_row_stride,
                      work.first_head / p.qhead_per_khead * p.k_head_stride, lane.team_thread),
      key_copy<CopyV>(work, p.v, row, p.v_batch_stride, p.v_row_stride,
                      work.first_head / p.qhead_per_vhead * p.v_head_stride, lane.team_thread),
      PageTable(p, row, seq.k_row),
      first,
      ceil_div(imax(tiles.end - first, 0), kNumTeams),
      seq.seqlen_k,
      lane.lane_idx,
      smem + Smem::kRings + u32(lane.team_idx * Cfg::kNumStages) * Smem::kStageBytes};
  Ring::Pages pages[Cfg::kNumStages];
#pragma unroll
  for (i32 i = 0; i < Cfg::kNumStages; ++i) {
    ring.look_up(pages[i], i);
  }
#pragma unroll
  for (i32 i = 0; i < Cfg::kNumStages - 1; ++i) {
    ring.load(pages[i], i);
  }
  Ring::Pages& next = pages[Cfg::kNumStages - 1];  // of the tile to be loaded next

  const LaneRows rows(p, work, lane);
  const Score<Cfg> score(p, work.batch_idx, work.first_head);
  const u32 sQ_lane = lane_address_q(lane, smem);
  WarpState state;
  clear(state.rO);
  cp_async_wait_group<Cfg::kNumStages - 1>();
  cta_sync();  // Q has landed
  if constexpr (Cfg::kQInRegisters) {
    load_q(state, sQ_lane);
  }

  for (i32 i = 0; i < ring.count; ++i) {
    cp_async_wait_group<Cfg::kNumStages - 2>();
    lane.team_sync();  // tile i has landed for the team, which is done with tile i - 1
    ring.load(next, i + Cfg::kNumStages - 1);
    ring.look_up(next, i + Cfg::kNumStages);  // a whole step before it is needed
    const i32 tile = first + i * kNumTeams;
    step(state, rows, score, lane, sQ_lane, ring.sK(i), ring.sV(i), ring.first_key(i),
         tile < tiles.interior_begin || tile >= tiles.interior_end);
  }

  cp_async_wait_group<0>();
  cta_sync();  // all are done with shared memory: the merge may overlay it
  hand_over(state, lane, smem, score.to_log2());
  cta_sync();
  store_output(p, work, lane, smem);
  if constexpr (Cfg::kSplit) {
    if (p.split_counters != nullptr && all_splits_written(p, lane, smem)) {
      merge_splits(p, work, lane, smem);
    }
  }
}
