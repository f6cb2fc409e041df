// What mask.cuh reads: which keys a query sees. params.cuh says how to read this. Host:
// common/features/mask.py.
#pragma once
#include "common/ptx/base.cuh"

// Windows are clamped by the host so that index arithmetic fits 32 bits.
struct MaskParams {
  i32 window_left, window_right;  // Cfg::kLocal; negative = unlimited
  i32 attention_chunk;            // Cfg::kChunk
};
