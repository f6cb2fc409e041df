// Parameter blocks of the backward; params.cuh, which includes this file, says how to read them.
#pragma once
#include "common/device/params/dropout_params.cuh"
#include "common/device/params/lengths_params.cuh"
#include "common/device/params/mask_params.cuh"
#include "common/device/params/score_params.cuh"
#include "common/ptx/base.cuh"
#include "common/ptx/tensor_map.cuh"

// Attention backward: one block for its kernels, flash2/bwd_preprocess.cu, bwd.cu, bwd_convert.cu
// and, where CTAs share K or V heads, bwd_sum.cu, in this order. Gradients and inputs have free row
// and head strides and a contiguous last dim; batch strides are 0 when packed.
struct BwdTensorParams {
  // What the forward read and wrote, and the gradients of its outputs.
  const void* q;           // (batch, seqlen_q, num_heads_q, head_dim_qk) or (total_q, ...)
  const void* k;           // (batch, seqlen_k, num_heads_k, head_dim_qk) or (total_k, ...)
  const void* v;           // (batch, seqlen_k, num_heads_v, head_dim_v) or (total_k, ...)
  const void* out;         // (batch, seqlen_q, num_heads_q, head_dim_v) or (total_q, ...)
  const void* dout;        // like out
  const f32* softmax_lse;  // (batch, num_heads_q, seqlen_q) or (num_heads_q, total_q); infinite of
                           // either sign = empty row
  const f32* dlse;         // nullable; like softmax_lse
  i64 q_batch_stride, q_row_stride, q_head_stride;
  i64 k_batch_stride, k_row_stride, k_head_stride;
  i64 v_batch_stride, v_row_stride, v_head_stride;
  i64 out_batch_stride, out_row_stride, out_head_stride;
  i64 dout_batch_stride, dout_row_stride, dout_head_stride;
  i64 lse_batch_stride, lse_head_stride;

  // Results.
  void* dq;  // like q
  void* dk;  // like k
  void* dv;  // like v
  i64 dq_batch_stride, dq_row_stride, dq_head_stride;
  i64 dk_batch_stride, dk_row_stride, dk_head_stride;
  i64 dv_batch_stride, dv_row_stride, dv_head_stride;

  // Between the kernels; bwd_work.cuh says where a sequence lies in them.
  f32* softmax_d;  // (batch, num_heads_q, seqlen_q rounded up to 128) or (num_heads_q, total_q +
                   // 128 * batch)
  f32* lse_log2;   // like softmax_d: softmax_lse * log2(e), +inf where the row sees no key or does
                   // not exist
  f32* dq_accum;  // (num_splits, batch, num_heads_q, rows, Cfg::kAccumColumns), sums of dS K before
                  // softmax_scale
  f32* dk_accum;  // nullable: no two CTAs share a row of dk; else (k splits, batch, num_heads_k,
                  // key_accum_rows, columns), unscaled
  f32* dv_accum;  // likewise (v splits, batch, num_heads_v, key_accum_rows, columns)
  i64 key_accum_rows;                       // of one head; packed: of all sequences, and batch is 1
  i64 stat_batch_stride, stat_head_stride;  // of softmax_d and lse_log2
  i64 accum_split_stride, accum_batch_stride, accum_head_stride;
};
struct BwdWorkParams {
  i32 total_k;  // rows of k in memory
  i32 num_heads_q, qhead_per_khead, qhead_per_vhead;

  // bwd_work.cuh: order of the CTAs.
  i32 heads_per_group;  // query heads that share K or V: lcm(qhead_per_khead, qhead_per_vhead)
  i32 heads_per_cta;    // of these, in a CTA of bwd.cu; fewer in a group's last
  i32 ctas_per_group;
  i32 k_tiles_per_unit, k_units;  // bwd.cu: key tiles (deterministic: splits) of one unit; units
  i32 k_tiles_per_phase, k_units_per_turn;
  i32 q_tiles_per_unit;  // bwd_preprocess.cu, bwd_convert.cu: 128-row tiles of one unit
  i32 k_sum_tiles;       // bwd_sum.cu: 128-row tiles of one head
  i32 num_splits;        // of dq_accum; 1 unless Cfg::kDeterministic
};
// Factors of bwd.cu and of what adds up its results.
struct BwdScaleParams {
  f32 dqk_scale;  // of dQ and dK: softmax_scale, times keep_scale, times 2^-kProbabilityShift, over
                  // ds_scale
  f32 dv_scale;   // keep_scale, times 2^-kProbabilityShift
};
struct BwdParams : BwdTensorParams,
                   LengthsParams,
                   BwdWorkParams,
                   MaskParams,
                   SoftmaxParams,
                   ScoreParams,
                   BwdScaleParams,
                   DropoutParams {
  f32 ds_scale;  // Cfg::kScaleDs: dS in 16 bits is times this power of two, lest it overflow
};

// Attention backward on Hopper (hopper/bwd.cu): the block of the kernels before and after it, and
// the maps of what TMA loads. Row coordinates: hopper/row_coords.cuh.
struct HopperBwdParams : BwdParams {
  TensorMap q_map;                    // boxes of Cfg::kBlockM rows
  TensorMap dout_map;                 // boxes of Cfg::kBlockM rows
  TensorMap k_map;                    // boxes of Cfg::kBlockN rows
  TensorMap v_map;                    // boxes of Cfg::kBlockN rows
  i32 q_batch_rows, dout_batch_rows;  // Cfg::kRaggedQ: rows from one sequence to the next; 0 if
                                      // packed
  i32 k_batch_rows, v_batch_rows;     // Cfg::kRaggedK: likewise
};
