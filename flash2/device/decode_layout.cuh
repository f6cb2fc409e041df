// How flash2/decode.cu cuts a tile up among its warps, and its memory map.
// Included by decode.cu and decode_output.cuh only, after the prelude.
#pragma once
#include "flash2/device/gemm.cuh"
#include "common/device/params.cuh"
#include "flash2/device/split_merge.cuh"
#include "flash2/device/swizzled_tile.cuh"
#include "common/ptx/barrier.cuh"

// With qv the warps that share rows divide the depth of both products of the
// scores. WGMMA: of Q there may be half a chunk of 64 for each, of Qv and V
// there are whole ones.
constexpr i32 kQkColumnMultiple = Cfg::kQv ? 16 * Cfg::kColWarps : 16;
constexpr i32 kQkWgmmaMultiple = Cfg::kHeadDimQk > 64 ? 64 * Cfg::kColWarps : 64;
using LayoutQ =
    Select<Cfg::kWgmma, SwizzledTileLayout<Cfg::kBlockM, Cfg::kHeadDimQk, kQkWgmmaMultiple>,
           TileLayout<Cfg::kBlockM, Cfg::kHeadDimQk, kQkColumnMultiple>>;
template <i32 kHeadDim, i32 kColumnMultiple, i32 kWgmmaMultiple, i32 kParts>
using KeyLayout = Select<Cfg::kWgmma, SwizzledTileLayout<Cfg::kBlockN, kHeadDim, kWgmmaMultiple>,
                         CopiedTileLayout<true, Cfg::kBlockN, kHeadDim, kColumnMultiple, kParts>>;
using LayoutK =
    KeyLayout<Cfg::kHeadDimQk, kQkColumnMultiple, kQkWgmmaMultiple, Cfg::kQv ? Cfg::kColWarps : 1>;
using LayoutV = KeyLayout<Cfg::kHeadDimV, 16 * Cfg::kColWarps, 64 * Cfg::kColWarps, Cfg::kColWarps>;
using LayoutQv =
    Select<Cfg::kWgmma, InterleavedTileLayout<Cfg::kBlockM, Cfg::kHeadDimV, Cfg::kColWarps>,
           TileLayout<Cfg::kBlockM, Cfg::kHeadDimV, 16 * Cfg::kColWarps>>;

constexpr i32 kNumTeams = Cfg::kNumTeams;
constexpr i32 kRowWarps = Cfg::kRowWarps;
constexpr i32 kColWarps = Cfg::kColWarps;
constexpr i32 kTeamThreads = 32 * kRowWarps * kColWarps;
constexpr i32 kMTiles = Cfg::kBlockM / (16 * kRowWarps);
constexpr i32 kNTilesS = Cfg::kBlockN / 8;
constexpr i32 kWarpCols = LayoutV::kCols / kColWarps;
constexpr i32 kNTilesO = kWarpCols / 8;
constexpr i32 kDepthQk = LayoutQ::kCols / (Cfg::kQv ? kColWarps : 1);  // of a warp's Q K^T
constexpr i32 kDepthQv = Cfg::kQv ? kWarpCols : 0;                     // of its Qv V^T
// Depth steps of 16 of a warp's Q and Qv that it has in registers if
// Cfg::kQInRegisters. WGMMA: all but those of Q and of a warpgroup's first
// chunk of Qv, for which there is no room.
constexpr i32 kStepsQ = (Cfg::kWgmma ? kDepthQv - 64 : kDepthQk + kDepthQv) / 16;
constexpr bool kSumsScores = Cfg::kQv && kColWarps > 1;
static_assert(Cfg::kNumThreads == kNumTeams * kTeamThreads);
static_assert(Cfg::kBlockM == 16 * kRowWarps * kMTiles && Cfg::kNumStages >= 2);
// WGMMA: the warps of a column part are a warpgroup.
static_assert(!Cfg::kWgmma ||
              (Cfg::kQv && Cfg::kQInRegisters && Cfg::kVectorBytes == 16 && kMTiles == 1 &&
               kRowWarps == 4 && kColWarps == 2 && kNumTeams == 1 && kStepsQ > 0));

// Shared memory in address order. What the teams hand over for their merge
// overlays all of it, and so does the merge of the splits after that.
struct Smem {
  static constexpr u32 kStageBytes = LayoutK::kBytes + LayoutV::kBytes;
  static constexpr u32 kQ = 0;
  static constexpr u32 kQv = kQ + LayoutQ::kBytes;
  // WGMMA: behind the first chunk of each warpgroup's Qv. The rest gives way to
  // the last stage, which is filled once it is in registers, and is first in
  // memory for that.
  static constexpr u32 kQvBytes = !Cfg::kQv     ? 0
                                  : Cfg::kWgmma ? kColWarps * Cfg::kBlockM * 128
                                                : LayoutQv::kBytes;
  static constexpr u32 kRings = kQv + kQvBytes;            // [team][stage]: K tile, V tile
  static constexpr i32 kFirstStage = Cfg::kWgmma ? 1 : 0;  // that of tile 0
  static_assert(!Cfg::kWgmma || LayoutQv::kBytes - kQvBytes <= kStageBytes);
  static_assert(kRings % 128 == 0 && kStageBytes % 128 == 0, "lines of LineTileLayout");
  // [warp]: what a warp's columns of Qv and V add to the scores, fragment by
  // fragment, fp32
  static constexpr u32 kScores = kRings + kNumTeams * Cfg::kNumStages * kStageBytes;
  static constexpr u32 kScoresBytes = kMTiles * kNTilesS * 32 * 16;
  static constexpr u32 kLoopEnd =
      kScores + (kSumsScores ? Cfg::kNumThreads / 32 * kScoresBytes : 0);
  // [team][row][column] of O, fp32. The padding puts the rows that a store
  // touches in other banks.
  static constexpr u32 kORowBytes = (LayoutV::kCols + 8) * 4;
  static constexpr u32 kO = 0;
  static constexpr u32 kStats =
      kO + kNumTeams * Cfg::kBlockM * kORowBytes;  // [team][row]: maximum (log2), sum
  static constexpr u32 kMergeEnd = kStats + kNumTeams * Cfg::kBlockM * 8;
  static constexpr u32 kTeamsEnd = kLoopEnd > kMergeEnd ? kLoopEnd : kMergeEnd;
  // Merge of the splits. Shares that fall to this CTA; [warp]: maximum and
  // weight, sum of rows, and rows on their way: as many as there is room for
  // anyway, up to 32.
  static constexpr u32 kShares = 0;
  static constexpr u32 kSplitStats = 16;
  static constexpr u32 kSplitSums = kSplitStats + round_up(Cfg::kNumThreads / 32 * 8, 16);
  static constexpr u32 kSplitRowBytes = Cfg::kNumThreads / 32 * ceil_div(Cfg::kHeadDimV, 128) * 512;
  static constexpr u32 kSplitRows = kSplitSums + kSplitRowBytes;
  static constexpr i32 kSplitsFit = i32(kTeamsEnd - kSplitRows) / i32(kSplitRowBytes);
  static constexpr i32 kSplitsAhead = kSplitsFit < 4 ? 4 : kSplitsFit < 32 ? kSplitsFit : 32;
  static constexpr u32 kSplitsEnd = kSplitRows + kSplitsAhead * kSplitRowBytes;
  static constexpr u32 kBytes = kTeamsEnd > kSplitsEnd ? kTeamsEnd : kSplitsEnd;
};
static_assert(!kSumsScores || 1 + kNumTeams * (1 + kRowWarps) <= 16, "named barriers");
static_assert(Smem::kBytes == Cfg::kSmemBytes,
              "flash2/decode_tiles.py and this file agree on shared memory");

struct Lane {
  i32 thread_idx, warp_idx, lane_idx;
  i32 team_idx, team_thread;
  i32 row_warp, col_warp;  // of the warp within its team
  i32 warp_row;            // first row of the warp within the query tile
  i32 warp_col;            // its first column of V
  DEVICE Lane()
      : thread_idx(::thread_idx()),
        warp_idx(thread_idx / 32),
        lane_idx(thread_idx % 32),
        team_idx(thread_idx / kTeamThreads),
        team_thread(thread_idx % kTeamThreads),
        row_warp(team_thread / 32 % kRowWarps),
        col_warp(team_thread / 32 / kRowWarps),
        warp_row(row_warp * 16 * kMTiles),
        warp_col(col_warp * kWarpCols) {}
  // Row within the query tile, and column within a key tile, of fragment
  // element rS[m][n][e].
  DEVICE i32 row(i32 m, i32 e) const { return warp_row + m * 16 + lane_idx / 4 + 8 * (e / 2); }
  DEVICE i32 col(i32 n, i32 e) const { return n * 8 + 2 * (lane_idx % 4) + e % 2; }

  DEVICE void team_sync() const {
    if constexpr (kTeamThreads == 32) {
      warp_sync();
    } else {
      named_barrier_sync(1 + team_idx, kTeamThreads);
    }
  }
  // The warps of the team that share the lane's rows.
  DEVICE void row_sync() const {
    named_barrier_sync(1 + kNumTeams + team_idx * kRowWarps + row_warp, 32 * kColWarps);
  }
};
