// Attention sinks, as sink.cuh reads them. Host: common/features/sink.py.
#pragma once
#include "common/ptx/base.cuh"

struct SinkParams {
  const f32* s_aux;  // Cfg::kSink; (num_heads_q,), the logit of each head's sink
};
