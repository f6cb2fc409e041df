// Copies of bwd.cu, global -> shared. Reads Cfg: include "prelude.cuh" first. Change elsewhere: the
// copy itself -> tile_copy.cuh, shared memory -> bwd_warps.cuh.
#pragma once
#include "flash2/device/bwd_warps.cuh"
#include "common/device/bwd_work.cuh"

// First element of one head of one sequence.
DEVICE const void* head_base(const void* base, i64 offset) {
  return static_cast<const char*>(base) + offset * kElemBytes;
}

// Copies of Q with lse and of dO with D. `part` of kParts: spread over the steps of a product.
struct Loader {
  const BwdParams& p;
  const KeyWork& work;
  const Lane& lane;
  u32 smem;

  DEVICE u32 sQ(i32 stage) const { return smem + Smem::kQ + u32(stage * LayoutQ::kBytes); }
  DEVICE u32 sDo(i32 stage) const { return smem + Smem::kDo + u32(stage * LayoutDo::kBytes); }
  DEVICE u32 sLse(i32 stage) const { return smem + Smem::kLse + u32(stage) * Smem::kStatBytes; }
  DEVICE u32 sD(i32 stage) const { return smem + Smem::kD + u32(stage) * Smem::kStatBytes; }

  // num_rows: of the sequence; 0 where there is no such step, which fills the stage with zeros and
  // needs no branch.
  template <i32 kParts>
  DEVICE void load_q(const Cursor& at, i32 num_rows, i32 stage, i32 part) const {
    const i32 first_row = at.m_block * Cfg::kBlockM;
    const Copy<LayoutQ, Cfg::kHeadDimQk> copy(
        head_base(p.q, work.batch_idx * p.q_batch_stride + at.head_idx * p.q_head_stride +
                           work.seq.q_row * p.q_row_stride),
        p.q_row_stride, lane.thread_idx);
    copy.template load_part<kParts>(sQ(stage), first_row, num_rows, part);
    if (part == 0) {
      load_stat(sLse(stage), p.lse_log2, at.head_idx, first_row, num_rows);
    }
  }
  template <i32 kParts>
  DEVICE void load_do(const Cursor& at, i32 num_rows, i32 stage, i32 part) const {
    const i32 first_row = at.m_block * Cfg::kBlockM;
    const Copy<LayoutDo, Cfg::kHeadDimV> copy(
        head_base(p.dout, work.batch_idx * p.dout_batch_stride + at.head_idx * p.dout_head_stride +
                              work.seq.q_row * p.dout_row_stride),
        p.dout_row_stride, lane.thread_idx);
    copy.template load_part<kParts>(sDo(stage), first_row, num_rows, part);
    if (part == 0) {
      load_stat(sD(stage), p.softmax_d, at.head_idx, first_row, num_rows);
    }
  }
  // What the first step needs.
  DEVICE void load_first(const Cursor& at, i32 first_key) const {
    load_kv(at.head_idx, first_key);
    load_q<1>(at, work.seq.seqlen_q, 0, 0);
    load_do<1>(at, work.seq.seqlen_q, 0, 0);
    cp_async_commit_group();
  }

 private:
  // K and V that query head head_idx reads.
  DEVICE void load_kv(i32 head_idx, i32 first_key) const {
    const SeqlenInfo& seq = work.seq;
    const i64 b = work.batch_idx, head_k = head_idx / p.qhead_per_khead,
              head_v = head_idx / p.qhead_per_vhead;
    Copy<LayoutK, Cfg::kHeadDimQk>(head_base(p.k, b * p.k_batch_stride + head_k * p.k_head_stride +
                                                      seq.k_row * p.k_row_stride),
                                   p.k_row_stride, lane.thread_idx)
        .load(smem + Smem::kK, first_key, seq.seqlen_k);
    Copy<LayoutV, Cfg::kHeadDimV>(head_base(p.v, b * p.v_batch_stride + head_v * p.v_head_stride +
                                                     seq.k_row * p.v_row_stride),
                                  p.v_row_stride, lane.thread_idx)
        .load(smem + Smem::kV, first_key, seq.seqlen_k);
  }
  // One fp32 per query, padded by bwd_preprocess.cu to whole tiles.
  DEVICE void load_stat(u32 dst, const f32* stat, i32 head_idx, i32 first_row, i32 num_rows) const {
    if (lane.thread_idx < Cfg::kBlockM) {
      const f32* row = stat + work.batch_idx * p.stat_batch_stride + head_idx * p.stat_head_stride +
                       stat_row<Cfg>(work.seq, work.batch_idx) + first_row + lane.thread_idx;
      cp_async_4(dst + u32(lane.thread_idx) * 4, row, num_rows > 0 ? 4 : 0);
    }
  }
};
