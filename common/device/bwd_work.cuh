// What a CTA of the backward works on, and where a sequence's rows lie in the buffers between its
// kernels. bwd.cu goes by key tiles; bwd_preprocess.cu and bwd_convert.cu by tiles of kStatRows
// query rows. Grids are one-dimensional.
#pragma once
#include "common/device/packed_tiles.cuh"
#include "common/device/params.cuh"
#include "common/device/seqlen.cuh"

// softmax_d and lse_log2 give each sequence room for whole tiles of so many rows; no query tile is
// larger.
constexpr i32 kStatRows = 128;
// dq_accum likewise, in fragments of 16 rows.
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

// dq_accum holds 16 x 8 fragments as mma leaves them, those of one 16-row strip one after another,
// so that one add of a warp covers contiguous bytes: one element of each lane, or
// (Cfg::kVectorAtomics) all four.
constexpr i32 kFragmentFloats = 128;
// Element `element` of lane lane_idx inside a fragment.
template <class Cfg>
DEVICE i32 accum_offset(i32 lane_idx, i32 element) {
  return Cfg::kVectorAtomics ? lane_idx * 4 + element : element * 32 + lane_idx;
}

template <class Cfg>
DEVICE f32* accum_rows(const BwdParams& p, const SeqlenInfo& seq, i32 batch_idx, i32 head_idx,
                       i32 split, i32 first_row) {
  return p.dq_accum + split * p.accum_split_stride + batch_idx * p.accum_batch_stride +
         head_idx * p.accum_head_stride +
         (accum_row<Cfg>(seq, batch_idx) + first_row) * Cfg::kAccumColumns;
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
  i32 first_head;  // of p.heads_per_cta query heads
  i32 n_block;     // first key tile; deterministic: the CTA goes on with every num_splits-th
  i32 split;       // of dq_accum
  i32 slot_k;      // key rows that the sequence owns in dk and dv
  SeqlenInfo seq;
};

// A unit is a group of heads of one sequence or, packed and not deterministic, of all sequences.
// Units of a group of k_units_per_group share the L2 cache; inside a group the first keys go first
// (when causal, most queries see them).
template <class Cfg>
DEVICE KeyWork key_work(const BwdParams& p, i32 lane_idx) {
  const i64 tiles_per_group = i64(p.k_units_per_group) * p.k_tiles_per_unit;
  const i32 group = i32(block_idx() / tiles_per_group);
  const i32 in_group = i32(block_idx() - group * tiles_per_group);
  const i32 first_unit = group * p.k_units_per_group;
  const i32 units = imin(p.k_units_per_group, p.k_units - first_unit);
  const i32 unit = first_unit + in_group % units;
  const i32 rank = in_group / units;
  const i32 head_groups = p.num_heads_q / p.heads_per_cta;

  KeyWork work;
  work.first_head = unit % head_groups * p.heads_per_cta;
  work.batch_idx = unit / head_groups;
  work.n_block = rank;
  work.split = Cfg::kDeterministic ? rank : 0;
  if constexpr (Cfg::kVarlenK && !Cfg::kDeterministic) {
    const PackedTile packed =
        find_packed_tile<Cfg::kBlockN>(p.cu_seqlens_k, p.batch, rank, lane_idx);
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
