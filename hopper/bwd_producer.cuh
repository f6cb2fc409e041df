// Who fetches for the other roles of hopper/bwd.cu: a thread that loads tiles by TMA, and a warp
// that brings lse and D into the form in which S^T and dP^T take them. Included by bwd.cu only.
#pragma once
#include "common/device/row_io.cuh"
#include "common/ptx/barrier.cuh"
#include "common/ptx/griddepcontrol.cuh"
#include "common/ptx/tma.cuh"
#include "hopper/bwd_layout.cuh"

// One thread. K and V are loaded once; Q and dO stream through rings.
struct Producer {
  const HopperBwdParams& p;
  const KeyTile& tile;
  u32 smem;
  QRing q;
  DoRing dos;
  bool first;

  DEVICE Producer(const HopperBwdParams& p, const KeyTile& tile, u32 smem)
      : p(p), tile(tile), smem(smem), q(smem), dos(smem), first(true) {}

  DEVICE void step(i32 head, i32 m_block) {
    const i32 first_key = tile.get(KeyTile::kFirstKey);
    if (first) {
      load_keys<kChunksQk>(Smem::kK, Smem::kBarKFull, &p.k_map, head / p.qhead_per_khead,
                           p.k_batch_rows, first_key);
    }
    load_queries<kChunksQk>(q, &p.q_map, head, m_block, p.q_batch_rows);
    if (first) {  // the first S^T needs K and Q only
      load_keys<kChunksV>(Smem::kV, Smem::kBarVFull, &p.v_map, head / p.qhead_per_vhead,
                          p.v_batch_rows, first_key);
    }
    load_queries<kChunksV>(dos, &p.dout_map, head, m_block, p.dout_batch_rows);
    if (kCtas > 1 && first) {
      const i32 towards_other = tile.get(KeyTile::kRank) == 0 ? kN : -kN;
      load_keys<kChunksQk>(Smem::kKPeer, Smem::kBarKPeerFull, &p.k_map, head / p.qhead_per_khead,
                           p.k_batch_rows, first_key + towards_other);
    }
    first = false;
  }

  DEVICE void finish() {}

 private:
  template <i32 kChunks>
  DEVICE void load_keys(u32 to, u32 bar, const TensorMap* map, i32 head, i32 batch_rows,
                        i32 first_key) const {
    const i32 batch_idx = tile.get(KeyTile::kBatchIdx);
    const RowCoords rows =
        row_coords<Cfg::kRaggedK>(first_key, tile.get(KeyTile::kKRow) + batch_idx * batch_rows,
                                  tile.get(KeyTile::kSeqlenK), batch_idx);
    mbarrier_arrive_expect_tx(smem + bar, kChunks * kKeyChunkBytes);
#pragma unroll
    for (i32 c = 0; c < kChunks; ++c) {
      tma_load_5d(smem + to + u32(c) * kKeyChunkBytes, map, smem + bar, c * Chunk::kCols, rows.row,
                  head, rows.dim3, rows.dim4);
    }
  }

  template <i32 kChunks, class Ring>
  DEVICE void load_queries(Ring& ring, const TensorMap* map, i32 head, i32 m_block,
                           i32 batch_rows) const {
    const i32 batch_idx = tile.get(KeyTile::kBatchIdx);
    const RowCoords rows =
        row_coords<Cfg::kRaggedQ>(m_block * kM, tile.get(KeyTile::kQRow) + batch_idx * batch_rows,
                                  tile.get(KeyTile::kSeqlenQ), batch_idx);
    ring.acquire();
#pragma unroll
    for (i32 c = 0; c < kChunks; ++c) {
      tma_load_5d(ring.tile() + u32(c) * kQueryChunkBytes, map, ring.full(), c * Chunk::kCols,
                  rows.row, head, rows.dim3, rows.dim4);
    }
    ring.advance();
  }
};

// The constant A of the step that adds lse or D, one row: what the parts below are multiplied by.
// bf16: 1, 1, 1. fp16: 2^15, 2^15, 1, 1, since a score may be larger than fp16's numbers.
constexpr u32 kOnesLow = Cfg::kBf16 ? 0x3f803f80u : 0x78007800u;
constexpr u32 kOnesHigh = Cfg::kBf16 ? 0x00003f80u : 0x3c003c00u;
constexpr f32 kFirstFactor = Cfg::kBf16 ? 1.0f : 32768.0f;

// A value in parts of 16 bits, from high to low, that add up to all of its 24 bits.
struct Parts {
  u32 words[4];
  DEVICE explicit Parts(f32 value) : words{} {
#pragma unroll
    for (i32 i = 0; i < (Cfg::kBf16 ? 3 : 4); ++i) {
      const f32 factor = i < 2 ? kFirstFactor : 1.0f;
      const u32 part = pack2<Cfg::kBf16>(value * (1.0f / factor), 0.0f) & 0xffffu;
      value -= low_as_f32<Cfg::kBf16>(part) * factor;
      words[i / 2] |= part << (i % 2 * 16);
    }
  }
};

// One warp: lse of each Q tile (kOfLse) or D of each dO tile, from memory to shared memory. Values
// of the next step are on their way while this warp waits for the stage to be free: else their
// latency would come on top.
template <bool kOfLse>
struct StatWriter {
  using Ring = Select<kOfLse, QRing, DoRing>;
  static constexpr bool kAux = kOfLse ? Cfg::kAuxLse : Cfg::kAuxD;
  static constexpr i32 kRows = kM / 32;  // of a lane
  const HopperBwdParams& p;
  const KeyTile& tile;
  Ring ring;
  f32 next[kRows];
  bool first;

  DEVICE StatWriter(const HopperBwdParams& p, const KeyTile& tile, u32 smem)
      : p(p), tile(tile), ring(smem), first(true) {
    griddepcontrol_wait();  // bwd_preprocess.cu writes lse and D
  }

  DEVICE void step(i32 head, i32 m_block) {
    if (first) {
      load(head, m_block);
      first = false;
    }
    f32 now[kRows];
#pragma unroll
    for (i32 i = 0; i < kRows; ++i) {
      now[i] = value(next[i]);
    }
    advance(tile, head, m_block);
    if (head < tile.get(KeyTile::kEndHead)) {
      load(head, m_block);
    }
    ring.wait_empty();
    const u32 stage =
        ring.smem + (kOfLse ? Smem::kLse : Smem::kD) + ring.stage * (kOfLse ? kLseBytes : kDBytes);
#pragma unroll
    for (i32 i = 0; i < kRows; ++i) {
      const i32 query = i * 32 + lane_idx();
      if constexpr (kAux) {  // the other half of the row has been zero since init_aux
        st_shared_v4(Aux::unit_address(stage, query, 0), Parts(now[i]).words);
      } else {
        st_shared_f32(stage + stat_offset(query), now[i]);
      }
    }
    fence_proxy_async_shared();
    warp_sync();
    if (lane_idx() == 0) {
      mbarrier_arrive(ring.full());
    }
    ring.advance();
  }

  DEVICE void finish() {}

 private:
  // Far enough for exp2 to give 0, near enough for Parts.
  static constexpr f32 kFar = Cfg::kBf16 ? 1e30f : 2e9f;

  DEVICE static i32 lane_idx() { return thread_idx() % 32; }
  DEVICE void load(i32 head, i32 m_block) {
    const i32 batch_idx = tile.get(KeyTile::kBatchIdx);
    const f32* rows = (kOfLse ? p.lse_log2 : p.softmax_d) + batch_idx * p.stat_batch_stride +
                      head * p.stat_head_stride + stat_row<Cfg>(tile.seq(), batch_idx) +
                      m_block * kM;
#pragma unroll
    for (i32 i = 0; i < kRows; ++i) {
      next[i] = ld_global_f32(rows + i * 32 + lane_idx());
    }
  }
  // What is added to the products: minus lse, before the scale, or minus D.
  DEVICE f32 value(f32 stat) const {
    if constexpr (!kAux) {
      return stat;
    } else if constexpr (kOfLse) {
      const bool nothing = stat == bits_as_f32(0x7f800000u);  // no key, or no row
      const f32 far = p.softmax_scale_log2 > 0.0f ? -kFar : kFar;
      return nothing ? far : stat / -p.softmax_scale_log2;
    } else {
      return -stat;
    }
  }
};

// The constant rows and the halves of rows that stay zero. By all threads, before a barrier.
DEVICE void init_aux(u32 smem) {
  if constexpr (Cfg::kAuxLse || Cfg::kAuxD) {
    const u32 zeros[4] = {0, 0, 0, 0}, ones[4] = {kOnesLow, kOnesHigh, 0, 0};
    if (thread_idx() < 64) {
      st_shared_v4(Aux::unit_address(smem + Smem::kOnes, thread_idx(), 0), ones);
      st_shared_v4(Aux::unit_address(smem + Smem::kOnes, thread_idx(), 1), zeros);
    }
    for (i32 i = thread_idx(); Cfg::kAuxLse && i < Cfg::kStagesQ * kM; i += Cfg::kNumThreads) {
      st_shared_v4(Aux::unit_address(smem + Smem::kLse, i, 1), zeros);
    }
    for (i32 i = thread_idx(); Cfg::kAuxD && i < Cfg::kStagesDo * kM; i += Cfg::kNumThreads) {
      st_shared_v4(Aux::unit_address(smem + Smem::kD, i, 1), zeros);
    }
    fence_proxy_async_shared();
  }
}
