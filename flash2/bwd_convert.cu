// flash2/bwd_convert.cu: rounds dQ, behind bwd.cu. Launched by flash2/bwd.py.
// dq = dq_accum * dqk_scale, rounded to 16 bits; the splits of the deterministic mode are added up
// in order. Rows that take no part (past seqused_q, behind the last packed sequence) become zero.
// CTA: kStatRows query rows of one head. Limited by memory bandwidth.
#include "prelude.cuh"  // generated for this problem: struct Cfg

#include "flash2/device/bwd_strips.cuh"
#include "common/ptx/griddepcontrol.cuh"

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) flash2_bwd_convert(GRID_CONSTANT BwdParams p) {
  if constexpr (Cfg::kProgrammatic) {
    griddepcontrol_launch_dependents();
    griddepcontrol_wait();
  }
  const QueryWork work = query_work<Cfg>(p, thread_idx() % 32);
  const SeqlenInfo& seq = work.seq;
  const i32 rows = imin(seq.slot_q - work.first_row, kStatRows);
  if (rows <= 0) {
    return;
  }
  u16* dq = static_cast<u16*>(p.dq) +
            (work.batch_idx * p.dq_batch_stride + work.head_idx * p.dq_head_stride +
             (seq.q_row + work.first_row) * p.dq_row_stride);
  convert_strips<Cfg, Cfg::kHeadDimQk, Cfg::kAccumColumns, Cfg::kVectorAtomics>(
      accum_rows<Cfg>(p, seq, work.batch_idx, work.head_idx, 0, work.first_row),
      p.accum_split_stride, Cfg::kDeterministic ? p.num_splits : 1, dq, p.dq_row_stride, rows,
      seq.seqlen_q - work.first_row, p.dqk_scale);
}
