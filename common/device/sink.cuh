// Attention sinks: one more logit in the denominator of a row, with no value. Where a kernel ends a
// row it asks here for the row's lse and for the factor that brings O to the larger denominator.
#pragma once
#include "common/device/score.cuh"

struct SinkRow {
  f32 lse;    // natural, of the keys and the sink
  f32 share;  // of the denominator that belongs to the keys: 0 for a row without any
};

// lse: natural, of the row's keys; -inf without any. sink: the head's logit; -inf: none.
DEVICE SinkRow with_sink(f32 lse, f32 sink) {
  const f32 larger = fmaxf(lse, sink);
  if (larger == bits_as_f32(kNegInfBits)) {
    return {larger, 0.0f};
  }
  const f32 keys = ex2_approx((lse - larger) * kLog2e);
  const f32 sum = keys + ex2_approx((sink - larger) * kLog2e);
  return {larger + kLn2 * lg2_approx(sum), keys / sum};
}
