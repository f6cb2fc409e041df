// What the roles of hopper/bwd.cu share: sizes, the memory map, barriers, and which queries a CTA
// walks over. Included by bwd.cu only, after the prelude.
#pragma once
#include "common/device/bwd_work.cuh"
#include "common/device/mask.cuh"
#include "common/device/wgmma_desc.cuh"
#include "common/ptx/memory.cuh"
#include "common/ptx/shuffle.cuh"
#include "hopper/pipeline.cuh"
#include "hopper/row_coords.cuh"

constexpr i32 kM = Cfg::kBlockM;     // queries of a step
constexpr i32 kN = Cfg::kBlockN;     // keys of a CTA
constexpr i32 kKeyBlocks = kN / 64;  // 64 keys are the M of all products but dQ
constexpr i32 kStepsM = kM / 16;     // of WGMMA's depth of 16
constexpr i32 kRegsS = kM / 2;       // of S^T or dP^T of 64 keys
constexpr i32 kKeyWarpgroups = Cfg::kSplitRoles ? 2 : kKeyBlocks;
constexpr u32 kReaders = 4 * kKeyWarpgroups;  // warps that read Q and dO
// CTAs of a cluster have neighbouring key tiles and share dQ: each adds that of every kCtas-th
// step, over the keys of all, and so to memory half as often.
constexpr i32 kCtas = Cfg::kClusterSize;
static_assert(kCtas == 1 || kCtas == 2);

// Columns, cut into chunks of 64; TMA fills those past the head dim with zeros.
using Chunk = SwizzledChunk<128>;
constexpr i32 kChunksQk = ceil_div(Cfg::kHeadDimQk, Chunk::kCols);
constexpr i32 kChunksV = ceil_div(Cfg::kHeadDimV, Chunk::kCols);
constexpr u32 kKeyChunkBytes = kN * 128, kQueryChunkBytes = kM * 128;
// Sums of dK and dV: parts of at most what one product writes.
constexpr i32 kDkRegs = Cfg::kWgmmaDkN / 2, kDvRegs = Cfg::kWgmmaDvN / 2;
constexpr i32 kDkParts = ceil_div(Cfg::kHeadDimQk, Cfg::kWgmmaDkN);
constexpr i32 kDvParts = ceil_div(Cfg::kHeadDimV, Cfg::kWgmmaDvN);
using DkSum = f32[kDkParts][kDkRegs];
using DvSum = f32[kDvParts][kDvRegs];
using Packed = u32[kStepsM][4];  // P^T or dS^T of 64 keys, in two bytes an element: A of a product

static_assert(kN % 64 == 0 && kM % 64 == 0);
static_assert(kDkParts == 1 || Cfg::kWgmmaDkN % Chunk::kCols == 0);
static_assert(kDvParts == 1 || Cfg::kWgmmaDvN % Chunk::kCols == 0);
static_assert(Cfg::kWgmmaScoresN == kM);

// lse and D reach S^T and dP^T through the tensor cores, as one more step of depth 16 whose A is
// constant and whose B holds minus their value in parts of 16 bits, 32 bytes a query: to read one
// float per two elements would keep shared memory busier than all products do
// (docs/performance/). Else they lie there as floats, see stat_offset.
using Aux = SwizzledChunk<32>;
constexpr u32 kLseBytes = kM * (Cfg::kAuxLse ? 32 : 4), kDBytes = kM * (Cfg::kAuxD ? 32 : 4);

// Shared memory in address order.
struct Smem {
  static constexpr u32 kKBytes = kChunksQk * kKeyChunkBytes, kVBytes = kChunksV * kKeyChunkBytes;
  static constexpr u32 kQBytes = kChunksQk * kQueryChunkBytes;
  static constexpr u32 kDoBytes = kChunksV * kQueryChunkBytes;
  static constexpr u32 kOwnDsBytes = kKeyBlocks * kQueryChunkBytes;
  static constexpr u32 kDsBytes = kCtas * kOwnDsBytes;  // own keys first
  static constexpr u32 kSentDsBytes = (kCtas - 1) * kOwnDsBytes;
  static constexpr u32 kPBytes = Cfg::kSplitRoles ? kOwnDsBytes : 0;  // P^T from role to role
  static constexpr u32 kStageBytes = Cfg::kAddStages * 4 * 64 * Cfg::kWgmmaDqN;

  static constexpr u32 kK = 0;
  static constexpr u32 kV = kK + kKBytes;
  static constexpr u32 kKPeer = kV + kVBytes;                      // K of the other CTA
  static constexpr u32 kQ = kKPeer + (kCtas - 1) * kKBytes;        // [kStagesQ]
  static constexpr u32 kDo = kQ + Cfg::kStagesQ * kQBytes;         // [kStagesDo]
  static constexpr u32 kDs = kDo + Cfg::kStagesDo * kDoBytes;      // [kStagesDs]: rows are queries
  static constexpr u32 kSentDs = kDs + Cfg::kStagesDs * kDsBytes;  // [kStagesDs]: for the other CTA
  static constexpr u32 kP = kSentDs + Cfg::kStagesDs * kSentDsBytes;
  static constexpr u32 kStage = kP + kPBytes;         // of dQ on its way to memory
  static constexpr u32 kOnes = kStage + kStageBytes;  // 64 rows of the constant A
  static constexpr u32 kLse = kOnes + (Cfg::kAuxLse || Cfg::kAuxD ? 64 * 32 : 0);  // [kStagesQ]
  static constexpr u32 kD = kLse + Cfg::kStagesQ * kLseBytes;                      // [kStagesDo]

  // Full: of K and V, bytes of TMA loads; of Q and dO, these and the warp that writes lse or D;
  // of dS and P, the warps that write them. Empty: each warp that has read the tile.
  static constexpr u32 kBarKFull = kD + Cfg::kStagesDo * kDBytes;
  static constexpr u32 kBarVFull = kBarKFull + 8;
  static constexpr u32 kBarQFull = kBarVFull + 8;
  static constexpr u32 kBarQEmpty = kBarQFull + 8 * Cfg::kStagesQ;
  static constexpr u32 kBarDoFull = kBarQEmpty + 8 * Cfg::kStagesQ;
  static constexpr u32 kBarDoEmpty = kBarDoFull + 8 * Cfg::kStagesDo;
  static constexpr u32 kBarDsFull = kBarDoEmpty + 8 * Cfg::kStagesDo;
  static constexpr u32 kBarDsEmpty = kBarDsFull + 8 * Cfg::kStagesDs;
  static constexpr u32 kBarPFull = kBarDsEmpty + 8 * Cfg::kStagesDs;  // [kKeyBlocks]
  static constexpr u32 kBarPEmpty = kBarPFull + 8 * kKeyBlocks;       // [kKeyBlocks]
  static constexpr u32 kBarKPeerFull = kBarPEmpty + 8 * kKeyBlocks;
  // [kStagesDs]: the warps of the other CTA's dQ, done with what this one has sent.
  static constexpr u32 kBarSentEmpty = kBarKPeerFull + 8;
  static constexpr u32 kTile = kBarSentEmpty + 8 * Cfg::kStagesDs;  // see KeyTile
  static constexpr u32 kEnd = kTile + 16 * 4;
};
static_assert(Smem::kEnd <= Cfg::kSmemBytes,
              "hopper/bwd_tiles.py and this file agree on shared memory");

using QRing = TileRing<Cfg::kStagesQ, Smem::kQ, Smem::kQBytes, Smem::kBarQFull, Smem::kBarQEmpty>;
using DoRing =
    TileRing<Cfg::kStagesDo, Smem::kDo, Smem::kDoBytes, Smem::kBarDoFull, Smem::kBarDoEmpty>;
using DsRing =
    TileRing<Cfg::kStagesDs, Smem::kDs, Smem::kDsBytes, Smem::kBarDsFull, Smem::kBarDsEmpty>;

DEVICE u32 lse_stage(const QRing& q) { return q.smem + Smem::kLse + q.stage * kLseBytes; }
DEVICE u32 d_stage(const DoRing& dos) { return dos.smem + Smem::kD + dos.stage * kDBytes; }

// Byte offset of a query's float among those of a tile: one 16-byte load at stat_offset(16 k + 2 c)
// has queries 2 c, 2 c + 1, 2 c + 8 and 2 c + 9 of 16, what a lane with c = lane % 4 needs.
DEVICE u32 stat_offset(i32 query) {
  const i32 in_16 = query % 16;
  return u32(query / 16 * 64 + in_16 % 8 / 2 * 16 + in_16 / 8 * 8 + in_16 % 2 * 4);
}

// A warp of a warpgroup.
struct Warp {
  u32 smem;
  i32 warp_idx, lane_idx;  // warp_idx: within the warpgroup
  DEVICE explicit Warp(u32 smem)
      : smem(smem), warp_idx(thread_idx() / 32 % 4), lane_idx(thread_idx() % 32) {}
  DEVICE bool leads() const { return lane_idx == 0; }
};

// The key tile of a CTA and the query tiles that see it, in shared memory: most of it is needed now
// and then only, and registers are short.
struct KeyTile {
  enum Field {
    kBatchIdx,
    kFirstHead,
    kEndHead,
    kSlotK,
    kFirstKey,
    kQRow,
    kKRow,
    kSeqlenQ,
    kSeqlenK,
    kBegin,
    kEnd,
    kInteriorBegin,
    kInteriorEnd,
    kStart,
    kRank,
    kFields
  };
  u32 at;

  DEVICE explicit KeyTile(u32 smem) : at(smem + Smem::kTile) {}
  // By one warp, before a barrier.
  DEVICE void init(const HopperBwdParams& p) const {
    const KeyWork work = key_work<Cfg, kCtas * kN>(p, block_idx() / kCtas, thread_idx() % 32);
    const i32 rank = block_idx() % kCtas;
    const i32 cluster_key = work.n_block * kCtas * kN, first_key = cluster_key + rank * kN;
    // All CTAs of a cluster visit the same tiles; some may hide all keys of one.
    const TileRange tiles = query_tiles<Cfg>(p, work.seq, cluster_key, kCtas * kN);
    const TileRange own = query_tiles<Cfg>(p, work.seq, first_key, kN);
    const bool seen = tiles.begin < tiles.end;
    const i32 start = !seen           ? tiles.begin
                      : Cfg::kOrdered ? tiles.end - 1
                                      : first_query_tile<Cfg>(tiles, cluster_key);
    if (thread_idx() % 32 == 0) {
      const i32 values[kFields] = {work.batch_idx,
                                   work.first_head,
                                   work.end_head,
                                   work.slot_k,
                                   first_key,
                                   i32(work.seq.q_row),
                                   i32(work.seq.k_row),
                                   work.seq.seqlen_q,
                                   work.seq.seqlen_k,
                                   tiles.begin,
                                   tiles.end,
                                   own.interior_begin,
                                   own.interior_end,
                                   start,
                                   rank};
#pragma unroll
      for (i32 i = 0; i < kFields; ++i) {
        st_shared_u32(at + u32(4 * i), u32(values[i]));
      }
    }
  }

  DEVICE i32 get(Field field) const { return i32(ld_shared_u32(at + u32(4 * field))); }
  DEVICE i32 num_steps() const {
    return imax(get(kEnd) - get(kBegin), 0) * (get(kEndHead) - get(kFirstHead));
  }
  // Whether a mask hides any of the tile's pairs; keys behind the last are no matter of masks.
  DEVICE bool masked(i32 m_block) const {
    return m_block < get(kInteriorBegin) || m_block >= get(kInteriorEnd);
  }
  // Rows of dk and dv that are this CTA's to write; may be negative in a cluster.
  DEVICE i32 rows() const { return get(kSlotK) - get(kFirstKey); }
  // No CTA of the cluster has any.
  DEVICE bool empty() const { return rows() + get(kRank) * kN <= 0; }
  // What masks need of it.
  DEVICE SeqlenInfo seq() const {
    const i32 seqlen_q = get(kSeqlenQ), seqlen_k = get(kSeqlenK);
    return {get(kQRow), get(kKRow), seqlen_q, seqlen_q, seqlen_k, seqlen_k - seqlen_q};
  }
};

// To the next query tile in the order of walk().
DEVICE void advance(const KeyTile& tile, i32& head, i32& m_block) {
  if constexpr (Cfg::kOrdered) {
    m_block = m_block == tile.get(KeyTile::kBegin) ? tile.get(KeyTile::kEnd) - 1 : m_block - 1;
  } else {
    m_block = m_block + 1 == tile.get(KeyTile::kEnd) ? tile.get(KeyTile::kBegin) : m_block + 1;
  }
  head += m_block == tile.get(KeyTile::kStart) ? 1 : 0;
}

// role.step(head, m_block) for all query tiles of all heads of the CTA, in order. Each role walks
// so. CTAs begin at different query tiles and wrap around, so that they add to different parts of
// dQ; or, if Cfg::kOrdered, all go from their last tile to their first, see DqRole. One loop for
// all steps: sums that several loops share make ptxas spill.
template <class Role>
DEVICE void walk(Role& role, const KeyTile& tile) {
  i32 head = tile.get(KeyTile::kFirstHead), m_block = tile.get(KeyTile::kStart);
#pragma unroll 1
  for (i32 left = tile.num_steps(); left > 0; --left) {
    role.step(head, m_block);
    advance(tile, head, m_block);
  }
}
