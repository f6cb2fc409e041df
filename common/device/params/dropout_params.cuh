// What dropout.cuh reads. params.cuh says how to read this. Host: common/features/dropout.py.
#pragma once
#include "common/ptx/base.cuh"

// With Cfg::kDropout.
struct DropoutParams {
  const i64* rng_state;  // (2,) = seed, offset
  u32 keep_threshold;    // an element is kept when its random byte is <= this
  f32 keep_scale;        // 1 / (1 - dropout_p)
  f32 keep_probability;  // 1 - dropout_p
};
