// The threads of hopper/fwd_wide.cu that load: one for Q and K, one for each half of V. Included by
// fwd_wide.cu only.
#pragma once
#include "common/ptx/tma.cuh"
#include "hopper/wide_layout.cuh"

// Key tiles left when a CTA asks for its next tile; fwd_producer.cuh has the reason.
constexpr i32 kDrawAhead = 2;
// Pieces of a tile's first K that are loaded before its Q, for which the scores of the tile before
// must be done. Fewer than the ring has stages, else Q would wait for itself.
constexpr i32 kPiecesBeforeQ = (kPiecesK < Cfg::kNumStagesK ? kPiecesK : Cfg::kNumStagesK) - 1;

DEVICE RowCoords key_coords(const Work& work, i32 n_block, i32 batch_rows) {
  const i32 first_row = i32(work.seq.k_row) + work.batch_idx * batch_rows;
  return row_coords<Cfg::kRaggedK>(n_block * Cfg::kBlockN, first_row, work.seq.seqlen_k,
                                   work.batch_idx);
}

struct KeyLoader {
  const HopperFwdParams& p;
  u32 smem;
  KRing keys;
  u32 q_parity;

  DEVICE KeyLoader(const HopperFwdParams& p, u32 smem)
      : p(p), smem(smem), keys(smem), q_parity(0) {}

  DEVICE void load_q(const Work& work) {
    wait_phase(smem + Smem::kBarQEmpty, q_parity ^ 1u);
    q_parity ^= 1u;
    const u32 full = smem + Smem::kBarQFull;
    mbarrier_arrive_expect_tx(full, Smem::kQLoadBytes);
    // Packed GQA: dims (column, head of the group, row, group, batch). Rows of other sequences may
    // come along: their results are not stored.
    const RowCoords at =
        kGqaGroup > 1 ? RowCoords{i32(work.seq.q_row) + work.first_row, work.head_idx / kGqaGroup,
                                  Cfg::kVarlenQ ? 0 : work.batch_idx}
                      : row_coords<Cfg::kVarlenQ>(work.first_row, i32(work.seq.q_row),
                                                  work.seq.slot_q, work.batch_idx);
#pragma unroll
    for (i32 c = 0; c < kChunksQk; ++c) {
      tma_load_5d(smem + Smem::kQ + u32(c) * kBoxBytes, &p.q_map, full, c * Chunk::kCols,
                  kGqaGroup > 1 ? 0 : at.row, kGqaGroup > 1 ? at.row : work.head_idx, at.dim3,
                  at.dim4);
    }
  }

  // All pieces of a key tile. first: of a query tile.
  DEVICE void load_k(const Work& work, i32 n_block, bool first) {
    const RowCoords at = key_coords(work, n_block, p.k_batch_rows);
    const i32 head = work.head_idx / p.qhead_per_khead;
#pragma unroll
    for (i32 piece = 0; piece < kPiecesK; ++piece) {
      if (first && piece == kPiecesBeforeQ) {
        load_q(work);
      }
      const i32 first_chunk = piece * kBoxesK;
      const i32 boxes = imin(kBoxesK, kChunksQk - first_chunk);
      keys.wait_empty();
      mbarrier_arrive_expect_tx(keys.full(), u32(boxes) * kBoxBytes);
#pragma unroll
      for (i32 b = 0; b < boxes; ++b) {
        tma_load_5d(keys.tile() + u32(b) * kBoxBytes, &p.k_map, keys.full(),
                    (first_chunk + b) * Chunk::kCols, at.row, head, at.dim3, at.dim4);
      }
      keys.advance();
    }
  }

  DEVICE void run() {
    const Queue queue(smem);
    for (i32 i = 0;; ++i) {
      const Work work = queue.wait(i);
      if (!work.valid()) {
        break;
      }
      const TileRange tiles = queue.row_tiles<Cfg>(p, i, work, 0);
      const i32 draw_at = imin(tiles.begin + kDrawAhead, tiles.end - 1);
      if (tiles.begin >= tiles.end) {
        queue.take();
      }
#pragma unroll 1
      for (i32 n_block = tiles.end - 1; n_block >= tiles.begin; --n_block) {
        if (n_block == draw_at) {
          queue.take();
        }
        load_k(work, n_block, n_block == tiles.end - 1);
      }
    }
  }
};

template <i32 kHalf>
DEVICE void load_values(const HopperFwdParams& p, u32 smem) {
  const Queue queue(smem);
  VRing<kHalf> values(smem);
  for (i32 i = 0;; ++i) {
    const Work work = queue.wait(i);
    if (!work.valid()) {
      break;
    }
    const TileRange tiles = queue.row_tiles<Cfg>(p, i, work, 0);
    queue.take();
    const i32 head = work.head_idx / p.qhead_per_vhead;
#pragma unroll 1
    for (i32 n_block = tiles.end - 1; n_block >= tiles.begin; --n_block) {
      const RowCoords at = key_coords(work, n_block, p.v_batch_rows);
#pragma unroll
      for (i32 part = 0; part < kPartsV; ++part) {
        values.acquire();
#pragma unroll
        for (i32 b = 0; b < kBoxesV; ++b) {
          const i32 col = kHalf * kHalfColumns + part * Cfg::kWgmmaPvN + b * Chunk::kCols;
          tma_load_5d(values.tile() + u32(b) * kBoxBytes, &p.v_map, values.full(), col, at.row,
                      head, at.dim3, at.dim4);
        }
        values.advance();
      }
    }
  }
}
