// What a CTA of flash2/decode.cu works on: a tile of query rows of one sequence and unit, against
// one split of the keys. A unit is a run of query heads that share one K head and one V head; its
// query rows are packed, all heads of a token next to each other.
#pragma once
#include "flash2/device/kv_source.cuh"
#include "common/device/mask.cuh"
#include "common/device/packed_tiles.cuh"

struct DecodeWork {
  i32 batch_idx, split_idx;
  i32 first_head;  // query head of the unit's first rows
  i32 first_row;   // of the tile: a packed row, token * heads_per_unit + head
  SeqlenInfo seq;
};

// CTAs: units fastest, which lie side by side in the cache, then tiles, then splits.
template <class Cfg>
DEVICE DecodeWork decode_work(const DecodeParams& p, i32 lane_idx) {
  DecodeWork work;
  const i32 tile_of_split = divide(block_idx(), p.by_units);
  work.first_head = (block_idx() - tile_of_split * p.num_units) * p.heads_per_unit;
  work.split_idx = divide(tile_of_split, p.by_tiles);
  const i32 tile = tile_of_split - work.split_idx * p.num_tiles;
  if constexpr (Cfg::kVarlenQ) {
    const PackedTile packed =
        find_packed_tile<Cfg::kBlockM>(p.cu_seqlens_q, p.batch, tile, lane_idx, p.heads_per_unit);
    work.first_row = packed.tile * Cfg::kBlockM;
    if (packed.batch_idx == p.batch) {  // rows behind the last sequence: no query, no key
      const i32 packed_rows = ld_global_i32(p.cu_seqlens_q + p.batch);
      work.batch_idx = 0;
      work.seq = SeqlenInfo{packed_rows, 0, p.total_q - packed_rows, 0, 0, 0};
      return work;
    }
    work.batch_idx = packed.batch_idx;
  } else {
    work.batch_idx = divide(tile, p.by_tiles_per_sequence);
    work.first_row = (tile - work.batch_idx * p.tiles_per_sequence) * Cfg::kBlockM;
  }
  work.seq = seqlen_info<Cfg>(p, work.batch_idx);
  enter_cache<Cfg>(work.seq, p, work.batch_idx);
  return work;
}

// Key tiles of kBlockN that the CTA visits: its split of those that its rows see. Splits are equal
// to within a round of kTilesPerRound tiles. They depend on the lengths, so that a short sequence
// in a large cache is divided as evenly as a long one.
template <class Cfg, i32 kTilesPerRound>
DEVICE TileRange split_tiles(const DecodeParams& p, const DecodeWork& work) {
  const i32 first_token = divide(work.first_row, p.by_heads_per_unit);
  const i32 last_token = divide(work.first_row + Cfg::kBlockM - 1, p.by_heads_per_unit);
  TileRange tiles = key_tiles<Cfg>(p, work.seq, first_token, last_token - first_token + 1);
  if constexpr (Cfg::kSplit) {
    const i32 rounds = ceil_div(tiles.end - tiles.begin, kTilesPerRound);
    const i32 fewest = divide(rounds, p.by_splits);
    const i32 longer = rounds - fewest * p.num_splits;  // splits, the first ones
    const i32 first_round = work.split_idx * fewest + imin(work.split_idx, longer);
    const i32 end_round = first_round + fewest + (work.split_idx < longer);
    tiles.end = imin(tiles.begin + end_round * kTilesPerRound, tiles.end);
    tiles.begin += first_round * kTilesPerRound;
  }
  return tiles;
}
