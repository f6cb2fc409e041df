// flash2/bwd_sum.cu: dK and dV where several CTAs of bwd.cu, each with some of the query heads of a
// group, share a K or V head: the sum of what they left, in order of their heads, scaled and
// rounded to 16 bits. Launched by flash2/bwd.py behind bwd.cu, only then.
// CTA: kStatRows key rows of one head, first those of K, then those of V. Limited by memory
// bandwidth.
#include "prelude.cuh"  // generated for this problem: struct Cfg

#include "flash2/device/bwd_strips.cuh"
#include "common/ptx/griddepcontrol.cuh"

// Of one head of K or V.
struct KeyRows {
  i32 batch_idx, head_idx;
  i32 first_row;  // within the sequence
  i32 rows;       // that the CTA writes
  SeqlenInfo seq;
};

// Order: heads fastest, as in query_work.
DEVICE KeyRows key_rows(const BwdParams& p, i32 cta, i32 heads, i32 lane_idx) {
  KeyRows work;
  const i32 tile = cta / heads;
  work.head_idx = cta % heads;
  i32 slot_k = p.seqlen_k;
  if constexpr (Cfg::kVarlenK) {
    const PackedTile packed = find_packed_tile<kStatRows>(p.cu_seqlens_k, p.batch, tile, lane_idx);
    work.first_row = packed.tile * kStatRows;
    if (packed.batch_idx == p.batch) {  // the tail of the packed keys
      const i32 packed_rows = ld_global_i32(p.cu_seqlens_k + p.batch);
      work.batch_idx = 0;
      work.rows = imin(p.total_k - packed_rows - work.first_row, kStatRows);
      work.seq = SeqlenInfo{0, packed_rows, 0, 0, 0, 0};
      return work;
    }
    work.batch_idx = packed.batch_idx;
    slot_k = ld_global_i32(p.cu_seqlens_k + packed.batch_idx + 1) -
             ld_global_i32(p.cu_seqlens_k + packed.batch_idx);
  } else {
    const i32 tiles_per_sequence = ceil_div(p.seqlen_k, kStatRows);
    work.batch_idx = tile / tiles_per_sequence;
    work.first_row = tile % tiles_per_sequence * kStatRows;
  }
  work.rows = imin(slot_k - work.first_row, kStatRows);
  work.seq = seqlen_info<Cfg>(p, work.batch_idx);
  return work;
}

template <i32 kHeadDim, i32 kColumns>
DEVICE void sum_rows(const BwdParams& p, i32 cta, i32 qheads_per_head, f32* accum, void* gradient,
                     i64 batch_stride, i64 head_stride, i64 row_stride, f32 scale) {
  const i32 heads = p.num_heads_q / qheads_per_head;
  const KeyRows work = key_rows(p, cta, heads, thread_idx() % 32);
  if (work.rows <= 0) {
    return;
  }
  u16* dst = static_cast<u16*>(gradient) + work.batch_idx * batch_stride +
             work.head_idx * head_stride + (work.seq.k_row + work.first_row) * row_stride;
  const i64 split_stride = (Cfg::kVarlenK ? 1 : p.batch) * heads * p.key_accum_rows * i64(kColumns);
  convert_strips<Cfg, kHeadDim, kColumns, true>(
      key_accum_rows<Cfg>(accum, kColumns, p, work.seq, work.batch_idx, heads, work.head_idx, 0,
                          work.first_row),
      split_stride, contributors(p, work.head_idx, qheads_per_head).count, dst, row_stride,
      work.rows, work.seq.seqlen_k - work.first_row, scale);
}

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) flash2_bwd_sum(GRID_CONSTANT BwdParams p) {
  if constexpr (Cfg::kProgrammatic) {
    griddepcontrol_launch_dependents();
    griddepcontrol_wait();
  }
  const i32 k_ctas =
      p.dk_accum == nullptr ? 0 : p.k_sum_tiles * (p.num_heads_q / p.qhead_per_khead);
  if (block_idx() < k_ctas) {
    sum_rows<Cfg::kHeadDimQk, Cfg::kAccumColumns>(p, block_idx(), p.qhead_per_khead, p.dk_accum,
                                                  p.dk, p.dk_batch_stride, p.dk_head_stride,
                                                  p.dk_row_stride, p.dqk_scale);
  } else {
    sum_rows<Cfg::kHeadDimV, Cfg::kVColumns>(p, block_idx() - k_ctas, p.qhead_per_vhead, p.dv_accum,
                                             p.dv, p.dv_batch_stride, p.dv_head_stride,
                                             p.dv_row_stride, p.dv_scale);
  }
}
