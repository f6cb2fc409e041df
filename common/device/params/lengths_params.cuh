// What seqlen.cuh reads: where each sequence lies and how long it is. params.cuh says how to read
// this. Host: common/features/lengths.py.
#pragma once
#include "common/ptx/base.cuh"

struct LengthsParams {
  const i32* cu_seqlens_q;  // Cfg::kVarlenQ; (batch + 1,)
  const i32* cu_seqlens_k;  // Cfg::kVarlenK; (batch + 1,)
  const i32* seqused_q;     // nullable; (batch,), rows of each slot that take part
  const i32* seqused_k;     // nullable; (batch,)
  i32 batch, seqlen_q, seqlen_k, total_q;
};
