// flash2/bwd_preprocess.cu: the first of the backward's kernels. Launched by flash2/bwd.py.
//   softmax_d = rowsum(dO * O) - dlse     (dlse: the gradient of softmax_lse, whose own is P)
//   lse_log2 = softmax_lse in units of log2, +inf (P = 0) for rows without keys and for rows that
//              only fill up a tile
//   dq_accum = 0, and its counters if Cfg::kOrdered
// CTA: kStatRows query rows of one head. Limited by memory bandwidth.
#include "prelude.cuh"  // generated for this problem: struct Cfg

#include "common/device/bwd_work.cuh"
#include "common/device/row_io.cuh"
#include "common/device/score.cuh"
#include "common/ptx/griddepcontrol.cuh"
#include "common/ptx/shuffle.cuh"

constexpr u32 kPosInfBits = 0x7f800000u;

// A row belongs to kThreadsPerRow neighbouring lanes.
constexpr i32 kVectorsPerRow = ceil_div(Cfg::kHeadDimV * kElemBytes, Cfg::kVectorBytes);
constexpr i32 kThreadsPerRow = kVectorsPerRow >= 32 ? 32
                               : kVectorsPerRow > 8 ? 16
                               : kVectorsPerRow > 4 ? 8
                                                    : 4;
constexpr i32 kRowsPerPass = Cfg::kNumThreads / kThreadsPerRow;
static_assert(kStatRows % kRowsPerPass == 0 &&
              Cfg::kHeadDimV * kElemBytes % Cfg::kVectorBytes == 0);

// This lane's share of sum(a * b) over one row.
DEVICE f32 partial_dot(const char* a, const char* b, i32 lane_in_row) {
  f32 sum = 0.0f;
#pragma unroll
  for (i32 i = 0; i < ceil_div(kVectorsPerRow, kThreadsPerRow); ++i) {
    const i32 vector = lane_in_row + i * kThreadsPerRow;
    if (kVectorsPerRow % kThreadsPerRow == 0 || vector < kVectorsPerRow) {
      u32 a_words[kVectorWords<Cfg::kVectorBytes>], b_words[kVectorWords<Cfg::kVectorBytes>];
      load_vector<Cfg::kVectorBytes>(a_words, a + vector * Cfg::kVectorBytes);
      load_vector<Cfg::kVectorBytes>(b_words, b + vector * Cfg::kVectorBytes);
#pragma unroll
      for (i32 w = 0; w < kVectorWords<Cfg::kVectorBytes>; ++w) {
        sum += low_as_f32<Cfg::kBf16>(a_words[w]) * low_as_f32<Cfg::kBf16>(b_words[w]);
        sum += high_as_f32<Cfg::kBf16>(a_words[w]) * high_as_f32<Cfg::kBf16>(b_words[w]);
      }
    }
  }
  return sum;
}

DEVICE void zero_accum(const BwdParams& p, const QueryWork& work) {
  const i32 rows = imin(round_up(work.seq.seqlen_q, kAccumRows) - work.first_row, kStatRows);
  const u32 zeros[4] = {0, 0, 0, 0};
  for (i32 split = 0; split < p.num_splits; ++split) {
    f32* dst = accum_rows<Cfg>(p, work.seq, work.batch_idx, work.head_idx, split, work.first_row);
#pragma unroll 4
    for (i32 i = thread_idx(); i < rows * Cfg::kAccumColumns / 4; i += Cfg::kNumThreads) {
      st_global_v4(dst + i * 4, zeros);
    }
  }
  if constexpr (Cfg::kOrdered) {
    if (thread_idx() < rows / kAccumRows) {
      st_global_u32(strip_counter<Cfg>(p, accum_rows<Cfg>(p, work.seq, work.batch_idx,
                                                          work.head_idx, 0, work.first_row)) +
                        thread_idx(),
                    0);
    }
  }
}

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) flash2_bwd_preprocess(GRID_CONSTANT BwdParams p) {
  if constexpr (Cfg::kProgrammatic) {
    griddepcontrol_launch_dependents();
  }
  const QueryWork work = query_work<Cfg>(p, thread_idx() % 32);
  const SeqlenInfo& seq = work.seq;
  // Packed: nothing reads what lies behind a sequence's last tile. Dense: softmax_d goes to callers
  // whole.
  if (work.tail || work.first_row >= round_up(seq.slot_q, kStatRows)) {
    return;
  }
  const i64 b = work.batch_idx;
  const i64 g_row = seq.q_row + work.first_row;
  const char* out =
      static_cast<const char*>(p.out) +
      (b * p.out_batch_stride + work.head_idx * p.out_head_stride + g_row * p.out_row_stride) *
          kElemBytes;
  const char* dout =
      static_cast<const char*>(p.dout) +
      (b * p.dout_batch_stride + work.head_idx * p.dout_head_stride + g_row * p.dout_row_stride) *
          kElemBytes;
  const i64 lse_row = b * p.lse_batch_stride + work.head_idx * p.lse_head_stride + g_row;
  const i64 stat = b * p.stat_batch_stride + work.head_idx * p.stat_head_stride +
                   stat_row<Cfg>(seq, work.batch_idx) + work.first_row;
  const i32 lane_in_row = thread_idx() % kThreadsPerRow;

#pragma unroll 4
  for (i32 row = thread_idx() / kThreadsPerRow; row < kStatRows; row += kRowsPerPass) {
    const bool exists = work.first_row + row < seq.seqlen_q;
    f32 lse = bits_as_f32(kPosInfBits), d = 0.0f;
    if (exists) {
      lse = ld_global_f32(p.softmax_lse + lse_row + row);
      d = partial_dot(dout + row * p.dout_row_stride * kElemBytes,
                      out + row * p.out_row_stride * kElemBytes, lane_in_row);
    }
#pragma unroll
    for (i32 lanes = kThreadsPerRow / 2; lanes > 0; lanes /= 2) {
      d += shfl_xor_f32(d, lanes);
    }
    const bool empty = fabsf(lse) == bits_as_f32(kPosInfBits);
    if (exists && !empty && p.dlse != nullptr) {
      d -= ld_global_f32(p.dlse + lse_row + row);
    }
    if (lane_in_row == 0) {
      st_global_f32(p.softmax_d + stat + row, empty ? 0.0f : d);
      st_global_f32(p.lse_log2 + stat + row, empty ? bits_as_f32(kPosInfBits) : lse * kLog2e);
    }
  }
  zero_accum(p, work);
}
