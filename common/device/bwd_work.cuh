// What a CTA of the backward works on, and where a sequence's rows lie in the buffers between its
// kernels. bwd.cu goes by key tiles; bwd_preprocess.cu and bwd_convert.cu by tiles of kStatRows
// query rows, bwd_sum.cu by as many key rows. Grids are one-dimensional; flash2/bwd_schedule.py
// sizes them.
#pragma once
#include "common/device/mask.cuh"
#include "common/device/packed_tiles.cuh"
#include "common/device/params.cuh"
#include "common/device/seqlen.cuh"

// softmax_d and lse_log2 give each sequence room for whole tiles of so many rows; no query tile is
// larger.
constexpr i32 kStatRows = 128;
// dq_accum, dk_accum and dv_accum likewise, in fragments of 16 rows.
constexpr i32 kAccumRows = 16;

// First row of a sequence in softmax_d and lse_log2.
template <class Cfg>
DEVICE i64 stat_row(const SeqlenInfo& seq, i32 batch_idx) {
  return Cfg::kVarlenQ ? seq.q_row + i64(batch_idx) * kStatRows : 0;
}
// First row of a sequence in dq_accum, a multiple of kAccumRows.
template <class Cfg>
DEVICE i64 accum_row(const SeqlenInfo& seq, i32 batch_idx) {
  return Cfg::kVarlenQ ? (seq.q_row / kAccumRows + batch_idx) * kAccumRows : 0;
}

// First row of a sequence in dk_accum and dv_accum.
template <class Cfg>
DEVICE i64 key_accum_row(const SeqlenInfo& seq, i32 batch_idx) {
  return Cfg::kVarlenK ? (seq.k_row / kAccumRows + batch_idx) * kAccumRows : 0;
}

// These hold 16 x 8 fragments as mma leaves them, those of one 16-row strip one after another. One
// add of a warp to dq_accum covers contiguous bytes: one element of each lane, or
// (Cfg::kVectorAtomics) all four, as dk_accum and dv_accum always have it.
constexpr i32 kFragmentFloats = 128;
// Element `element` of lane lane_idx inside a fragment.
template <bool kLaneByLane>
DEVICE i32 fragment_offset(i32 lane_idx, i32 element) {
  return kLaneByLane ? lane_idx * 4 + element : element * 32 + lane_idx;
}

template <class Cfg>
DEVICE f32* accum_rows(const BwdParams& p, const SeqlenInfo& seq, i32 batch_idx, i32 head_idx,
                       i32 split, i32 first_row) {
  return p.dq_accum + split * p.accum_split_stride + batch_idx * p.accum_batch_stride +
         head_idx * p.accum_head_stride +
         (accum_row<Cfg>(seq, batch_idx) + first_row) * Cfg::kAccumColumns;
}

// Cfg::kOrdered: behind dq_accum lies a counter for each strip of kAccumRows rows, of the key tiles
// that have been added to it. Where one counter serves several strips, it is the first one's.
template <class Cfg>
DEVICE u32* strip_counter(const BwdParams& p, const f32* strip) {
  constexpr u32 kUnits = Cfg::kAccumColumns / 16;  // of 256 floats, in a strip
  static_assert(Cfg::kAccumColumns % 16 == 0);
  const u32 unit = u32(u64(strip - p.dq_accum) / (kAccumRows * 16));
  return reinterpret_cast<u32*>(p.dq_accum + p.accum_split_stride) + unit / kUnits;
}

// The first of the key tiles of num_keys that see query tile m_block, according to query_tiles(),
// if any do: the one with the first key of the first query, because neither end of a range goes
// back from one query to the next. For the same reason those that see it are neighbours.
template <class Cfg, class Params>
DEVICE i32 first_key_tile(const Params& p, const SeqlenInfo& seq, i32 m_block, i32 num_keys) {
  return imax(row_keys<Cfg>(p, seq, m_block * Cfg::kBlockM).begin, 0) / num_keys;
}

// Row first_row of a sequence in part `split` of dk_accum or dv_accum. heads: of K or V.
template <class Cfg>
DEVICE f32* key_accum_rows(f32* accum, i32 columns, const BwdParams& p, const SeqlenInfo& seq,
                           i32 batch_idx, i32 heads, i32 head_idx, i32 split, i32 first_row) {
  const i64 sequence = Cfg::kVarlenK ? split : i64(split) * p.batch + batch_idx;
  return accum + ((sequence * heads + head_idx) * p.key_accum_rows +
                  key_accum_row<Cfg>(seq, batch_idx) + first_row) *
                     columns;
}

// CTAs of a group of query heads that contribute to a head of K or V, whose first query head within
// the group is first_head: split 0 of its accumulator is that of CTA first_cta.
struct Contributors {
  i32 first_cta, count;
};
DEVICE Contributors contributors(const BwdParams& p, i32 head_idx, i32 qheads_per_head) {
  const i32 first_head = head_idx * qheads_per_head % p.heads_per_group;
  const i32 first_cta = first_head / p.heads_per_cta;
  return {first_cta, (first_head + qheads_per_head - 1) / p.heads_per_cta - first_cta + 1};
}

// Query rows of bwd_preprocess.cu and bwd_convert.cu. Behind the last packed sequence batch_idx is
// 0 and seqlen_q 0.
struct QueryWork {
  i32 batch_idx, head_idx;
  i32 first_row;  // within the sequence
  bool tail;      // no sequence: rows of the packed buffer that belong to none
  SeqlenInfo seq;
};

// Order: heads fastest, because their rows are neighbours in memory.
template <class Cfg>
DEVICE QueryWork query_work(const BwdParams& p, i32 lane_idx) {
  QueryWork work;
  const i32 tile = block_idx() / p.num_heads_q;
  work.head_idx = block_idx() % p.num_heads_q;
  work.tail = false;
  if constexpr (Cfg::kVarlenQ) {
    const PackedTile packed = find_packed_tile<kStatRows>(p.cu_seqlens_q, p.batch, tile, lane_idx);
    work.first_row = packed.tile * kStatRows;
    if (packed.batch_idx == p.batch) {
      const i32 packed_rows = ld_global_i32(p.cu_seqlens_q + p.batch);
      work.tail = true;
      work.batch_idx = 0;
      work.seq = SeqlenInfo{packed_rows, 0, p.total_q - packed_rows, 0, 0, 0};
      return work;
    }
    work.batch_idx = packed.batch_idx;
  } else {
    work.batch_idx = tile / p.q_tiles_per_unit;
    work.first_row = tile % p.q_tiles_per_unit * kStatRows;
  }
  work.seq = seqlen_info<Cfg>(p, work.batch_idx);
  return work;
}

// Key tiles of bwd.cu.
struct KeyWork {
  i32 batch_idx;
  i32 first_head, end_head;  // query heads
  i32 n_block;  // first key tile; deterministic: the CTA goes on with every num_splits-th
  i32 split;    // of dq_accum
  i32 slot_k;   // key rows that the sequence owns in dk and dv
  SeqlenInfo seq;
};

// Packed sequences whose first keys are seen by most queries: these parts of all sequences take
// turns, the first first.
constexpr i32 kPackedPhases = 4;

// A unit is a CTA's query heads in one sequence or, packed and not deterministic, in all sequences.
// When causal, most queries see the first keys, so these go first: the last CTAs are short, and all
// SMs end together. But units that work at the same time share the L2 cache. So the tiles of a unit
// are cut into phases of k_tiles_per_phase; in a phase k_units_per_turn units take a turn, tile by
// tile.
//   cta: of the launch.  kTileKeys: keys of a tile.
template <class Cfg, i32 kTileKeys>
DEVICE KeyWork key_work(const BwdParams& p, i32 cta, i32 lane_idx) {
  const i32 ctas_per_phase = p.k_tiles_per_phase * p.k_units;
  const i32 first_tile = cta / ctas_per_phase * p.k_tiles_per_phase;
  const i32 in_phase = cta % ctas_per_phase;
  const i32 tiles = imin(p.k_tiles_per_phase, p.k_tiles_per_unit - first_tile);
  const i32 ctas_per_turn = p.k_units_per_turn * tiles;
  const i32 first_unit = in_phase / ctas_per_turn * p.k_units_per_turn;
  const i32 in_turn = in_phase % ctas_per_turn;
  const i32 units = imin(p.k_units_per_turn, p.k_units - first_unit);
  const i32 unit = first_unit + in_turn % units;
  const i32 rank = first_tile + in_turn / units;
  const i32 units_per_sequence = p.num_heads_q / p.heads_per_group * p.ctas_per_group;
  const i32 in_sequence = unit % units_per_sequence;

  KeyWork work;
  const i32 group_begin = in_sequence / p.ctas_per_group * p.heads_per_group;
  work.first_head = group_begin + in_sequence % p.ctas_per_group * p.heads_per_cta;
  work.end_head = imin(work.first_head + p.heads_per_cta, group_begin + p.heads_per_group);
  work.batch_idx = unit / units_per_sequence;
  work.n_block = rank;
  work.split = Cfg::kDeterministic ? rank : 0;
  if constexpr (Cfg::kVarlenK && !Cfg::kDeterministic) {
    constexpr i32 kPhases = Cfg::kCausal ? kPackedPhases : 1;
    PackedTile packed{p.batch, rank};
    for (i32 phase = 0; phase < kPhases && packed.batch_idx == p.batch; ++phase) {
      packed = find_packed_tile<kTileKeys>(p.cu_seqlens_k, p.batch, packed.tile, lane_idx, 1, phase,
                                           kPhases);
    }
    work.batch_idx = packed.batch_idx;
    work.n_block = packed.tile;
  }
  if constexpr (Cfg::kVarlenK) {
    if (work.batch_idx == p.batch) {  // the tail of the packed keys: no query sees it
      const i32 packed_rows = ld_global_i32(p.cu_seqlens_k + p.batch);
      work.batch_idx = 0;
      work.slot_k = p.total_k - packed_rows;
      work.seq = SeqlenInfo{0, packed_rows, 0, 0, 0, 0};
      return work;
    }
    work.slot_k = ld_global_i32(p.cu_seqlens_k + work.batch_idx + 1) -
                  ld_global_i32(p.cu_seqlens_k + work.batch_idx);
  } else {
    work.slot_k = p.seqlen_k;
  }
  work.seq = seqlen_info<Cfg>(p, work.batch_idx);
  return work;
}

// The (head, query tile) pairs of one run over the queries, in order. Each CTA starts at another
// tile and wraps around, so that CTAs which run together add to different parts of dQ.
struct Cursor {
  i32 head_idx, m_block;
  DEVICE void advance(const TileRange& tiles, i32 start) {
    m_block = m_block + 1 == tiles.end ? tiles.begin : m_block + 1;
    head_idx += m_block == start ? 1 : 0;
  }
};

// first_key: of the key tile.
template <class Cfg>
DEVICE i32 first_query_tile(const TileRange& tiles, i32 first_key) {
  const i32 shift = first_key / Cfg::kBlockM;
  return tiles.begin + (Cfg::kRotate ? shift % (tiles.end - tiles.begin) : 0);
}
