// How bwd.cu lays out shared memory and divides its products among warps; types that follow from
// that. Reads Cfg: include "prelude.cuh" first. Which divisions are good: flash2/bwd_tiles.py.
#pragma once
#include "common/device/bwd_work.cuh"
#include "common/device/dropout_transposed.cuh"
#include "flash2/device/gemm.cuh"
#include "flash2/device/tile_copy.cuh"

// How the warps divide the three kinds of products: kSWarpsN of them along the keys of S^T and
// dP^T, the others along the queries; kKvWarpsN along the keys of dK and dV, the others along the
// head dims; kDqWarpsM along the queries of dQ.
// Cfg::kSplitRoles: the first half of the warps has S^T, P^T and dV, the second dP^T, dS^T and dK.
constexpr i32 kRoleWarps = Cfg::kSplitRoles ? Cfg::kNumWarps / 2 : Cfg::kNumWarps;
constexpr i32 kSWarpsM = kRoleWarps / Cfg::kSWarpsN;
constexpr i32 kKvWarpsD = kRoleWarps / Cfg::kKvWarpsN;
constexpr i32 kDqWarpsD = Cfg::kNumWarps / Cfg::kDqWarpsM;
// A warp owns the same keys in all products but dQ, so P^T and dS^T pass from accumulators to
// operands in its registers.
constexpr bool kPInRegisters = kSWarpsM == 1 && kKvWarpsD == 1;
// dQ of a step is computed in the next one: a single barrier per step.
constexpr bool kDelayedDq = !Cfg::kSplitRoles && kPInRegisters && Cfg::kStagesDs == 2 &&
                            Cfg::kStagesQ == 2 && Cfg::kStagesDo == 2;

// Of Q and dO, which are copied again and again; kKvWarpsD warps share their columns.
template <i32 kHeadDim, i32 kColumnMultiple>
using StreamedLayout =
    CopiedTileLayout<Cfg::kLines, Cfg::kBlockM, kHeadDim, kColumnMultiple, kKvWarpsD>;
constexpr i32 kQkColumnMultiple = 16 * (kKvWarpsD > kDqWarpsD ? kKvWarpsD : kDqWarpsD);
using LayoutQ = StreamedLayout<Cfg::kHeadDimQk, kQkColumnMultiple>;
using LayoutK = TileLayout<Cfg::kBlockN, Cfg::kHeadDimQk, kQkColumnMultiple>;
using LayoutDo = StreamedLayout<Cfg::kHeadDimV, 16 * kKvWarpsD>;
using LayoutV = TileLayout<Cfg::kBlockN, Cfg::kHeadDimV, 16 * kKvWarpsD>;
using LayoutP = TileLayout<Cfg::kBlockN, Cfg::kBlockM>;  // P^T and dS^T
static_assert(LayoutQ::kCols == Cfg::kAccumColumns,
              "bwd_tiles.py and this file agree on the columns of dq_accum");

// Shared memory in address order. V is read once where a warp keeps its part in registers; P^T and
// dS^T then take its place.
struct Smem {
  static constexpr u32 kStatBytes = Cfg::kBlockM * 4;
  static constexpr u32 kK = 0;
  static constexpr u32 kQ = kK + LayoutK::kBytes;
  static constexpr u32 kDo = kQ + Cfg::kStagesQ * LayoutQ::kBytes;
  static constexpr u32 kLse = kDo + Cfg::kStagesDo * LayoutDo::kBytes;
  static constexpr u32 kD = kLse + Cfg::kStagesQ * kStatBytes;
  static constexpr u32 kV = kD + Cfg::kStagesDo * kStatBytes;
  static constexpr u32 kP = Cfg::kVInRegisters ? kV : kV + LayoutV::kBytes;
  static constexpr u32 kDs = kPInRegisters ? kP : kP + LayoutP::kBytes;
  static constexpr u32 kDsEnd = kDs + Cfg::kStagesDs * LayoutP::kBytes;
  static constexpr u32 kBytes = kDsEnd > kV + LayoutV::kBytes ? kDsEnd : kV + LayoutV::kBytes;
  static_assert((kQ | kDo | kV | LayoutQ::kBytes | LayoutDo::kBytes) % 128 == 0, "LineTileLayout");
};
static_assert(Smem::kBytes == Cfg::kSmemBytes,
              "flash2/bwd_tiles.py and this file agree on shared memory");

constexpr i32 kDepthQk = round_up(Cfg::kHeadDimQk, 16);
constexpr i32 kDepthV = round_up(Cfg::kHeadDimV, 16);
// S^T of a warp: kMTilesS * 16 keys and kSubM queries at a time, kSubSteps times.
constexpr i32 kMTilesS = Cfg::kBlockN / Cfg::kSWarpsN / 16;
constexpr i32 kNTilesS = Cfg::kSubM / 8;
constexpr i32 kSubSteps = Cfg::kBlockM / kSWarpsM / Cfg::kSubM;
constexpr i32 kMTilesKv = Cfg::kBlockN / Cfg::kKvWarpsN / 16;
constexpr i32 kNTilesDk = LayoutQ::kCols / kKvWarpsD / 8;
constexpr i32 kNTilesDv = LayoutDo::kCols / kKvWarpsD / 8;
constexpr i32 kMTilesDq = Cfg::kBlockM / Cfg::kDqWarpsM / 16;
constexpr i32 kNTilesDq = LayoutQ::kCols / kDqWarpsD / 8;
static_assert(Cfg::kNumThreads == 32 * Cfg::kNumWarps &&
                  kMTilesS * Cfg::kSWarpsN * 16 == Cfg::kBlockN &&
                  kSubSteps * Cfg::kSubM * kSWarpsM == Cfg::kBlockM &&
                  kMTilesKv * Cfg::kKvWarpsN * 16 == Cfg::kBlockN &&
                  kMTilesDq * Cfg::kDqWarpsM * 16 == Cfg::kBlockM,
              "warps divide the tiles evenly");
static_assert(kStatRows % Cfg::kBlockM == 0, "a query tile lies inside the padding of softmax_d");
static_assert(!kPInRegisters || Cfg::kSWarpsN == Cfg::kKvWarpsN);

template <class Layout, i32 kHeadDim>
using Copy = TileCopy<Layout, kHeadDim, Cfg::kNumThreads, Cfg::kVectorBytes, Cfg::kWideRowStrides>;

using MaybeDropout = TransposedDropout<Cfg::kDropout>;

template <i32 kMTiles, i32 kNTiles>
using Fragments = f32[kMTiles][kNTiles][4];
// An S^T tile rounded to 16 bits, two queries a register: [..][..][0] keys lane / 4, [1] keys lane
// / 4 + 8.
using Packed = u32[kMTilesS][kNTilesS][2];

struct Gradients {
  Fragments<kMTilesKv, kNTilesDk> rDk;
  Fragments<kMTilesKv, kNTilesDv> rDv;
};

// A warp's rows of K and V as operands, where it keeps them.
struct Operands {
  u32 rK[Cfg::kKInRegisters ? kMTilesS : 1][Cfg::kKInRegisters ? kDepthQk / 16 : 1][4];
  u32 rV[Cfg::kVInRegisters ? kMTilesS : 1][Cfg::kVInRegisters ? kDepthV / 16 : 1][4];
};

struct Lane {
  i32 thread_idx, lane_idx;
  i32 role_warp;       // among those of the same role
  i32 s_key, s_query;  // of the warp's part of S^T, within the tiles
  i32 kv_key, kv_part;
  i32 dq_query, dq_part;
  DEVICE explicit Lane(i32 thread_idx) : thread_idx(thread_idx), lane_idx(thread_idx % 32) {
    const i32 warp_idx = thread_idx / 32;
    role_warp = warp_idx % kRoleWarps;
    s_key = role_warp % Cfg::kSWarpsN * (kMTilesS * 16);
    s_query = role_warp / Cfg::kSWarpsN * Cfg::kSubM;
    kv_key = role_warp % Cfg::kKvWarpsN * (kMTilesKv * 16);
    kv_part = role_warp / Cfg::kKvWarpsN;
    dq_query = warp_idx % Cfg::kDqWarpsM * (kMTilesDq * 16);
    dq_part = warp_idx / Cfg::kDqWarpsM;
  }
  // Row and column of fragment element [m][n][e] within the warp's part.
  DEVICE i32 row(i32 m, i32 e) const { return m * 16 + lane_idx / 4 + 8 * (e / 2); }
  DEVICE i32 col(i32 n, i32 e) const { return n * 8 + 2 * (lane_idx % 4) + e % 2; }
};
