// flash2/bwd_convert.cu: the last of the backward's three kernels. Launched by flash2/bwd.py.
// dq = dq_accum * dqk_scale, rounded to 16 bits; the splits of the deterministic mode are added up
// in order. Rows that take no part (past seqused_q, behind the last packed sequence) become zero.
// CTA: kStatRows query rows of one head. Limited by memory bandwidth.
#include "prelude.cuh"  // generated for this problem: struct Cfg

#include "common/device/bwd_work.cuh"
#include "common/device/row_io.cuh"

// Columns of a strip of 16 rows are cut into pieces of 8, the width of a fragment. An item is one
// such piece of two rows, `row` and `row + kRowStep`: 64 contiguous bytes of the fragment, or 32
// contiguous bytes of each element index.
constexpr i32 kPieces = Cfg::kAccumColumns / 8;
constexpr i32 kItemsPerStrip = kPieces * 8;
constexpr i32 kRowStep = Cfg::kVectorAtomics ? 8 : 1;

// Adds the item's 2 rows x 8 columns of one split. src: the fragment.
DEVICE void add_item(f32 (&sum)[2][8], const f32* src, i32 row) {
#pragma unroll
  for (i32 i = 0; i < 4; ++i) {
    u32 words[4];
    if constexpr (Cfg::kVectorAtomics) {  // the four elements of lane 4 * row + i
      ld_global_v4(words, src + accum_offset<Cfg>(4 * row + i, 0));
#pragma unroll
      for (i32 e = 0; e < 4; ++e) {
        sum[e / 2][2 * i + e % 2] += bits_as_f32(words[e]);
      }
    } else {  // one element of the four lanes that have row + r
      const i32 r = i / 2, parity = i % 2;
      ld_global_v4(words, src + accum_offset<Cfg>(4 * (row % 8 + r), 2 * (row / 8) + parity));
#pragma unroll
      for (i32 q = 0; q < 4; ++q) {
        sum[r][2 * q + parity] += bits_as_f32(words[q]);
      }
    }
  }
}

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) flash2_bwd_convert(GRID_CONSTANT BwdParams p) {
  const QueryWork work = query_work<Cfg>(p, thread_idx() % 32);
  const SeqlenInfo& seq = work.seq;
  const i32 rows = imin(seq.slot_q - work.first_row, kStatRows);
  if (rows <= 0) {
    return;
  }
  const i32 strips = ceil_div(rows, kAccumRows);
  u16* dq = static_cast<u16*>(p.dq) +
            (work.batch_idx * p.dq_batch_stride + work.head_idx * p.dq_head_stride +
             (seq.q_row + work.first_row) * p.dq_row_stride);
#pragma unroll 2
  for (i32 i = thread_idx(); i < strips * kItemsPerStrip; i += Cfg::kNumThreads) {
    const i32 strip = i / kItemsPerStrip, piece = i % kPieces;
    const i32 row = i / kPieces % 8 * (Cfg::kVectorAtomics ? 1 : 2);
    const i32 first = strip * kAccumRows + row;
    f32 sum[2][8] = {};
    if (work.first_row + first < seq.seqlen_q) {
      for (i32 split = 0; split < (Cfg::kDeterministic ? p.num_splits : 1); ++split) {
        const f32* src = accum_rows<Cfg>(p, seq, work.batch_idx, work.head_idx, split,
                                         work.first_row + strip * kAccumRows);
        add_item(sum, src + piece * kFragmentFloats, row);
      }
    }
#pragma unroll
    for (i32 r = 0; r < 2; ++r) {
      const i32 out_row = first + r * kRowStep;
      if (out_row < rows) {
        const bool exists = work.first_row + out_row < seq.seqlen_q;
        u32 words[4];
#pragma unroll
        for (i32 q = 0; q < 4; ++q) {
          const u32 pair =
              pack2<Cfg::kBf16>(sum[r][2 * q] * p.dqk_scale, sum[r][2 * q + 1] * p.dqk_scale);
          words[q] = exists ? pair : 0;
        }
        store_eight<Cfg::kGradVectorBytes>(dq + out_row * p.dq_row_stride + piece * 8, words,
                                           Cfg::kHeadDimQk - piece * 8);
      }
    }
  }
}
