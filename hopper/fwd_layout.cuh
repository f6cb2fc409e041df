// What the roles of hopper/fwd.cu share: sizes, the memory map, barriers, and how rows are named to
// TMA. Included by fwd.cu only, after the prelude.
#pragma once
#include "common/device/wgmma_desc.cuh"
#include "hopper/pipeline.cuh"
#include "hopper/row_coords.cuh"
#include "hopper/tile_scheduler.cuh"

constexpr i32 kWgRows = 64;  // query rows of a warpgroup: M of every WGMMA
constexpr i32 kNumWgs = Cfg::kNumMmaWarpgroups;
// Packed GQA: the rows of a tile are (query row, head of kGqaGroup), heads fastest, since these
// heads share their K and V. A warpgroup has kWgQueries query rows; what is left of its 64 is idle.
constexpr i32 kGqaGroup = Cfg::kGqaGroup;  // 1: the rows of a tile are those of one head
constexpr i32 kWgQueries = kWgRows / kGqaGroup;
constexpr i32 kStepsQk = ceil_div(Cfg::kHeadDimQk, 16);  // of WGMMA's depth of 16
constexpr i32 kStepsPv = Cfg::kBlockN / 16;
constexpr i32 kRegsS = Cfg::kWgmmaQkN / 2;
constexpr i32 kRegsO = Cfg::kWgmmaPvN / 2;

// Columns are cut into chunks of one swizzle; TMA fills those past the head dim with zeros.
using ChunkQk = SwizzledChunk<Cfg::kSwizzleQk>;
using ChunkV = SwizzledChunk<Cfg::kSwizzleV>;
using ChunkP = SwizzledChunk<128>;
constexpr i32 kChunksQk = ceil_div(Cfg::kHeadDimQk, ChunkQk::kCols);
constexpr i32 kChunksO = ceil_div(Cfg::kWgmmaPvN, ChunkV::kCols);  // of one warpgroup's O
constexpr i32 kChunksV = kChunksO * Cfg::kVSplit;
constexpr i32 kQChunkBytes = kWgRows * Cfg::kSwizzleQk,
              kKChunkBytes = Cfg::kBlockN * Cfg::kSwizzleQk;
constexpr i32 kOChunkBytes = kWgRows * Cfg::kSwizzleV, kVChunkBytes = Cfg::kBlockN * Cfg::kSwizzleV;
constexpr i32 kPChunkBytes = kWgRows * 128;

static_assert(Cfg::kNumThreads == 128 * (kNumWgs + 1) && kNumWgs % Cfg::kVSplit == 0);
static_assert(Cfg::kBlockM == kWgRows * kNumWgs / Cfg::kVSplit && Cfg::kWgmmaQkN == Cfg::kBlockN);
static_assert(Cfg::kQueryRows == kWgQueries * kNumWgs / Cfg::kVSplit && kWgQueries > 0);
static_assert(kGqaGroup == 1 || !(Cfg::kAlibi || Cfg::kDropout), "these depend on the head");
static_assert(Cfg::kBlockN % (Cfg::kDropout ? 32 : 16) == 0 && Cfg::kBlockN <= 256);
static_assert(Cfg::kWgmmaPvN * Cfg::kVSplit >= Cfg::kHeadDimV);
static_assert(Cfg::kVSplit == 1 || Cfg::kWgmmaPvN % ChunkV::kCols == 0);

// Shared memory in address order.
struct Smem {
  static constexpr u32 kQBytes = kChunksQk * kQChunkBytes;
  static constexpr u32 kQLoadBytes = kChunksQk * kWgQueries * kGqaGroup * Cfg::kSwizzleQk;
  static constexpr u32 kOBytes = kChunksO * kOChunkBytes;
  static constexpr u32 kPBytes =
      Cfg::kPInSmem ? ceil_div(Cfg::kBlockN, ChunkP::kCols) * kPChunkBytes : 0;
  // A warpgroup's O is staged over its Q, once its last scores are computed, or over its P.
  static constexpr bool kStageOInP = Cfg::kNumQBuffers == 1 && kPBytes >= kOBytes;
  static constexpr u32 kSliceBytes = kStageOInP || kQBytes > kOBytes ? kQBytes : kOBytes;
  static constexpr u32 kKBytes = kChunksQk * kKChunkBytes;
  static constexpr u32 kVBytes = kChunksV * kVChunkBytes;

  static constexpr u32 kQ = 0;  // [kNumQBuffers][kNumWgs]
  static constexpr u32 kK = kQ + Cfg::kNumQBuffers * kNumWgs * kSliceBytes;
  static constexpr u32 kV = kK + Cfg::kNumStages * kKBytes;
  static constexpr u32 kP = kV + Cfg::kNumStages * kVBytes;  // [kNumWgs], if kPInSmem
  static constexpr u32 kWork = kP + kNumWgs * kPBytes;       // records of the work queue

  static constexpr u32 kBarKFull = kWork + 4 * kWorkBytes;
  static constexpr u32 kBarKEmpty = kBarKFull + 8 * Cfg::kNumStages;
  static constexpr u32 kBarVFull = kBarKEmpty + 8 * Cfg::kNumStages;
  static constexpr u32 kBarVEmpty = kBarVFull + 8 * Cfg::kNumStages;
  // [kNumQBuffers][kNumWgs]. Full: bytes of TMA loads; consumers wait. Empty: the thread that
  // stored O over the slice, or if O is elsewhere, each warp that has read it; the producer waits.
  static constexpr u32 kBarQFull = kBarVEmpty + 8 * Cfg::kNumStages;
  static constexpr u32 kBarQEmpty = kBarQFull + 8 * Cfg::kNumQBuffers * kNumWgs;
  static constexpr u32 kBarWorkFull = kBarQEmpty + 8 * Cfg::kNumQBuffers * kNumWgs;
  static constexpr u32 kBarWorkTaken = kBarWorkFull + 4 * 8;
  static constexpr u32 kEnd = kBarWorkTaken + 8;
};
static_assert(!Cfg::kPInSmem || Smem::kP % ChunkP::kAtomBytes == 0);
static_assert(Smem::kEnd <= Cfg::kSmemBytes,
              "hopper/fwd_tiles.py and this file agree on shared memory");

using KRing = TileRing<Cfg::kNumStages, Smem::kK, Smem::kKBytes, Smem::kBarKFull, Smem::kBarKEmpty>;
using VRing = TileRing<Cfg::kNumStages, Smem::kV, Smem::kVBytes, Smem::kBarVFull, Smem::kBarVEmpty>;
using Queue = WorkQueue<Smem::kWork, Smem::kBarWorkFull, Smem::kBarWorkTaken>;
static_assert(Queue::kSlots == 4);

enum NamedBarrier {
  kBarOutput = 1,             // + wg_idx: a warpgroup has written its O to shared memory
  kBarTurn = kBarOutput + 4,  // + wg_idx: a warpgroup may issue its products
};

// The Q slice that warpgroup wg_idx uses for the i-th tile, and the phase of its barriers.
struct QSlot {
  u32 index, parity;
  DEVICE QSlot(i32 i, i32 wg_idx)
      : index(u32(i % Cfg::kNumQBuffers * kNumWgs + wg_idx)),
        parity(u32(i / Cfg::kNumQBuffers) & 1u) {}
  DEVICE u32 slice(u32 smem) const { return smem + Smem::kQ + index * Smem::kSliceBytes; }
  DEVICE u32 full(u32 smem) const { return smem + Smem::kBarQFull + index * 8; }
  DEVICE u32 empty(u32 smem) const { return smem + Smem::kBarQEmpty + index * 8; }
};
constexpr bool kStageOInP = Smem::kStageOInP;
// With two Q buffers the last product of a tile and the first of the next are issued together.
constexpr bool kOverlapTiles = Cfg::kNumQBuffers == 2;
