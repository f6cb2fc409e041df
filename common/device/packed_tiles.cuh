// Which sequence of a packed buffer a tile belongs to, found on the device from cu_seqlens. Used by
// bwd_work.cuh and decode_work.cuh.
#pragma once
#include "common/device/elem.cuh"
#include "common/ptx/memory.cuh"
#include "common/ptx/shuffle.cuh"

struct PackedTile {
  i32 batch_idx;  // == batch: the tile lies behind the last sequence, in the unused tail of the
                  // buffer
  i32 tile;       // within the sequence, or within the tail
};

// Owner of tile `tile` when each sequence is cut into tiles of kRows rows, one sequence after the
// other. A buffer of `total` rows has at most ceil(total / kRows) + batch such tiles, tail
// included. All lanes of a warp call it together. rows_per_token: a token may stand for more rows
// than one. part of parts: only that share of each sequence's tiles is counted and found.
template <i32 kRows>
DEVICE PackedTile find_packed_tile(const i32* cu_seqlens, i32 batch, i32 tile, i32 lane_idx,
                                   i32 rows_per_token = 1, i32 part = 0, i32 parts = 1) {
  i32 first = 0;  // tiles of the sequences before this round's 32
  for (i32 base = 0; base < batch; base += 32) {
    const i32 b = base + lane_idx;
    i32 tiles = 0, skipped = 0;
    if (b < batch) {
      const i32 tokens = ld_global_i32(cu_seqlens + b + 1) - ld_global_i32(cu_seqlens + b);
      const i32 all = ceil_div(tokens * rows_per_token, kRows);
      skipped = all * part / parts;
      tiles = all * (part + 1) / parts - skipped;
    }
    i32 end = tiles;  // inclusive prefix sum
#pragma unroll
    for (i32 delta = 1; delta < 32; delta *= 2) {
      const i32 before = i32(shfl_up_u32(u32(end), delta));
      end += lane_idx >= delta ? before : 0;
    }
    const u32 behind = vote_ballot(
        first + end <= tile);  // sequences that end before this tile: a run of low lanes
    if (behind != 0xffffffffu) {
      i32 owner = 0;
      while ((behind >> owner) & 1u) {
        ++owner;
      }
      const i32 begin = first + i32(shfl_idx_u32(u32(end - tiles - skipped), owner));
      return {base + owner, tile - begin};
    }
    first += i32(shfl_idx_u32(u32(end), 31));
  }
  return {batch, tile - first};
}
