// What the roles of hopper/fwd_wide.cu share: sizes, the memory map, barriers. Included by
// fwd_wide.cu only, after the prelude.
#pragma once
#include "common/device/wgmma_desc.cuh"
#include "hopper/pipeline.cuh"
#include "hopper/row_coords.cuh"
#include "hopper/tile_scheduler.cuh"

constexpr i32 kWgRows = 64;  // rows of the CTA: M of every WGMMA
// Packed GQA: the rows of a tile are (query row, head of kGqaGroup), as in fwd_layout.cuh.
constexpr i32 kGqaGroup = Cfg::kGqaGroup;
constexpr i32 kWgQueries = kWgRows / kGqaGroup;

// Every load is a box of 64 rows x 64 columns; TMA fills what lies past the head dim with zeros.
using Chunk = SwizzledChunk<128>;
constexpr u32 kBoxBytes = 64 * 128;
constexpr i32 kChunksQk = ceil_div(Cfg::kHeadDimQk, Chunk::kCols);
constexpr i32 kStepsQk = ceil_div(Cfg::kHeadDimQk, 16);  // of WGMMA's depth of 16
// A piece of K is two boxes side by side, the last one of a key tile maybe one.
constexpr i32 kBoxesK = 2;
constexpr i32 kStepsPerPiece = kBoxesK * Chunk::kCols / 16;
constexpr i32 kPiecesK = ceil_div(kChunksQk, kBoxesK);
// Each of the two output warpgroups owns a half of O's columns, in kPartsV products; a piece of V
// is the columns of one of them.
constexpr i32 kBoxesV = Cfg::kWgmmaPvN / Chunk::kCols;
constexpr i32 kPartsV = ceil_div(ceil_div(Cfg::kHeadDimV, 2), Cfg::kWgmmaPvN);
constexpr i32 kHalfColumns = kPartsV * Cfg::kWgmmaPvN;
constexpr i32 kStepsPv = Cfg::kBlockN / 16;
constexpr i32 kRegsS = Cfg::kWgmmaQkN / 2;
constexpr i32 kRegsO = Cfg::kWgmmaPvN / 2;  // of one part

static_assert(Cfg::kNumThreads == 512 && Cfg::kBlockM == kWgRows && Cfg::kBlockN == 64);
static_assert(Cfg::kWgmmaQkN == Cfg::kBlockN && Cfg::kWgmmaPvN % Chunk::kCols == 0);
static_assert(Cfg::kQueryRows == kWgQueries && kWgQueries > 0);
static_assert(kGqaGroup == 1 || !(Cfg::kAlibi || Cfg::kDropout), "these depend on the head");

// Shared memory in address order.
struct Smem {
  static constexpr u32 kQBytes = kChunksQk * kBoxBytes;
  static constexpr u32 kQLoadBytes = kChunksQk * kWgQueries * kGqaGroup * 128;
  static constexpr u32 kKBytes = kBoxesK * kBoxBytes;
  static constexpr u32 kVBytes = kBoxesV * kBoxBytes;
  static constexpr u32 kPBytes = kWgRows * Cfg::kBlockN * 2;
  // A record of the score role to the output roles: P, and a factor for each row of O.
  static constexpr u32 kRecordBytes = kPBytes + kWgRows * 4;
  static constexpr i32 kNumRecords = 2;

  static constexpr u32 kQ = 0;
  static constexpr u32 kK = kQ + kQBytes;
  static constexpr u32 kV = kK + Cfg::kNumStagesK * kKBytes;  // [2 halves][kNumStagesV]
  static constexpr u32 kRecords = kV + 2 * Cfg::kNumStagesV * kVBytes;
  static constexpr u32 kWork = kRecords + kNumRecords * kRecordBytes;  // of the work queue

  static constexpr u32 kBarKFull = kWork + 4 * kWorkBytes;
  static constexpr u32 kBarKEmpty = kBarKFull + 8 * Cfg::kNumStagesK;
  static constexpr u32 kBarVFull = kBarKEmpty + 8 * Cfg::kNumStagesK;  // [2 halves][kNumStagesV]
  static constexpr u32 kBarVEmpty = kBarVFull + 16 * Cfg::kNumStagesV;
  static constexpr u32 kBarRecordFull = kBarVEmpty + 16 * Cfg::kNumStagesV;
  static constexpr u32 kBarRecordEmpty = kBarRecordFull + 8 * kNumRecords;
  // Full: bytes of TMA loads; the score role waits. Empty: each of its warps, after the last
  // scores of a tile; the loads of the next Q wait. Tiles without keys use neither.
  static constexpr u32 kBarQFull = kBarRecordEmpty + 8 * kNumRecords;
  static constexpr u32 kBarQEmpty = kBarQFull + 8;
  static constexpr u32 kBarWorkFull = kBarQEmpty + 8;
  static constexpr u32 kBarWorkTaken = kBarWorkFull + 4 * 8;
  static constexpr u32 kEnd = kBarWorkTaken + 8;
};
static_assert(Smem::kEnd <= Cfg::kSmemBytes,
              "hopper/wide_tiles.py and this file agree on shared memory");

using KRing =
    TileRing<Cfg::kNumStagesK, Smem::kK, Smem::kKBytes, Smem::kBarKFull, Smem::kBarKEmpty>;
template <i32 kHalf>
using VRing = TileRing<Cfg::kNumStagesV, Smem::kV + kHalf * Cfg::kNumStagesV * Smem::kVBytes,
                       Smem::kVBytes, Smem::kBarVFull + kHalf * Cfg::kNumStagesV * 8,
                       Smem::kBarVEmpty + kHalf * Cfg::kNumStagesV * 8>;
// Full: signalled by each warp of the score role. Empty: by each warp of both output roles.
using RecordRing = TileRing<Smem::kNumRecords, Smem::kRecords, Smem::kRecordBytes,
                            Smem::kBarRecordFull, Smem::kBarRecordEmpty>;
using Queue = WorkQueue<Smem::kWork, Smem::kBarWorkFull, Smem::kBarWorkTaken>;
static_assert(Queue::kSlots == 4);
// Who takes a tile before the next one is drawn: the three threads that load, and the eight warps
// that hold O. None of these, and so not the score role either, is then more than a tile behind.
constexpr u32 kTakers = 3 + 8;

// P crosses as fragments of A: the words of a lane for 16 keys lie side by side, and go to the same
// lane of the same warp of both output warpgroups.
DEVICE u32 fragment_address(u32 record, i32 warp_idx, i32 step, i32 lane_idx) {
  return record + u32((warp_idx * kStepsPv + step) * 512 + lane_idx * 16);
}
// Factor of a lane's first row; that of the other is 32 bytes further on.
DEVICE u32 factor_address(u32 record, i32 warp_idx, i32 lane_idx) {
  return record + Smem::kPBytes + u32(warp_idx * 16 + lane_idx / 4) * 4;
}
