// The end of a query tile in hopper/fwd.cu: a warpgroup's O and softmax_lse on their way to memory.
// Included by fwd.cu only.
#pragma once
#include "common/device/score.cuh"
#include "common/device/sink.cuh"
#include "common/ptx/barrier.cuh"
#include "common/ptx/stmatrix.cuh"
#include "common/ptx/tma.cuh"
#include "hopper/fwd_layout.cuh"
#include "hopper/softmax.cuh"

struct Epilogue {
  const HopperFwdParams& p;
  i32 wg_idx, warp_idx, lane_idx;
  bool is_leader;  // one thread of the warpgroup

  // Normalises O and stores the rows that the sequence owns; writes softmax_lse if it is wanted.
  // Rows without visible keys get zeros and -inf. Ends with a barrier of the warpgroup, behind its
  // last use of Q.
  //   row: of the first row, as in Item.  slice: shared address of Q or P, where O is staged.
  DEVICE void store(const Work& work, i32 row, RowSoftmax& done, const f32 (&rO)[kRegsO],
                    u32 slice) const {
    const f32 to_log2 = Score<Cfg>::kPrescaled ? 1.0f : p.softmax_scale_log2;
    done.finish();
    bool empty[2];
    f32 scale[2];
#pragma unroll
    for (i32 r = 0; r < 2; ++r) {
      const i32 query_row = (row + 8 * r) / kGqaGroup;
      empty[r] = query_row >= work.seq.seqlen_q || !(done.row_sum[r] > 0.0f);
      scale[r] = 1.0f / done.row_sum[r];
      if constexpr (Cfg::kDropout) {
        scale[r] *= p.keep_scale;
      }
      SinkRow with;
      if constexpr (Cfg::kSink) {
        const i32 head_idx = work.head_idx + (row + 8 * r) % kGqaGroup;
        with = with_sink(empty[r] ? bits_as_f32(kNegInfBits) : done.lse(r, to_log2),
                         ld_global_f32(p.s_aux + head_idx));
        scale[r] *= with.share;
      }
      if (p.softmax_lse != nullptr && lane_idx % 4 == 0 && wg_idx % Cfg::kVSplit == 0 &&
          owns_row(r) && query_row < work.seq.slot_q) {
        f32* lse = p.softmax_lse + work.batch_idx * p.lse_batch_stride +
                   (work.head_idx + (row + 8 * r) % kGqaGroup) * p.lse_head_stride + work.seq.q_row;
        st_global_f32(lse + query_row, Cfg::kSink ? with.lse
                                       : empty[r] ? bits_as_f32(kNegInfBits)
                                                  : done.lse(r, to_log2));
      }
    }
    if constexpr (kGqaGroup > 1) {
      store_rows(work, row, rO, empty, scale);
      named_barrier_sync(kBarOutput + wg_idx, 128);
    } else {
      store_tile(work, rO, empty, scale, slice);
    }
  }

 private:
  // Packed GQA: whether this thread's row r is one of the warpgroup's kWgQueries * kGqaGroup.
  DEVICE bool owns_row(i32 r) const {
    return kWgRows % kGqaGroup == 0 ||
           warp_idx * 16 + lane_idx / 4 + 8 * r < kWgQueries * kGqaGroup;
  }

  // O of rows that belong to several heads, straight from registers.
  DEVICE void store_rows(const Work& work, i32 row, const f32 (&rO)[kRegsO], const bool (&empty)[2],
                         const f32 (&scale)[2]) const {
    const i32 first_col = wg_idx % Cfg::kVSplit * Cfg::kWgmmaPvN + 2 * (lane_idx % 4);
#pragma unroll
    for (i32 r = 0; r < 2; ++r) {
      const i32 query_row = (row + 8 * r) / kGqaGroup;
      if (!owns_row(r) || query_row >= work.seq.slot_q) {
        continue;
      }
      char* out = static_cast<char*>(p.out) +
                  2 * (work.batch_idx * p.out_batch_stride +
                       (work.seq.q_row + query_row) * p.out_row_stride +
                       (work.head_idx + (row + 8 * r) % kGqaGroup) * p.out_head_stride);
#pragma unroll
      for (i32 i = 2 * r; i < kRegsO; i += 4) {
        const i32 col = first_col + 8 * (i / 4);
        if (Cfg::kWgmmaPvN * Cfg::kVSplit == Cfg::kHeadDimV || col < Cfg::kHeadDimV) {
          st_global_u32(out + 2 * col,
                        empty[r] ? 0 : pack2<Cfg::kBf16>(rO[i] * scale[r], rO[i + 1] * scale[r]));
        }
      }
    }
  }

  // O of one head's rows, staged in shared memory. The leader's TMA store goes on reading the
  // slice.
  DEVICE void store_tile(const Work& work, const f32 (&rO)[kRegsO], const bool (&empty)[2],
                         const f32 (&scale)[2], u32 slice) const {
    if constexpr (Cfg::kSwizzleV != (kStageOInP ? 128 : Cfg::kSwizzleQk)) {
      // A warp's rows of O lie over other warps' rows of Q or P.
      named_barrier_sync(kBarOutput + wg_idx, 128);
    }
    constexpr i32 kUnits = ChunkV::kCols / 8;
    const u32 first_unit =
        ChunkV::unit_address(slice, warp_idx * 16 + lane_idx % 16, lane_idx / 16);
#pragma unroll
    for (i32 i = 0; i < kRegsO; i += 8) {
      u32 words[4];
#pragma unroll
      for (i32 j = 0; j < 4; ++j) {
        const i32 r = j % 2;
        const f32 lo = empty[r] ? 0.0f : rO[i + 2 * j] * scale[r];
        const f32 hi = empty[r] ? 0.0f : rO[i + 2 * j + 1] * scale[r];
        words[j] = pack2<Cfg::kBf16>(lo, hi);
      }
      const i32 unit = i / 4;  // of eight columns
      stmatrix_x4(ChunkV::unit_at(first_unit, unit % kUnits) + u32(unit / kUnits * kOChunkBytes),
                  words[0], words[1], words[2], words[3]);
    }
    fence_proxy_async_shared();
    named_barrier_sync(kBarOutput + wg_idx, 128);
    if (is_leader) {
      const RowCoords at =
          row_coords<Cfg::kVarlenQ>(work.first_row + wg_idx / Cfg::kVSplit * kWgQueries,
                                    i32(work.seq.q_row), work.seq.slot_q, work.batch_idx);
      const i32 first_chunk = wg_idx % Cfg::kVSplit * kChunksO;
#pragma unroll
      for (i32 c = 0; c < kChunksO; ++c) {
        tma_store_5d(&p.out_map, slice + u32(c * kOChunkBytes), (first_chunk + c) * ChunkV::kCols,
                     at.row, work.head_idx, at.dim3, at.dim4);
      }
      tma_store_commit_group();
    }
  }
};
