// The producer thread of hopper/fwd.cu: all loads of a CTA. Included by fwd.cu only.
#pragma once
#include "common/device/mask.cuh"
#include "common/ptx/tma.cuh"
#include "hopper/fwd_layout.cuh"

// Order of loads: K0 Q K1 V0 K2 V1 ..., the last V of a tile behind K0 and Q of
// the next one, which is the order in which consumers need them.
struct Producer {
  const HopperFwdParams& p;
  u32 smem;
  KRing keys;
  VRing values;
  Work last;       // the tile whose last V has not been loaded
  i32 last_block;  // that V; negative: none

  DEVICE Producer(const HopperFwdParams& p, u32 smem)
      : p(p), smem(smem), keys(smem), values(smem), last_block(-1) {}

  DEVICE void load_k(const Work& work, i32 n_block) {
    keys.acquire();
    const i32 row = map_row<Cfg::kRaggedK>(p.k_map_rows, work.seq.seqlen_k, n_block * Cfg::kBlockN);
    const i32 first = map_first_row<Cfg::kRaggedK>(work.seq.k_row, work.seq.seqlen_k);
    const i32 head = work.head_idx / p.qhead_per_khead;
#pragma unroll
    for (i32 c = 0; c < kChunksQk; ++c) {
      tma_load_5d(keys.tile() + u32(c * kKChunkBytes), &p.k_map, keys.full(), c * ChunkQk::kCols,
                  row, head, first, Cfg::kVarlenK ? 0 : work.batch_idx);
    }
    keys.advance();
  }

  DEVICE void load_v(const Work& work, i32 n_block) {
    values.acquire();
    const i32 row = map_row<Cfg::kRaggedK>(p.k_map_rows, work.seq.seqlen_k, n_block * Cfg::kBlockN);
    const i32 first = map_first_row<Cfg::kRaggedK>(work.seq.k_row, work.seq.seqlen_k);
    const i32 head = work.head_idx / p.qhead_per_vhead;
#pragma unroll
    for (i32 c = 0; c < kChunksV; ++c) {
      tma_load_5d(values.tile() + u32(c * kVChunkBytes), &p.v_map, values.full(), c * ChunkV::kCols,
                  row, head, first, Cfg::kVarlenK ? 0 : work.batch_idx);
    }
    values.advance();
  }

  // Each warpgroup's slice has its own barriers. Without keys no Q is loaded, but the slice is
  // handed over all the same: O is staged in it.
  DEVICE void load_q(const Work& work, i32 i, bool has_keys) {
    const i32 first = map_first_row<Cfg::kVarlenQ>(work.seq.q_row, work.seq.slot_q);
    for (i32 wg_idx = 0; wg_idx < kNumWgs; ++wg_idx) {
      const QSlot slot(i, wg_idx);
      wait_phase(slot.empty(smem), slot.parity ^ 1u);
      if (!has_keys) {
        mbarrier_arrive(slot.full(smem));
        continue;
      }
      mbarrier_arrive_expect_tx(slot.full(smem), Smem::kQBytes);
      const i32 row = map_row<Cfg::kVarlenQ>(p.q_map_rows, work.seq.slot_q,
                                             work.first_row + wg_idx / Cfg::kVSplit * kWgRows);
#pragma unroll
      for (i32 c = 0; c < kChunksQk; ++c) {
        tma_load_5d(slot.slice(smem) + u32(c * kQChunkBytes), &p.q_map, slot.full(smem),
                    c * ChunkQk::kCols, row, work.head_idx, first,
                    Cfg::kVarlenQ ? 0 : work.batch_idx);
      }
    }
  }

  DEVICE void load_last_v() {
    if (last_block >= 0) {
      load_v(last, last_block);
    }
    last_block = -1;
  }

  DEVICE void run() {
    const Queue queue(smem);
    for (i32 i = 0;; ++i) {
      const Work work = queue.wait(i);
      if (!work.valid()) {
        break;
      }
      queue.take();
      const TileRange tiles = key_tiles<Cfg>(p, work.seq, work.first_row, Cfg::kBlockM);
      const bool has_keys = tiles.begin < tiles.end;
      if (has_keys) {
        load_k(work, tiles.end - 1);
      }
      if constexpr (!kOverlapTiles) {
        load_last_v();  // its consumers free the only Q buffer
      }
      load_q(work, i, has_keys);
      load_last_v();
#pragma unroll 1
      for (i32 n_block = tiles.end - 2; n_block >= tiles.begin; --n_block) {
        load_k(work, n_block);
        load_v(work, n_block + 1);
      }
      if (has_keys) {
        last = work;
        last_block = tiles.begin;
      }
    }
    load_last_v();
  }
};
