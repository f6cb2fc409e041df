// Where one sequence lies and how long it is: the one answer for dense, packed (cu_seqlens) and
// partly used (seqused) inputs.
#pragma once
#include "common/device/elem.cuh"
#include "common/device/params.cuh"
#include "common/ptx/memory.cuh"

struct SeqlenInfo {
  i64 q_row, k_row;  // first row of the sequence in its packed tensor; 0 when dense
  i32 slot_q;        // query rows that the sequence owns in out and softmax_lse
  i32 seqlen_q;      // of these, the rows that take part; the rest get the defined empty row
  i32 seqlen_k;
  i32 diagonal;  // seqlen_k - seqlen_q: query i is aligned with key i + diagonal (bottom-right)
};

template <class Cfg, class Params>
DEVICE SeqlenInfo seqlen_info(const Params& p, i32 batch_idx) {
  SeqlenInfo seq;
  seq.q_row = seq.k_row = 0;
  seq.slot_q = p.seqlen_q;
  seq.seqlen_k = p.seqlen_k;
  if constexpr (Cfg::kVarlenQ) {
    const i32 begin = ld_global_i32(p.cu_seqlens_q + batch_idx);
    seq.q_row = begin;
    seq.slot_q = ld_global_i32(p.cu_seqlens_q + batch_idx + 1) - begin;
  }
  if constexpr (Cfg::kVarlenK) {
    const i32 begin = ld_global_i32(p.cu_seqlens_k + batch_idx);
    seq.k_row = begin;
    seq.seqlen_k = ld_global_i32(p.cu_seqlens_k + batch_idx + 1) - begin;
  }
  seq.seqlen_q = seq.slot_q;
  if (p.seqused_q != nullptr) {
    seq.seqlen_q = imin(seq.slot_q, imax(ld_global_i32(p.seqused_q + batch_idx), 0));
  }
  if (p.seqused_k != nullptr) {
    seq.seqlen_k = imin(seq.seqlen_k, imax(ld_global_i32(p.seqused_k + batch_idx), 0));
  }
  seq.diagonal = seq.seqlen_k - seq.seqlen_q;
  return seq;
}
