// The producer thread of hopper/fwd.cu: all loads of a CTA. Included by fwd.cu only.
#pragma once
#include "common/ptx/tma.cuh"
#include "hopper/fwd_layout.cuh"

// Loads of K left in a tile when its CTA asks for the next tile. Asking at a tile's start would
// leave long tiles waiting behind others at the end of a group of heads (a simulated 9 % at (256,
// 256), causal, 16k tokens); these few, and those in the ring, cover the latency of the answer.
constexpr i32 kDrawAhead = 2;

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

  DEVICE static RowCoords key_coords(const Work& work, i32 n_block, i32 batch_rows) {
    const i32 first_row = i32(work.seq.k_row) + work.batch_idx * batch_rows;
    return row_coords<Cfg::kRaggedK>(n_block * Cfg::kBlockN, first_row, work.seq.seqlen_k,
                                     work.batch_idx);
  }

  DEVICE void load_k(const Work& work, i32 n_block) {
    keys.acquire();
    const RowCoords at = key_coords(work, n_block, p.k_batch_rows);
    const i32 head = work.head_idx / p.qhead_per_khead;
#pragma unroll
    for (i32 c = 0; c < kChunksQk; ++c) {
      tma_load_5d(keys.tile() + u32(c * kKChunkBytes), &p.k_map, keys.full(), c * ChunkQk::kCols,
                  at.row, head, at.dim3, at.dim4);
    }
    keys.advance();
  }

  DEVICE void load_v(const Work& work, i32 n_block) {
    values.acquire();
    const RowCoords at = key_coords(work, n_block, p.v_batch_rows);
    const i32 head = work.head_idx / p.qhead_per_vhead;
#pragma unroll
    for (i32 c = 0; c < kChunksV; ++c) {
      tma_load_5d(values.tile() + u32(c * kVChunkBytes), &p.v_map, values.full(), c * ChunkV::kCols,
                  at.row, head, at.dim3, at.dim4);
    }
    values.advance();
  }

  // Each warpgroup's slice has its own barriers. Without keys no Q is loaded, but the slice is
  // handed over all the same: O is staged in it.
  DEVICE void load_q(const Work& work, i32 i, bool has_keys) {
    for (i32 wg_idx = 0; wg_idx < kNumWgs; ++wg_idx) {
      const QSlot slot(i, wg_idx);
      wait_phase(slot.empty(smem), slot.parity ^ 1u);
      if (!has_keys) {
        mbarrier_arrive(slot.full(smem));
        continue;
      }
      mbarrier_arrive_expect_tx(slot.full(smem), Smem::kQLoadBytes);
      const i32 row = work.first_row + wg_idx / Cfg::kVSplit * kWgQueries;
      // Packed GQA: dims (column, head of the group, row, group, batch). Rows of other sequences
      // may come along: their results are not stored.
      const RowCoords at = kGqaGroup > 1
                               ? RowCoords{i32(work.seq.q_row) + row, work.head_idx / kGqaGroup,
                                           Cfg::kVarlenQ ? 0 : work.batch_idx}
                               : row_coords<Cfg::kVarlenQ>(row, i32(work.seq.q_row),
                                                           work.seq.slot_q, work.batch_idx);
#pragma unroll
      for (i32 c = 0; c < kChunksQk; ++c) {
        tma_load_5d(slot.slice(smem) + u32(c * kQChunkBytes), &p.q_map, slot.full(smem),
                    c * ChunkQk::kCols, kGqaGroup > 1 ? 0 : at.row,
                    kGqaGroup > 1 ? at.row : work.head_idx, at.dim3, at.dim4);
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
      const TileRange tiles = queue.row_tiles<Cfg>(p, i, work, 0);
      const bool has_keys = tiles.begin < tiles.end;
      const i32 draw_at = imin(tiles.begin + kDrawAhead, tiles.end - 2);
      if (draw_at < tiles.begin) {
        queue.take();
      }
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
        if (n_block == draw_at) {
          queue.take();
        }
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
