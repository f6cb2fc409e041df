// Which keys a query sees: causal, sliding window and attention chunk, as one interval per row.
// Forward and backward. Both bounds never decrease from one row to the next, which is what the tile
// ranges below rest on.
#pragma once
#include "common/device/elem.cuh"
#include "common/device/seqlen.cuh"

struct KeyRange {
  i32 begin, end;  // keys begin .. end - 1
};

// Keys that row `row` sees; empty (end <= begin) when none.
template <class Cfg, class Params>
DEVICE KeyRange row_keys(const Params& p, const SeqlenInfo& seq, i32 row) {
  KeyRange keys{0, seq.seqlen_k};
  const i32 aligned = row + seq.diagonal;  // the key on this row's diagonal
  if constexpr (Cfg::kCausal) {
    keys.end = imin(keys.end, aligned + 1);
  }
  if constexpr (Cfg::kLocal) {
    if (p.window_left >= 0) {
      keys.begin = imax(keys.begin, aligned - p.window_left);
    }
    if (p.window_right >= 0) {
      keys.end = imin(keys.end, aligned + p.window_right + 1);
    }
  }
  if constexpr (Cfg::kChunk) {
    const i32 chunk = p.attention_chunk;
    const i32 below =
        aligned >= 0 ? aligned / chunk : -ceil_div(-aligned, chunk);  // floor, also for negatives
    keys.begin = imax(keys.begin, below * chunk);
    keys.end = imin(keys.end, (below + 1) * chunk);
  }
  return keys;
}

// Tiles of one side that a tile of the other needs, and which of them need no mask: key tiles of
// kBlockN for a query tile in the forward, query tiles of kBlockM for a key tile in the backward.
struct TileRange {
  i32 begin, end;                    // tiles to visit
  i32 interior_begin, interior_end;  // of these, the tiles whose every (query, key) pair is visible
};

template <class Cfg, class Params>
DEVICE TileRange key_tiles(const Params& p, const SeqlenInfo& seq, i32 first_row, i32 num_rows) {
  const i32 last_row = imin(first_row + num_rows, seq.seqlen_q) - 1;
  if (last_row < first_row) {
    return {0, 0, 0, 0};
  }
  const KeyRange first = row_keys<Cfg>(p, seq, first_row);
  const KeyRange last = row_keys<Cfg>(p, seq, last_row);
  TileRange tiles;
  tiles.begin = imax(first.begin, 0) / Cfg::kBlockN;
  tiles.end = imax(ceil_div(imax(last.end, 0), Cfg::kBlockN), tiles.begin);
  tiles.interior_begin = imin(ceil_div(imax(last.begin, 0), Cfg::kBlockN), tiles.end);
  tiles.interior_end =
      imin(imax(imax(first.end, 0) / Cfg::kBlockN, tiles.interior_begin), tiles.end);
  return tiles;
}

// The same rule seen from the keys, for the backward. Queries begin .. end - 1 see key `key`; empty
// when none does.
struct QueryRange {
  i32 begin, end;
};

template <class Cfg, class Params>
DEVICE QueryRange key_queries(const Params& p, const SeqlenInfo& seq, i32 key) {
  if (key >= seq.seqlen_k) {
    return {0, 0};
  }
  QueryRange queries{0, seq.seqlen_q};
  const i32 aligned = key - seq.diagonal;  // the query whose diagonal this key is on
  if constexpr (Cfg::kCausal) {
    queries.begin = imax(queries.begin, aligned);
  }
  if constexpr (Cfg::kLocal) {
    if (p.window_left >= 0) {
      queries.end = imin(queries.end, aligned + p.window_left + 1);
    }
    if (p.window_right >= 0) {
      queries.begin = imax(queries.begin, aligned - p.window_right);
    }
  }
  if constexpr (Cfg::kChunk) {
    const i32 first_key = key / p.attention_chunk * p.attention_chunk;
    queries.begin = imax(queries.begin, first_key - seq.diagonal);
    queries.end = imin(queries.end, first_key - seq.diagonal + p.attention_chunk);
  }
  return queries;
}

// Query tiles of kBlockM that see the key tile starting at first_key. No tile of one that reaches
// past the last key is interior.
template <class Cfg, class Params>
DEVICE TileRange query_tiles(const Params& p, const SeqlenInfo& seq, i32 first_key, i32 num_keys) {
  const i32 last_key = imin(first_key + num_keys, seq.seqlen_k) - 1;
  if (last_key < first_key) {
    return {0, 0, 0, 0};
  }
  const QueryRange first = key_queries<Cfg>(p, seq, first_key);
  const QueryRange last = key_queries<Cfg>(p, seq, last_key);
  TileRange tiles;
  tiles.begin = first.begin / Cfg::kBlockM;
  tiles.end = imax(ceil_div(imax(last.end, 0), Cfg::kBlockM), tiles.begin);
  tiles.interior_begin = imin(ceil_div(last.begin, Cfg::kBlockM), tiles.end);
  // Rows past the last query count as seen: their P is 0 without a mask.
  tiles.interior_end = first.end >= seq.seqlen_q ? tiles.end : imax(first.end, 0) / Cfg::kBlockM;
  tiles.interior_end = imax(imin(tiles.interior_end, tiles.end), tiles.interior_begin);
  if (first_key + num_keys > seq.seqlen_k) {
    tiles.interior_begin = tiles.interior_end = tiles.begin;
  }
  return tiles;
}
