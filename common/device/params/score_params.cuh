// What softmax.cuh and score.cuh read: from a product to a score. params.cuh says how to read this.
// Host: common/features/score.py.
#pragma once
#include "common/ptx/base.cuh"

struct SoftmaxParams {
  f32 softmax_scale_log2;  // softmax_scale * log2(e)
};
struct ScoreParams {
  f32 softcap_in, softcap_out;  // Cfg::kSoftcap: softmax_scale / softcap and softcap * log2(e)
  const f32* alibi_slopes;      // Cfg::kAlibi; (num_heads_q,) or (batch, num_heads_q)
  i64 alibi_batch_stride, alibi_head_stride;
};
