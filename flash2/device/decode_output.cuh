// The end of a CTA of flash2/decode.cu: its teams' results are merged, then, by the last CTAs that
// finish one, those of the splits. Included by decode.cu only, after the prelude.
#pragma once
#include "flash2/device/decode_work.cuh"
#include "common/device/sink.cuh"
#include "common/device/softmax.cuh"
#include "flash2/device/split_sum.cuh"
#include "flash2/device/decode_layout.cuh"

// Puts the warp's rows of O and their statistics into shared memory for the merge.
DEVICE void hand_over(const f32 (&rO)[kMTiles][kNTilesO][4], OnlineSoftmax<kMTiles>& softmax,
                      const Lane& lane, u32 smem, f32 to_log2) {
  softmax.finish();
#pragma unroll
  for (i32 m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (i32 r = 0; r < 2; ++r) {
      const u32 team_row = u32(lane.team_idx * Cfg::kBlockM + lane.row(m, 2 * r));
      const f32 sum = softmax.row_sum[m][r];
      if (lane.lane_idx % 4 == 0 && lane.warp_col == 0) {
        const u32 stats = smem + Smem::kStats + team_row * 8;
        // A team without a key for the row takes no part, whatever its maximum.
        st_shared_f32(stats,
                      sum > 0.0f ? softmax.row_max[m][r] * to_log2 : bits_as_f32(kNegInfBits));
        st_shared_f32(stats + 4, sum);
      }
      const u32 sO = smem + Smem::kO + team_row * Smem::kORowBytes;
#pragma unroll
      for (i32 n = 0; n < kNTilesO; ++n) {
        st_shared_u64(sO + u32((lane.warp_col + lane.col(n, 0)) * 4),
                      u64(f32_as_bits(rO[m][n][2 * r + 1])) << 32 | f32_as_bits(rO[m][n][2 * r]));
      }
    }
  }
}

// Stores four elements at dst in vectors of kOutVectorBytes, those that begin below `valid`
// elements.
DEVICE void store_four(char* dst, const f32 (&x)[4], i32 valid) {
  const u32 words[2] = {pack2<Cfg::kBf16>(x[0], x[1]), pack2<Cfg::kBf16>(x[2], x[3])};
  if constexpr (Cfg::kOutVectorBytes == 8) {
    st_global_u64(dst, u64(words[1]) << 32 | words[0]);
  } else {
#pragma unroll
    for (i32 i = 0; i < 4; i += Cfg::kOutVectorBytes / 2) {
      if (i < valid) {
        if constexpr (Cfg::kOutVectorBytes == 4) {
          st_global_u32(dst + 2 * i, words[i / 2]);
        } else {
          st_global_u16(dst + 2 * i, u16(words[i / 2] >> (i % 2 * 16)));
        }
      }
    }
  }
}

// Rows of the tile that exist, behind the last query of a packed buffer too.
DEVICE i32 rows_of_tile(const DecodeParams& p, const DecodeWork& work) {
  return imin(work.seq.slot_q * p.heads_per_unit - work.first_row, i32(Cfg::kBlockM));
}

// What a row needs of the teams' statistics, by one lane for its warp.
struct RowMerge {
  f32 weight[kNumTeams];  // of the teams' O, which they make sum up to the row's
  i64 out;                // its first element
  i32 state;              // what there is to be done: nothing, zeros, or a merge
};
enum RowState { kRowSkipped, kRowEmpty, kRowMerged };

DEVICE RowMerge merge_stats(const DecodeParams& p, const DecodeWork& work, u32 smem, i32 row) {
  RowMerge merge = {};
  if (row >= rows_of_tile(p, work)) {
    return merge;
  }
  const u32 stats = smem + Smem::kStats + u32(row) * 8;
  f32 row_max = bits_as_f32(kNegInfBits);
#pragma unroll
  for (i32 t = 0; t < kNumTeams; ++t) {
    merge.weight[t] = ld_shared_f32(stats + t * Cfg::kBlockM * 8);
    row_max = fmaxf(row_max, merge.weight[t]);
  }
  const i32 token = divide(work.first_row + row, p.by_heads_per_unit);
  const i32 head = work.first_head + work.first_row + row - token * p.heads_per_unit;
  const bool empty = row_max == bits_as_f32(kNegInfBits) || token >= work.seq.seqlen_q;
  f32 sum = 0.0f;
#pragma unroll
  for (i32 t = 0; t < kNumTeams; ++t) {
    merge.weight[t] = empty ? 0.0f : ex2_approx(merge.weight[t] - row_max);
    sum += merge.weight[t] * ld_shared_f32(stats + t * Cfg::kBlockM * 8 + 4);
  }
  f32 scale = empty ? 0.0f : 1.0f / sum;
  constexpr bool kSinkHere = Cfg::kSink && !Cfg::kSplit;  // of splits it enters once, merged
  SinkRow with;
  if constexpr (kSinkHere) {
    with = with_sink(empty ? bits_as_f32(kNegInfBits) : kLn2 * (row_max + lg2_approx(sum)),
                     ld_global_f32(p.s_aux + head));
    scale *= with.share;
  }
#pragma unroll
  for (i32 t = 0; t < kNumTeams; ++t) {
    merge.weight[t] *= scale;
  }
  if (p.softmax_lse != nullptr) {
    f32* lse = p.softmax_lse + work.split_idx * p.lse_split_stride +
               work.batch_idx * p.lse_batch_stride + head * p.lse_head_stride + work.seq.q_row;
    st_global_f32(lse + token, kSinkHere ? with.lse
                               : empty   ? bits_as_f32(kNegInfBits)
                                         : kLn2 * (row_max + lg2_approx(sum)));
  }
  merge.out = work.split_idx * p.out_split_stride + work.batch_idx * p.out_batch_stride +
              head * p.out_head_stride + (work.seq.q_row + token) * p.out_row_stride;
  merge.state = !empty ? kRowMerged : Cfg::kSplit ? kRowSkipped : kRowEmpty;
  return merge;
}

// Merges the teams' results, a row per warp and four columns per lane, and writes the rows that the
// tile owns. Rows without visible keys get zeros and -inf; of a split only -inf.
DEVICE void store_output(const DecodeParams& p, const DecodeWork& work, const Lane& lane,
                         u32 smem) {
  constexpr i32 kWarps = Cfg::kNumThreads / 32;
  constexpr i32 kRows = ceil_div(Cfg::kBlockM, kWarps);  // of a warp: warp_idx + i * kWarps
  static_assert(kRows <= 32, "a lane prepares one of them");
  const RowMerge lane_row = merge_stats(
      p, work, smem, lane.lane_idx < kRows ? lane.warp_idx + lane.lane_idx * kWarps : Cfg::kBlockM);
  const auto of_row = [](u32 value, i32 i) { return shfl_idx_u32(value, i); };
#pragma unroll 2
  for (i32 i = 0; i < kRows; ++i) {
    const i32 state = i32(of_row(u32(lane_row.state), i));
    if (state == kRowSkipped) {
      continue;
    }
    const i64 out_row =
        i64(u64(of_row(u32(u64(lane_row.out) >> 32), i)) << 32 | of_row(u32(lane_row.out), i));
    f32 weight[kNumTeams];
#pragma unroll
    for (i32 t = 0; t < kNumTeams; ++t) {
      weight[t] = bits_as_f32(of_row(f32_as_bits(lane_row.weight[t]), i));
    }
    const u32 sO = smem + Smem::kO + u32(lane.warp_idx + i * kWarps) * Smem::kORowBytes;
#pragma unroll
    for (i32 col = lane.lane_idx * 4; col < Cfg::kHeadDimV; col += 128) {
      u32 bits[kNumTeams][4];
#pragma unroll
      for (i32 t = 0; t < kNumTeams; ++t) {
        ld_shared_v4(bits[t], sO + u32(t * Cfg::kBlockM) * Smem::kORowBytes + u32(col) * 4);
      }
      f32 x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (i32 t = 0; t < kNumTeams; ++t) {
#pragma unroll
        for (i32 c = 0; c < 4; ++c) {
          x[c] += weight[t] * bits_as_f32(bits[t][c]);
        }
      }
      if constexpr (Cfg::kSplit) {  // rows are padded to four columns
        const u32 words[4] = {f32_as_bits(x[0]), f32_as_bits(x[1]), f32_as_bits(x[2]),
                              f32_as_bits(x[3])};
        st_global_v4(static_cast<f32*>(p.out) + out_row + col, words);
      } else {
        store_four(static_cast<char*>(p.out) + (out_row + col) * kElemBytes, x,
                   Cfg::kHeadDimV - col);
      }
    }
  }
}

// A tile's counter: CTAs that have written their split (bits 0-15); mergers that will not look at
// the counter again (16-31); shares of rows that were handed over (32-63, one bit each).
constexpr u64 kLeft = u64(1) << 16, kShare = u64(1) << 32;
// Times that a CTA looks for the others to arrive, 0.6 us each: longer than CTAs that run at the
// same time are apart.
constexpr i32 kMaxLooks = 64;
DEVICE i32 num_arrived(u64 count) { return i32(count & 0xffff); }
DEVICE i32 num_left(u64 count) { return i32(count >> 16 & 0xffff); }

// Which of the p.num_mergers shares of a tile's rows this CTA, which has written its split, has to
// merge, one bit each. They go to the last CTAs of the tile to get here, one each: these wait for
// each other. As nothing says that all CTAs run at the same time, a CTA waits for a while only;
// then it hands its share over to the very last one.
//   share: this CTA's place among the last ones; negative if it is none of them.
DEVICE u32 shares_to_merge(const DecodeParams& p, u64* counter, i32& share) {
  u64 count = atomic_add_acq_rel_global_u64(counter, 1);
  share = num_arrived(count) - (p.num_splits - p.num_mergers);
  if (share == p.num_mergers - 1) {
    return u32(count >> 32) | 1u << share;
  }
  if (share >= 0) {
#pragma unroll 1
    for (i32 i = 0; i < kMaxLooks && num_arrived(count) < p.num_splits; ++i) {
      count = ld_acquire_global_u64(counter);
    }
    if (num_arrived(count) < p.num_splits) {
      count = atomic_add_acq_rel_global_u64(counter, kShare << share);
    }
    return num_arrived(count) == p.num_splits ? 1u << share : 0;
  }
  return 0;
}

// With fewer splits a warp than these, warps have rows of their own.
constexpr i32 kMinSplitsPerWarp = 8;

// Merges the splits of one share of the tile's rows: first, first + p.num_mergers... Where there
// are many splits, several warps share a row.
DEVICE void merge_share(const DecodeParams& p, const DecodeWork& work, const Lane& lane, u32 smem,
                        i32 first) {
  constexpr i32 kWarps = Cfg::kNumThreads / 32;
  using Sum = SplitSum<Cfg::kHeadDimV>;
  i32 log_sharing = 0;
  while ((2 << log_sharing) <= kWarps && (kMinSplitsPerWarp << log_sharing) < p.num_splits) {
    ++log_sharing;
  }
  const i32 sharing = 1 << log_sharing;
  const i32 rows_at_once = kWarps >> log_sharing;
  const i32 row_of_warp = lane.warp_idx >> log_sharing;  // rows_at_once: of none
  const i32 warp_of_row = lane.warp_idx & (sharing - 1);
  const u32 s_sums = smem + Smem::kSplitSums, s_stats = smem + Smem::kSplitStats;
  const i32 rows = rows_of_tile(p, work);
#pragma unroll 1
  for (i32 begin = first; begin < rows; begin += rows_at_once * p.num_mergers) {
    const i32 row = row_of_warp < rows_at_once ? begin + row_of_warp * p.num_mergers : rows;
    const i32 token_of_sequence = divide(work.first_row + row, p.by_heads_per_unit);
    const i64 token = work.seq.q_row + token_of_sequence;
    const i32 head = work.first_head + work.first_row + row - token_of_sequence * p.heads_per_unit;
    const i64 lse_row = work.batch_idx * p.lse_batch_stride + head * p.lse_head_stride + token;
    Sum sum;
    if (row < rows) {
      const i64 out_row = work.batch_idx * p.out_batch_stride + head * p.out_head_stride +
                          token * p.out_row_stride + warp_of_row * p.out_split_stride;
      sum.add<Smem::kSplitsAhead>(
          static_cast<const f32*>(p.out) + out_row, p.out_split_stride << log_sharing,
          p.softmax_lse + lse_row + warp_of_row * p.lse_split_stride,
          p.lse_split_stride << log_sharing,
          (p.num_splits - warp_of_row + sharing - 1) >> log_sharing,
          smem + Smem::kSplitRows + u32(lane.warp_idx) * (Smem::kSplitsAhead * Sum::kRowBytes),
          lane.lane_idx);
    }
    if (sharing > 1) {
      cta_sync();  // the sums of the rows before have been read
      sum.hand_over(s_sums + u32(lane.warp_idx) * Sum::kRowBytes, s_stats + u32(lane.warp_idx) * 8,
                    lane.lane_idx);
      cta_sync();
#pragma unroll 1
      for (i32 w = lane.warp_idx + 1; warp_of_row == 0 && row < rows && w < lane.warp_idx + sharing;
           ++w) {
        sum.add_sum(s_sums + u32(w) * Sum::kRowBytes, s_stats + u32(w) * 8, lane.lane_idx);
      }
    }
    if (row >= rows || warp_of_row > 0) {
      continue;
    }
    SinkRow with = {sum.lse(), 1.0f};
    if constexpr (Cfg::kSink) {
      with = with_sink(with.lse, ld_global_f32(p.s_aux + head));
    }
    if (p.merged_lse != nullptr && lane.lane_idx == 0) {
      st_global_f32(p.merged_lse + lse_row, with.lse);
    }
    char* out = static_cast<char*>(p.merged_out) +
                (work.batch_idx * p.merged_batch_stride + head * p.merged_head_stride +
                 token * p.merged_row_stride) *
                    kElemBytes;
    const f32 scale = sum.weight > 0.0f ? (Cfg::kSink ? with.share : 1.0f) / sum.weight : 0.0f;
#pragma unroll
    for (i32 j = 0; j < Sum::kVectors; ++j) {
      const i32 col = j * 128 + lane.lane_idx * 4;
      if (col < Cfg::kHeadDimV) {
        const f32 x[4] = {sum.rO[j][0] * scale, sum.rO[j][1] * scale, sum.rO[j][2] * scale,
                          sum.rO[j][3] * scale};
        store_four(out + col * kElemBytes, x, Cfg::kHeadDimV - col);
      }
    }
  }
}

// Merges what falls to this CTA once all splits of the tile are written.
DEVICE void merge_splits(const DecodeParams& p, const DecodeWork& work, const Lane& lane,
                         u32 smem) {
  u64* counter = p.split_counters + (block_idx() - work.split_idx * (p.num_units * p.num_tiles));
  i32 share = -1;  // thread 0 knows it
  cta_sync();      // all have written, and are done with shared memory
  if (lane.thread_idx == 0) {
    st_shared_u32(smem + Smem::kShares, shares_to_merge(p, counter, share));
  }
  cta_sync();
  u64 count = 0;  // looked at when the work is done, so that nothing waits for it
  if (share >= 0) {
    count = atomic_add_global_u64(counter, kLeft);
  }
  u32 shares = ld_shared_u32(smem + Smem::kShares);
  for (i32 i = 0; shares != 0; ++i, shares >>= 1) {
    if (shares & 1) {
      merge_share(p, work, lane, smem, i);
    }
  }
  if (share >= 0 && num_left(count) == p.num_mergers - 1) {
    st_global_u64(counter, 0);  // for the next launch
  }
}
