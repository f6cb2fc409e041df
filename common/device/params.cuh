// Parameter blocks of the kernels, the one definition: common/params.py derives the host's packing
// from this text and that of bwd_params.cuh. Grouped by reader. Strides count elements. "nullable"
// pointers are 0 when the feature is off.
#pragma once
#include "common/device/bwd_params.cuh"
#include "common/device/params/dropout_params.cuh"
#include "common/device/params/kv_params.cuh"
#include "common/device/params/lengths_params.cuh"
#include "common/device/params/mask_params.cuh"
#include "common/device/params/score_params.cuh"
#include "common/device/params/sink_params.cuh"
#include "common/ptx/base.cuh"
#include "common/ptx/tensor_map.cuh"

// Attention forward (flash2/fwd.cu). Packed sequences ("varlen"): batch strides are 0 and
// cu_seqlens give the first rows.
struct FwdTensorParams {
  // Inputs and outputs. Row and head strides are free, the last dim is contiguous.
  const void*
      q;  // (batch, seqlen_q, num_heads_q, head_dim_qk) or (total_q, num_heads_q, head_dim_qk)
  const void* k;     // (batch, seqlen_k, num_heads_k, head_dim_qk) or (total_k, ...)
  const void* v;     // (batch, seqlen_k, num_heads_v, head_dim_v) or (total_k, ...)
  void* out;         // (batch, seqlen_q, num_heads_q, head_dim_v) or (total_q, ...)
  f32* softmax_lse;  // nullable; (batch, num_heads_q, seqlen_q) or (num_heads_q, total_q), natural
                     // log
  void* s_dmask;  // Cfg::kReturnSoftmax; (batch, num_heads_q, dmask_rows, dmask_cols), sign bit set
                  // = dropped
  i64 q_batch_stride, q_row_stride, q_head_stride;
  i64 k_batch_stride, k_row_stride, k_head_stride;
  i64 v_batch_stride, v_row_stride, v_head_stride;
  i64 out_batch_stride, out_row_stride, out_head_stride;
  i64 lse_batch_stride, lse_head_stride;
  i64 dmask_rows, dmask_cols;
};
struct FwdWorkParams {
  i32 num_heads_q, qhead_per_khead, qhead_per_vhead;

  // tile_scheduler.cuh: order of the CTAs.
  i32 tiles_per_unit;  // query tiles of one unit: dense (batch, head) pair, varlen head
  i32 num_units;
  i32 units_per_group;  // units worked on together, so that their K and V stay in L2
};
struct FwdParams : FwdTensorParams,
                   LengthsParams,
                   FwdWorkParams,
                   MaskParams,
                   SoftmaxParams,
                   ScoreParams,
                   SinkParams,
                   DropoutParams,
                   KvParams {};

// Attention forward on Hopper (hopper/fwd.cu). Tensors are known by their maps, whose dims
// row_coords in hopper/row_coords.cuh names.
struct HopperFwdTensorParams {
  TensorMap q_map;    // boxes of 64 rows
  TensorMap k_map;    // boxes of Cfg::kBlockN rows
  TensorMap v_map;    // boxes of Cfg::kBlockN rows
  TensorMap out_map;  // boxes of 64 rows
  i32 k_batch_rows;   // Cfg::kRaggedK: rows from one sequence of k to the next; 0 if packed
  i32 v_batch_rows;
  f32* softmax_lse;  // nullable; (batch, num_heads_q, seqlen_q) or (num_heads_q, total_q), natural
                     // log
  i64 lse_batch_stride, lse_head_stride;
};
struct HopperFwdWorkParams {
  i32 num_heads_q, qhead_per_khead, qhead_per_vhead;

  // hopper/tile_scheduler.cuh: order of the tiles.
  u32* tile_counter;   // nullable: CTAs take turns instead of drawing; 0 before and after a launch
  i32 num_tiles;       // tiles_per_unit * num_units
  i32 tiles_per_unit;  // as in FwdParams
  i32 num_units;
  i32 units_per_group;
};
struct HopperFwdParams : HopperFwdTensorParams,
                         LengthsParams,
                         HopperFwdWorkParams,
                         MaskParams,
                         SoftmaxParams,
                         ScoreParams,
                         SinkParams,
                         DropoutParams {
  // Cfg::kGqaGroup > 1: out by address instead of out_map. As in FwdParams.
  void* out;
  i64 out_batch_stride, out_row_stride, out_head_stride;
};

// Attention of few query rows over a cache (flash2/decode.cu). The keys of a sequence are divided
// into splits, which CTAs work on independently.
struct DecodeParams : LengthsParams, MaskParams, SoftmaxParams, ScoreParams, SinkParams, KvParams {
  const void* q;  // (batch, seqlen_q, num_heads_q, head_dim_qk) or (total_q, ...)
  const void* k;  // (last_slot + 1, rows, num_heads_k, head_dim_qk): a slot is a sequence or a page
  const void* v;  // (last_slot + 1, rows, num_heads_v, head_dim_v)
  const void* qv;  // Cfg::kQv: (batch, seqlen_q, num_heads_q, head_dim_v) or (total_q, ...)
  void* out;  // (batch, seqlen_q, num_heads_q, head_dim_v) or (total_q, ...); Cfg::kSplit: fp32,
              // one such tensor per split, each normalised by itself, undefined where the split
              // has no key
  f32* softmax_lse;  // nullable unless Cfg::kSplit; (batch, num_heads_q, seqlen_q) or (num_heads_q,
                     // total_q), natural log; Cfg::kSplit: one per split
  i64 q_batch_stride, q_row_stride, q_head_stride;
  i64 k_batch_stride, k_row_stride, k_head_stride;
  i64 v_batch_stride, v_row_stride, v_head_stride;
  i64 qv_batch_stride, qv_row_stride, qv_head_stride;
  i64 out_split_stride, out_batch_stride, out_row_stride, out_head_stride;
  i64 lse_split_stride, lse_batch_stride, lse_head_stride;

  // decode_work.cuh: what a CTA works on.
  i32 num_units, heads_per_unit;  // heads_per_unit query heads share one K head and one V head
  i32 num_tiles;                  // of all sequences of a unit
  i32 tiles_per_sequence;         // of kBlockM packed rows; not with Cfg::kVarlenQ
  i32 num_splits, num_mergers;    // num_mergers: at most 32, see decode_output.cuh
  i32 refill_first;  // 1: more bytes on their way, for CTAs alone on an SM; 0: not; same results
  // For divide() of elem.cuh: by the above and by the query heads of a K head and of a V head.
  u64 by_units, by_heads_per_unit, by_tiles, by_tiles_per_sequence, by_splits, by_khead, by_vhead;

  // Cfg::kSplit: merge of the splits by the last num_mergers CTAs of a tile.
  u64* split_counters;  // nullable: by another launch; (num_tiles, num_units), 0 before and after
  void* merged_out;     // as out without Cfg::kSplit
  f32* merged_lse;      // nullable; as softmax_lse without Cfg::kSplit, strides as above
  i64 merged_batch_stride, merged_row_stride, merged_head_stride;  // of merged_out
};

// Merge of splits (flash2/combine.cu): attention over disjoint sets of keys into that over all.
struct CombineParams : SinkParams {
  const f32*
      out_partial;  // (num_splits, batch, seqlen, num_heads, head_dim_v), last dim contiguous
  const f32* lse_partial;  // (num_splits, batch, seqlen, num_heads), seqlen contiguous; a split
                           // with -inf has no part in the row, and its out_partial is not read
  void* out;               // (batch, seqlen, num_heads, head_dim_v), of Cfg's type
  f32* softmax_lse;        // nullable; (batch, seqlen, num_heads), seqlen contiguous
  i64 partial_split_stride, partial_batch_stride, partial_row_stride, partial_head_stride;
  i64 lse_partial_split_stride, lse_partial_batch_stride, lse_partial_head_stride;
  i64 out_batch_stride, out_row_stride, out_head_stride;
  i64 lse_batch_stride, lse_head_stride;
  i64 num_rows;  // batch * seqlen * num_heads
  i32 seqlen, num_heads, num_splits;
};

// Attention over more keys, added to a result in place (flash2/merge.cu).
struct MergeParams {
  void* out;         // (batch, rows, num_heads, head_dim_v), last dim contiguous, of Cfg's type
  f32* softmax_lse;  // (batch, num_heads, rows), rows contiguous; so is that of the part
  const void* part;  // (batch, seqlen, num_heads, head_dim_v), last dim contiguous
  const f32* lse_part;
  const i64* rows;  // nullable; (seqlen,): the row of out of each row of the part, none twice
  i64 out_batch_stride, out_row_stride, out_head_stride;
  i64 part_batch_stride, part_row_stride, part_head_stride;
  i64 lse_batch_stride, lse_head_stride;
  i64 lse_part_batch_stride, lse_part_head_stride;
  i64 num_rows;  // batch * seqlen * num_heads
  i32 seqlen, num_heads;
};

// New keys and values into a cache, and queries rotated (flash2/append.cu). Here page_table and
// cache_batch_idx are nullable, and leftpad_k is not read.
struct AppendParams : KvParams {
  // New rows, (batch, seqlen_new, heads, head_dim) or (total_new, ...), and the caches that take
  // them, (last_slot + 1, rows, heads, head_dim). Last dims are contiguous.
  const void* k_new;
  const void* v_new;
  void* k_cache;
  void* v_cache;
  i64 k_new_batch_stride, k_new_row_stride, k_new_head_stride;
  i64 v_new_batch_stride, v_new_row_stride, v_new_head_stride;
  i64 k_batch_stride, k_row_stride, k_head_stride;
  i64 v_batch_stride, v_row_stride, v_head_stride;
  const i32* cu_seqlens_k_new;  // nullable; (batch + 1,)
  i32 seqlen_new, new_rows;     // new_rows: of k_new in memory
  i32 num_heads_k, num_heads_v;
  i32 head_dim_qk, head_dim_v;

  // Cfg::kRotary: queries, copied to q_rotated, contiguous of the same shape.
  const void* q;  // (batch, seqlen_q, num_heads_q, head_dim_qk) or (total_q, ...)
  void* q_rotated;
  i64 q_batch_stride, q_row_stride, q_head_stride;
  const i32* cu_seqlens_q;  // nullable; (batch + 1,)
  i32 seqlen_q, q_rows, num_heads_q;
  i32 rotary_dim, rotary_rows;
  i32 rotary_per_row;      // 0: all rows of q turn by the first one's position
  const void* rotary_cos;  // (rotary_rows, rotary_dim / 2)
  const void* rotary_sin;
  const i32* rotary_seqlens;  // nullable: cache_seqlens; (batch,), positions of the first rows

  // Lengths in the cache.
  const i32* cache_seqlens;  // nullable: cached_keys; (batch,), keys before the append
  i32* seqused_k;            // result: (batch,), keys after it
  i32 batch, seqlen_k, cached_keys;

  i32 k_ctas, v_ctas;  // order of the CTAs: rows of K, of V, of Q
};
