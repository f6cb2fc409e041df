// flash2/fwd.cu: attention forward for sm_80 and up (mma.sync, cp.async). Launched by
// flash2/fwd.py. CTA: Cfg::kNumWarps equal warps, each owning kMTiles * 16 query rows of one
// kBlockM x kHeadDimV tile of O. K and V tiles stream through rings of kNumStages tiles each, last
// keys first. Change here: loop order, pipeline, epilogue. Change elsewhere: mask rules ->
// mask.cuh, tile layout and copies -> tile_copy.cuh, PTX -> common/ptx, tile sizes -> fwd_tiles.py.
#include "prelude.cuh"  // generated for this problem: struct Cfg

#include "common/device/dropout.cuh"
#include "flash2/device/gemm.cuh"
#include "flash2/device/kv_source.cuh"
#include "common/device/mask.cuh"
#include "common/device/params.cuh"
#include "common/device/score.cuh"
#include "common/device/softmax.cuh"
#include "flash2/device/tile_copy.cuh"
#include "flash2/device/tile_scheduler.cuh"
#include "common/ptx/barrier.cuh"

using LayoutQ = CopiedTileLayout<Cfg::kLines, Cfg::kBlockM, Cfg::kHeadDimQk>;
using LayoutK = CopiedTileLayout<Cfg::kLines, Cfg::kBlockN, Cfg::kHeadDimQk>;
using LayoutV = CopiedTileLayout<Cfg::kLines, Cfg::kBlockN, Cfg::kHeadDimV>;

// Shared memory in address order.
struct Smem {
  static constexpr u32 kQ = 0;
  static constexpr u32 kK = kQ + LayoutQ::kBytes;
  static constexpr u32 kV = kK + Cfg::kNumStages * LayoutK::kBytes;
  static constexpr u32 kBytes = kV + Cfg::kNumStages * LayoutV::kBytes;
  static_assert(kK % 128 == 0 && kV % 128 == 0 && LayoutV::kBytes % 128 == 0);
};
static_assert(Smem::kBytes == Cfg::kSmemBytes,
              "flash2/fwd_tiles.py and this file agree on shared memory");

constexpr i32 kWarpRows = Cfg::kBlockM / Cfg::kNumWarps;
constexpr i32 kMTiles = kWarpRows / 16;
constexpr i32 kNTilesS = Cfg::kBlockN / 8;
constexpr i32 kNTilesO = LayoutV::kCols / 8;
constexpr i32 kDepthQk = LayoutQ::kCols;
// Q and K[0] arrive in so many chunks of columns, and the first product begins with the first.
constexpr i32 kChunks = Cfg::kPrologueChunks;
constexpr i32 kStepsPerChunk = kDepthQk / 16 / kChunks;
static_assert(Cfg::kNumThreads == 32 * Cfg::kNumWarps && kWarpRows % 16 == 0 &&
              Cfg::kBlockN % (Cfg::kDropout ? 32 : 16) == 0 &&
              (!Cfg::kOneBarrier || Cfg::kNumStages == 2));
static_assert(kChunks == 1 ||
              (Cfg::kNumStages == 1 && !Cfg::kQInRegisters && kDepthQk / 16 % kChunks == 0));

template <class Layout, i32 kHeadDim>
using Rows = TileCopy<Layout, kHeadDim, Cfg::kNumThreads, Cfg::kVectorBytes, Cfg::kWideRowStrides>;
using CopyQ = Rows<LayoutQ, Cfg::kHeadDimQk>;
using RowsK = Rows<LayoutK, Cfg::kHeadDimQk>;
using RowsV = Rows<LayoutV, Cfg::kHeadDimV>;
using CopyK = Select<Cfg::kPaged, PagedCopy<RowsK>, RowsK>;
using CopyV = Select<Cfg::kPaged, PagedCopy<RowsV>, RowsV>;

// What a warp carries from tile to tile.
struct WarpState {
  f32 rO[kMTiles][kNTilesO][4];
  OnlineSoftmax<kMTiles> softmax;
  Dropout dropout;  // with Cfg::kDropout
  u32 rQ[Cfg::kQInRegisters ? kMTiles : 1][Cfg::kQInRegisters ? kDepthQk / 16 : 1][4];
};

struct Lane {
  i32 thread_idx, warp_idx, lane_idx;
  i32 warp_row;  // first row of the warp within the query tile
  DEVICE Lane()
      : thread_idx(::thread_idx()),
        warp_idx(thread_idx / 32),
        lane_idx(thread_idx % 32),
        warp_row(warp_idx * kWarpRows) {}
  // Row within the query tile, and column within a key tile, of fragment element rS[m][n][e].
  DEVICE i32 row(i32 m, i32 e) const { return warp_row + m * 16 + lane_idx / 4 + 8 * (e / 2); }
  DEVICE i32 col(i32 n, i32 e) const { return n * 8 + 2 * (lane_idx % 4) + e % 2; }
};

DEVICE u32 lane_address_q(const Lane& lane, u32 sQ) {
  return sQ + u32(lane.warp_row * LayoutQ::kRowBytes) + lane_offset_a<LayoutQ>(lane.lane_idx);
}

DEVICE void load_q(WarpState& state, const Lane& lane, u32 sQ) {
  const u32 sQ_lane = lane_address_q(lane, sQ);
#pragma unroll
  for (i32 m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (i32 k = 0; k < kDepthQk / 16; ++k) {
      load_a<LayoutQ>(state.rQ[m][k], sQ_lane, m, k);
    }
  }
}

// Not beside random numbers: there are too few registers.
constexpr bool kShortTanh = Cfg::kSoftcap && !Cfg::kDropout;

// Scale, softcap and ALiBi. first_col: of the key tile.
template <bool kSmall>
DEVICE void transform_scores(f32 (&rS)[kMTiles][kNTilesS][4], const Work& work,
                             const Score<Cfg>& score, const Lane& lane, i32 first_col) {
#pragma unroll
  for (i32 m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (i32 r = 0; r < 2; ++r) {
      const i32 row = work.first_row + lane.row(m, 2 * r);
      const f32 distance = f32(row + work.seq.diagonal - first_col - lane.col(0, 0));
#pragma unroll
      for (i32 n = 0; n < kNTilesS; ++n) {
#pragma unroll
        for (i32 e = 2 * r; e < 2 * r + 2; ++e) {
          rS[m][n][e] = score.template get<kSmall>(rS[m][n][e],
                                                   distance - f32(lane.col(n, e) - lane.col(0, 0)));
        }
      }
    }
  }
}

// From products to scores, masked or not. first_col: of the key tile.
template <bool kMasked>
DEVICE void finish_scores(f32 (&rS)[kMTiles][kNTilesS][4], const FwdParams& p, const Work& work,
                          const Score<Cfg>& score, const Lane& lane, i32 first_col) {
  if constexpr (Score<Cfg>::kPrescaled) {
    if (kShortTanh && score.all_small(largest_of(rS))) {
      transform_scores<true>(rS, work, score, lane, first_col);
    } else {
      transform_scores<false>(rS, work, score, lane, first_col);
    }
  }
  if constexpr (!kMasked) {
    return;
  }
#pragma unroll
  for (i32 m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (i32 r = 0; r < 2; ++r) {
      const i32 row = work.first_row + lane.row(m, 2 * r);
      const KeyRange keys = row_keys<Cfg>(p, work.seq, row);
#pragma unroll
      for (i32 n = 0; n < kNTilesS; ++n) {
#pragma unroll
        for (i32 e = 2 * r; e < 2 * r + 2; ++e) {
          const i32 col = first_col + lane.col(n, e);
          const bool visible =
              col < keys.end && (!(Cfg::kLocal || Cfg::kChunk) || col >= keys.begin);
          rS[m][n][e] = visible ? rS[m][n][e] : bits_as_f32(kNegInfBits);
        }
      }
    }
  }
}

// Zeroes the dropped elements of P (survivors are scaled in the epilogue); with Cfg::kReturnSoftmax
// writes P and its signs.
DEVICE void apply_dropout(f32 (&rP)[kMTiles][kNTilesS][4], const FwdParams& p, const Work& work,
                          const Dropout& dropout, const Lane& lane, i32 first_col) {
#pragma unroll
  for (i32 m = 0; m < kMTiles; ++m) {
    const i32 patch_row = work.first_row + lane.warp_row + m * 16;
#pragma unroll
    for (i32 n = 0; n < kNTilesS; n += 4) {
      const KeepBits kept = dropout.keep_bits(patch_row, first_col + n * 8, lane.lane_idx);
#pragma unroll
      for (i32 i = 0; i < 4; ++i) {
#pragma unroll
        for (i32 e = 0; e < 4; ++e) {
          f32& x = rP[m][n + i][e];
          const bool keep = kept.keep(i, e);
          if constexpr (Cfg::kReturnSoftmax) {
            const i32 row = work.first_row + lane.row(m, e);
            const i32 col = first_col + lane.col(n + i, e);
            if (row < work.seq.seqlen_q && col < work.seq.seqlen_k && row < p.dmask_rows &&
                col < p.dmask_cols) {
              const i64 head = i64(work.batch_idx) * p.num_heads_q + work.head_idx;
              u16* dst =
                  static_cast<u16*>(p.s_dmask) + (head * p.dmask_rows + row) * p.dmask_cols + col;
              st_global_u16(dst, u16(pack2<Cfg::kBf16>(keep ? x : -x, 0.0f)));
            }
          }
          x = keep ? x : 0.0f;
        }
      }
    }
  }
}

#include "flash2/device/fwd_output.cuh"  // store_output

// Waits until at most the `pending` <= kMost latest groups are unfinished; a constant, once the
// loop around it is unrolled.
template <i32 kMost>
DEVICE void wait_for_all_but(i32 pending) {
  if (pending == kMost) {
    cp_async_wait_group<kMost>();
  } else if constexpr (kMost > 0) {
    wait_for_all_but<kMost - 1>(pending);
  }
}

// The walk over key tiles, from the last to the first: step 0 is tile tiles.end - 1. Loads are
// cp.async groups committed in the order K0 V0 K1 V1 ... (Q joins K0), also past the end, so that
// the number in flight is a constant. With Cfg::kOneBarrier K and V of a step are one group; with
// kChunks > 1 each chunk of Q and K0 is one.
struct Pipeline {
  CopyQ copy_q;
  CopyK copy_k;
  CopyV copy_v;
  i32 first_query, seqlen_q;
  TileRange tiles;
  i32 seqlen_k;
  u32 smem;

  DEVICE u32 sK(i32 step) const {
    return smem + Smem::kK + u32(step % Cfg::kNumStages * LayoutK::kBytes);
  }
  DEVICE u32 sV(i32 step) const {
    return smem + Smem::kV + u32(step % Cfg::kNumStages * LayoutV::kBytes);
  }
  DEVICE i32 first_col(i32 step) const { return (tiles.end - 1 - step) * Cfg::kBlockN; }
  // Past the end (first_col may be negative) no row is read and zeros are written: cheaper than a
  // branch inside a product.
  DEVICE i32 num_rows(i32 step) const {
    return step < tiles.end - tiles.begin ? seqlen_k : -0x40000000;
  }

  // One chunk of Q and K[0].
  DEVICE void load_chunk(i32 chunk) const {
    copy_q.template load_part<1, kChunks>(smem + Smem::kQ, first_query, seqlen_q, 0, chunk);
    copy_k.template load_part<1, kChunks>(sK(0), first_col(0), num_rows(0), 0, chunk);
    cp_async_commit_group();
  }
  // A chunk has landed for the whole CTA.
  DEVICE void wait_for_chunk(i32 chunk) const {
    wait_for_all_but<kChunks - 1>(kChunks - 1 - chunk);
    cta_sync();
  }

  template <i32 kParts>
  DEVICE void load_k(i32 step, i32 part) const {
    copy_k.template load_part<kParts>(sK(step), first_col(step), num_rows(step), part);
  }
  template <i32 kParts>
  DEVICE void load_v(i32 step, i32 part) const {
    copy_v.template load_part<kParts>(sV(step), first_col(step), num_rows(step), part);
  }
  // K[step] (first wait of a step) or V[step] (second) has landed for the whole CTA, and the whole
  // CTA is done with what it read before. By the order of commits both leave the same number of
  // groups in flight. With Cfg::kOneBarrier K[step] and V[step] have landed, and the whole CTA is
  // done with the step before.
  DEVICE void wait() const {
    cp_async_wait_group<Cfg::kOneBarrier ? 0 : 2 * (Cfg::kNumStages - 1)>();
    cta_sync();
  }
};

// S = Q K^T for the warp's rows and one key tile. kArriving: the first chunk of Q and K is there,
// the others are waited for on the way.
template <bool kArriving>
DEVICE void compute_scores(f32 (&rS)[kMTiles][kNTilesS][4], const WarpState& state,
                           const Pipeline& pipeline, const Lane& lane, i32 step_idx) {
  const u32 sQ_lane = lane_address_q(lane, pipeline.smem + Smem::kQ);
  clear(rS);
  gemm_abt<Cfg::kBf16, LayoutK, kDepthQk>(
      rS, pipeline.sK(step_idx) + lane_offset_b<LayoutK>(lane.lane_idx),
      [&](u32(&rA)[4], i32 m, i32 k) {
        if constexpr (Cfg::kQInRegisters) {
#pragma unroll
          for (i32 i = 0; i < 4; ++i) {
            rA[i] = state.rQ[m][k][i];
          }
        } else {
          load_a<LayoutQ>(rA, sQ_lane, m, k);
        }
      },
      [&](i32 k) {
        if constexpr (Cfg::kOneBarrier) {
          pipeline.load_k<kDepthQk / 16>(step_idx + 1, k);
        }
        pipeline.load_v<kDepthQk / 16>(step_idx + Cfg::kNumStages - 1, k);
        if (kArriving && (k + 1) % kStepsPerChunk == 0 && k + 1 < kDepthQk / 16) {
          pipeline.wait_for_chunk((k + 1) / kStepsPerChunk);
        }
      });
}

// One key tile. Each product carries the copy of the tile that takes the place of what the product
// before it read; with Cfg::kOneBarrier the first carries both, in place of what the step before
// read. kArriving: Q and K[0] are still on their way, in chunks.
template <bool kMasked, bool kArriving = false>
DEVICE void step(WarpState& state, const Pipeline& pipeline, const FwdParams& p, const Work& work,
                 const Score<Cfg>& score, const Lane& lane, i32 step_idx) {
  const i32 first_col = pipeline.first_col(step_idx);
  f32 rS[kMTiles][kNTilesS][4];
  if constexpr (kArriving) {
    pipeline.wait_for_chunk(0);
  } else {
    pipeline.wait();
  }
  compute_scores<kArriving>(rS, state, pipeline, lane, step_idx);
  cp_async_commit_group();
  finish_scores<kMasked>(rS, p, work, score, lane, first_col);
  // With one stage V[step] set off during the product just done: half of the softmax is time for it
  // to land. With more it is there, and nothing should stand between the softmax and P V.
  if constexpr (Cfg::kNumStages > 1 && !Cfg::kOneBarrier) {
    pipeline.wait();
  }
  state.softmax.follow_max(rS, state.rO, score.to_log2());
  if constexpr (Cfg::kNumStages == 1) {
    pipeline.wait();
  }
  state.softmax.exponentiate(rS, score.to_log2());
  if constexpr (Cfg::kDropout) {
    apply_dropout(rS, p, work, state.dropout, lane, first_col);
  }
  gemm_ab<Cfg::kBf16, LayoutV, Cfg::kBlockN>(
      state.rO, pipeline.sV(step_idx) + lane_offset_b_trans<LayoutV>(lane.lane_idx),
      [&](u32(&rA)[4], i32 m, i32 k) { accumulator_as_a<Cfg::kBf16>(rA, rS, m, k); },
      [&](i32 k) {
        if constexpr (!Cfg::kOneBarrier) {
          pipeline.load_k<Cfg::kBlockN / 16>(step_idx + Cfg::kNumStages, k);
        }
      });
  cp_async_commit_group();
}

// First element of one head of one sequence.
DEVICE const void* head_base(const void* base, i64 offset) {
  return static_cast<const char*>(base) + offset * kElemBytes;
}

// The copy of one head of one sequence's keys or values.
template <class Copy>
DEVICE Copy key_copy(const FwdParams& p, const SeqlenInfo& seq, i64 b, i64 head, const void* base,
                     i64 batch_stride, i64 row_stride, i64 head_stride, i32 thread_idx) {
  if constexpr (Cfg::kPaged) {
    return Copy(head_base(base, head * head_stride), batch_stride, row_stride,
                PageTable(p, b, seq.k_row), thread_idx);
  } else {
    return Copy(head_base(base, b * batch_stride + head * head_stride + seq.k_row * row_stride),
                row_stride, thread_idx);
  }
}

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) flash2_fwd(GRID_CONSTANT FwdParams p) {
  const Lane lane;
  Work work = this_work<Cfg>(p, lane.lane_idx);
  const SeqlenInfo& seq = work.seq;
  if (work.first_row >= seq.slot_q) {
    return;  // a tile past the end of a packed buffer
  }
  enter_cache<Cfg>(work.seq, p, work.batch_idx);
  const i64 b = work.batch_idx, b_k = cache_row<Cfg>(p, work.batch_idx),
            head_k = u32(work.head_idx) / u32(p.qhead_per_khead),
            head_v = u32(work.head_idx) / u32(p.qhead_per_vhead);
  const u32 smem = smem_base();
  const TileRange tiles = key_tiles<Cfg>(p, seq, work.first_row, Cfg::kBlockM);
  const CopyQ copy_q(head_base(p.q, b * p.q_batch_stride + work.head_idx * p.q_head_stride +
                                        seq.q_row * p.q_row_stride),
                     p.q_row_stride, lane.thread_idx);
  const Pipeline pipeline{copy_q,
                          key_copy<CopyK>(p, seq, b_k, head_k, p.k, p.k_batch_stride,
                                          p.k_row_stride, p.k_head_stride, lane.thread_idx),
                          key_copy<CopyV>(p, seq, b_k, head_v, p.v, p.v_batch_stride,
                                          p.v_row_stride, p.v_head_stride, lane.thread_idx),
                          work.first_row,
                          seq.seqlen_q,
                          tiles,
                          seq.seqlen_k,
                          smem};
  const bool any_tile = tiles.begin < tiles.end;

  if constexpr (kChunks > 1) {
    if (any_tile) {
#pragma unroll
      for (i32 chunk = 0; chunk < kChunks; ++chunk) {
        pipeline.load_chunk(chunk);
      }
    }
  } else {
    if (any_tile) {
      copy_q.load(smem + Smem::kQ, work.first_row, seq.seqlen_q);
    }
    pipeline.load_k<1>(0, 0);
    cp_async_commit_group();
  }
  if constexpr (Cfg::kOneBarrier) {
    pipeline.load_v<1>(0, 0);
    cp_async_commit_group();
  } else {
#pragma unroll
    for (i32 i = 1; i < Cfg::kNumStages; ++i) {
      pipeline.load_v<1>(i - 1, 0);
      cp_async_commit_group();
      pipeline.load_k<1>(i, 0);
      cp_async_commit_group();
    }
  }

  WarpState state;
  clear(state.rO);
  if constexpr (Cfg::kQInRegisters) {
    pipeline.wait();
    load_q(state, lane, smem + Smem::kQ);
  }
  const Score<Cfg> score(p, work.batch_idx, work.head_idx);
  if constexpr (Cfg::kDropout) {
    state.dropout = Dropout(p, work.batch_idx, work.head_idx);
  }

  i32 i = 0;
  if constexpr (kChunks > 1) {
    if (any_tile) {  // masked or not: the mask leaves an interior tile as it is
      step<true, true>(state, pipeline, p, work, score, lane, i++);
    }
  }
  for (; i < tiles.end - tiles.interior_end;
       ++i) {  // right edge: causal diagonal, window, end of the keys
    step<true>(state, pipeline, p, work, score, lane, i);
  }
  for (; i < tiles.end - tiles.interior_begin; ++i) {
    step<false>(state, pipeline, p, work, score, lane, i);
  }
  if constexpr (Cfg::kLocal || Cfg::kChunk) {
    for (; i < tiles.end - tiles.begin; ++i) {  // left edge of the window
      step<true>(state, pipeline, p, work, score, lane, i);
    }
  }

  cp_async_wait_group<0>();
  store_output(state, p, work, lane, score.to_log2());
}
