// flash2/bwd.cu: dK, dV and the fp32 sums of dQ, for sm_80 and up (mma.sync, cp.async).
// Launched by flash2/bwd.py between bwd_preprocess.cu, which prepares softmax_d and lse_log2, and
// bwd_convert.cu, which rounds dQ.
// CTA: one tile of kBlockN keys and the query heads that share them (GQA). dK and dV stay in
// registers while it walks over the query tiles that see these keys, kBlockM queries a step.
// All tiles of scores are transposed, with keys as rows:
//   S^T = K Q^T      P^T = exp(S^T - lse)            dV += P^T dO
//   dP^T = V dO^T    dS^T = P^T * (dP^T - D)         dK += dS^T Q      dQ += dS K
// Change here: loop order, pipeline.
// Change elsewhere: shared memory and division among warps -> bwd_warps.cuh, elementwise part ->
// bwd_scores.cuh, mask rules -> mask.cuh, what a CTA works on -> bwd_work.cuh, tile sizes ->
// bwd_tiles.py.
#include "prelude.cuh"  // generated for this problem: struct Cfg

#include "common/device/bwd_scores.cuh"
#include "common/device/bwd_warps.cuh"
#include "common/device/bwd_work.cuh"
#include "common/device/gemm.cuh"
#include "common/device/mask.cuh"
#include "common/device/params.cuh"
#include "common/device/score.cuh"
#include "common/device/tile_copy.cuh"
#include "common/ptx/barrier.cuh"

// First element of one head of one sequence.
DEVICE const void* head_base(const void* base, i64 offset) {
  return static_cast<const char*>(base) + offset * kElemBytes;
}

struct NoStep {
  DEVICE void operator()(i32) const {}
};

// The (head, query tile) pairs of one run over the queries, in order. Each CTA starts at another
// tile and wraps around, so that CTAs which run together add to different parts of dQ.
struct Cursor {
  i32 head_idx, m_block;
  DEVICE void advance(const TileRange& tiles, i32 start) {
    m_block = m_block + 1 == tiles.end ? tiles.begin : m_block + 1;
    head_idx += m_block == start ? 1 : 0;
  }
};

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

 private:
  // One fp32 per query, padded by bwd_preprocess.cu to whole tiles.
  DEVICE void load_stat(u32 dst, const f32* stat, i32 head_idx, i32 first_row, i32 num_rows) const {
    if (lane.thread_idx < Cfg::kBlockM) {
      const f32* row = stat + work.batch_idx * p.stat_batch_stride + head_idx * p.stat_head_stride +
                       stat_row<Cfg>(work.seq, work.batch_idx) + first_row + lane.thread_idx;
      cp_async_4(dst + u32(lane.thread_idx) * 4, row, num_rows > 0 ? 4 : 0);
    }
  }
};

// rD += A^T B for dK and dV: A^T = P^T or dS^T, B = rows of dO or Q from sB on.
template <class LayoutB, i32 kDepth, i32 kNTiles>
DEVICE void accumulate_from_registers(Fragments<kMTilesKv, kNTiles>& rD, const Packed& packed,
                                      u32 sB, const Lane& lane) {
  gemm_ab<Cfg::kBf16, LayoutB, kDepth>(
      rD, sB + lane_offset_b_trans<LayoutB>(lane.lane_idx),
      [&](u32(&rA)[4], i32 m, i32 k) {
#pragma unroll
        for (i32 i = 0; i < 4; ++i) {
          rA[i] = packed[m][2 * k + i / 2][i % 2];
        }
      },
      NoStep());
}
template <class LayoutB, i32 kNTiles>
DEVICE void accumulate_from_shared(Fragments<kMTilesKv, kNTiles>& rD, u32 sA, u32 sB,
                                   const Lane& lane) {
  const u32 sA_lane =
      sA + u32(lane.kv_key * LayoutP::kRowBytes) + lane_offset_a<LayoutP>(lane.lane_idx);
  gemm_ab<Cfg::kBf16, LayoutB, Cfg::kBlockM>(
      rD, sB + u32(lane.kv_part * kNTiles * 16) + lane_offset_b_trans<LayoutB>(lane.lane_idx),
      [&](u32(&rA)[4], i32 m, i32 k) { load_a<LayoutP>(rA, sA_lane, m, k); }, NoStep());
}

// dQ of one step, added to dq_accum: dS (queries x keys) from its transpose in shared memory, times
// K.
DEVICE void add_dq(const BwdParams& p, const KeyWork& work, const Lane& lane, const Cursor& at,
                   u32 smem, u32 sDs) {
  Fragments<kMTilesDq, kNTilesDq> rDq;
  clear(rDq);
  const u32 sDs_lane =
      sDs + u32(lane.dq_query * kElemBytes) + lane_offset_b<LayoutP>(lane.lane_idx);
  const u32 sK_lane = smem + Smem::kK + u32(lane.dq_part * kNTilesDq * 16) +
                      lane_offset_b_trans<LayoutK>(lane.lane_idx);
  gemm_ab<Cfg::kBf16, LayoutK, Cfg::kBlockN>(
      rDq, sK_lane, [&](u32(&rA)[4], i32 m, i32 k) { load_a_trans<LayoutP>(rA, sDs_lane, m, k); },
      NoStep());

  const i32 first_row = at.m_block * Cfg::kBlockM + lane.dq_query;
  f32* dst = accum_rows<Cfg>(p, work.seq, work.batch_idx, at.head_idx, work.split, first_row) +
             lane.dq_part * kNTilesDq * kFragmentFloats + lane.lane_idx;
#pragma unroll
  for (i32 m = 0; m < kMTilesDq; ++m) {
    if (first_row + m * 16 < work.seq.seqlen_q) {
#pragma unroll
      for (i32 n = 0; n < kNTilesDq; ++n) {
#pragma unroll
        for (i32 e = 0; e < 4; ++e) {
          red_global_add_f32(dst + m * 16 * LayoutQ::kCols + n * kFragmentFloats + e * 32,
                             rDq[m][n][e]);
        }
      }
    }
  }
}

// S^T, dP^T and what follows from them for one query tile, up to dS^T in shared memory.
struct Step {
  const BwdParams& p;
  const KeyWork& work;
  const Lane& lane;
  const Operands& operands;
  const Loader& loader;
  i32 first_key;
  Cursor at;
  i32 stage_q, stage_do;
  u32 sDs;
  bool masked;

  // next_at: the step after this, whose loads ride along where a stage is free; next_rows: see
  // Loader.
  DEVICE void scores(Gradients& gradients, const Cursor& next_at, i32 next_rows) const {
    const Score<Cfg> score(p, work.batch_idx, at.head_idx);
    const MaybeDropout dropout(p, work.batch_idx, at.head_idx);
#pragma unroll
    for (i32 sub = 0; sub < kSubSteps; ++sub) {
      const i32 query = sub * (kSWarpsM * Cfg::kSubM) + lane.s_query;  // within the tile
      Fragments<kMTilesS, kNTilesS> rS;
      Packed rP;
      clear(rS);
      product<LayoutK, LayoutQ, kDepthQk, Cfg::kKInRegisters>(
          rS, operands.rK, loader.smem + Smem::kK,
          loader.sQ(stage_q) + u32(query * LayoutQ::kRowBytes), [&](i32 k) {
            if constexpr (Cfg::kStagesQ == 2) {
              loader.load_q<kSubSteps * kDepthQk / 16>(next_at, next_rows, 1 - stage_q,
                                                       sub * (kDepthQk / 16) + k);
            }
          });
      const i32 row = at.m_block * Cfg::kBlockM + query, key = first_key + lane.s_key;
      const u32 sLse = loader.sLse(stage_q) + u32(query) * 4,
                sD = loader.sD(stage_do) + u32(query) * 4;
      if (masked) {
        finish_scores<true>(rS, rP, p, work, score, dropout, lane, row, key, sLse);
      } else {
        finish_scores<false>(rS, rP, p, work, score, dropout, lane, row, key, sLse);
      }
      const u32 sDo = loader.sDo(stage_do) + u32(query * LayoutDo::kRowBytes);
      if constexpr (kPInRegisters) {
        accumulate_from_registers<LayoutDo, Cfg::kSubM>(gradients.rDv, rP, sDo, lane);
      } else {
        store_packed(loader.smem + Smem::kP, rP, lane, query);
      }
      Fragments<kMTilesS, kNTilesS> rDp;
      start_dp(rDp, lane, sD);
      product<LayoutV, LayoutDo, kDepthV, Cfg::kVInRegisters>(
          rDp, operands.rV, loader.smem + Smem::kV, sDo, [&](i32 k) {
            if constexpr (Cfg::kStagesDo == 2) {
              loader.load_do<kSubSteps * kDepthV / 16>(next_at, next_rows, 1 - stage_do,
                                                       sub * (kDepthV / 16) + k);
            }
          });
      Packed rDs;
      finish_ds(rDs, rS, rDp, p, lane, sD);
      store_packed(sDs, rDs, lane, query);
      if constexpr (kPInRegisters) {
        accumulate_from_registers<LayoutQ, Cfg::kSubM>(
            gradients.rDk, rDs, loader.sQ(stage_q) + u32(query * LayoutQ::kRowBytes), lane);
      }
    }
  }

 private:
  // rD += A B^T, A = the warp's rows of K or V.
  template <class LayoutA, class LayoutB, i32 kDepth, bool kInRegisters, i32 kMRegisters,
            i32 kKRegisters, class EachStep>
  DEVICE void product(Fragments<kMTilesS, kNTilesS>& rD,
                      const u32 (&kept)[kMRegisters][kKRegisters][4], u32 sA, u32 sB,
                      EachStep each_step) const {
    const u32 sA_lane =
        sA + u32(lane.s_key * LayoutA::kRowBytes) + lane_offset_a<LayoutA>(lane.lane_idx);
    gemm_abt<Cfg::kBf16, LayoutB, kDepth>(
        rD, sB + lane_offset_b<LayoutB>(lane.lane_idx),
        [&](u32(&rA)[4], i32 m, i32 k) {
          if constexpr (kInRegisters) {
#pragma unroll
            for (i32 i = 0; i < 4; ++i) {
              rA[i] = kept[m][k][i];
            }
          } else {
            load_a<LayoutA>(rA, sA_lane, m, k);
          }
        },
        each_step);
  }
};

// A warp's rows of K or V (sTile) as operands.
template <class Layout, i32 kMTiles, i32 kKSteps>
DEVICE void load_operands(u32 (&operands)[kMTiles][kKSteps][4], u32 sTile, const Lane& lane) {
  const u32 s_lane =
      sTile + u32(lane.s_key * Layout::kRowBytes) + lane_offset_a<Layout>(lane.lane_idx);
#pragma unroll
  for (i32 m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (i32 k = 0; k < kKSteps; ++k) {
      load_a<Layout>(operands[m][k], s_lane, m, k);
    }
  }
}

// All query tiles of query heads head_begin .. head_end - 1, which read the same K and V.
// A step begins with a barrier: its Q and dO have landed, and all warps are done with the step
// before.
DEVICE void run(Gradients& gradients, const BwdParams& p, const KeyWork& work, const Lane& lane,
                u32 smem, i32 n_block, const TileRange& tiles, i32 head_begin, i32 head_end) {
  const i32 first_key = n_block * Cfg::kBlockN, count = tiles.end - tiles.begin;
  const i32 start =
      tiles.begin + (Cfg::kRotate ? n_block * Cfg::kBlockN / Cfg::kBlockM % count : 0);
  const Loader loader{p, work, lane, smem};
  Cursor at{head_begin, start};
  cta_sync();  // the run before is done with shared memory
  loader.load_kv(head_begin, first_key);
  loader.load_q<1>(at, work.seq.seqlen_q, 0, 0);
  loader.load_do<1>(at, work.seq.seqlen_q, 0, 0);
  cp_async_commit_group();

  Operands operands;
  if constexpr (Cfg::kKInRegisters || Cfg::kVInRegisters) {
    cp_async_wait_group<0>();
    cta_sync();
    if constexpr (Cfg::kKInRegisters) {
      load_operands<LayoutK>(operands.rK, smem + Smem::kK, lane);
    }
    if constexpr (Cfg::kVInRegisters) {
      load_operands<LayoutV>(operands.rV, smem + Smem::kV, lane);
    }
  }

  const i32 num_steps = count * (head_end - head_begin);
  Cursor before = at;
  for (i32 step = 0; step < num_steps; ++step) {
    Cursor next_at = at;
    next_at.advance(tiles, start);
    const i32 next_rows = step + 1 < num_steps ? work.seq.seqlen_q : 0;
    const i32 stage_q = Cfg::kStagesQ == 2 ? step % 2 : 0,
              stage_do = Cfg::kStagesDo == 2 ? step % 2 : 0;
    const u32 sDs = smem + Smem::kDs, sP = smem + Smem::kP;
    const u32 sDs_now = sDs + u32(kDelayedDq ? step % 2 * LayoutP::kBytes : 0);
    const bool masked = at.m_block < tiles.interior_begin || at.m_block >= tiles.interior_end;

    cp_async_wait_group<0>();
    cta_sync();
    if constexpr (kDelayedDq) {
      if (step > 0) {
        add_dq(p, work, lane, before, smem, sDs + u32((step + 1) % 2 * LayoutP::kBytes));
      }
    }
    Step{p, work, lane, operands, loader, first_key, at, stage_q, stage_do, sDs_now, masked}.scores(
        gradients, next_at, next_rows);
    if constexpr (!kDelayedDq) {
      cta_sync();  // dS^T, and P^T where it is shared, are complete
      if constexpr (!kPInRegisters) {
        accumulate_from_shared<LayoutDo>(gradients.rDv, sP, loader.sDo(stage_do), lane);
        if constexpr (Cfg::kStagesDo == 1) {
          cta_sync();
        }
      }
      if constexpr (Cfg::kStagesDo == 1) {
        loader.load_do<1>(next_at, next_rows, 0, 0);
      }
      if constexpr (!kPInRegisters) {
        accumulate_from_shared<LayoutQ>(gradients.rDk, sDs, loader.sQ(stage_q), lane);
        if constexpr (Cfg::kStagesQ == 1) {
          cta_sync();
        }
      }
      if constexpr (Cfg::kStagesQ == 1) {
        loader.load_q<1>(next_at, next_rows, 0, 0);
      }
      add_dq(p, work, lane, at, smem, sDs);
    }
    cp_async_commit_group();
    before = at;
    at = next_at;
  }
  cp_async_wait_group<0>();  // the zeros behind the last step
  if constexpr (kDelayedDq) {
    cta_sync();
    add_dq(p, work, lane, before, smem,
           smem + Smem::kDs + u32((num_steps + 1) % 2 * LayoutP::kBytes));
  }
}

// Writes dK or dV, scaled and rounded. dst: row 0 of the key tile. rows: that the sequence owns
// from there on.
template <i32 kHeadDim, i32 kNTiles>
DEVICE void store_gradient(const Fragments<kMTilesKv, kNTiles>& rD, void* dst, i64 row_stride,
                           i32 rows, f32 scale, const Lane& lane) {
#pragma unroll
  for (i32 m = 0; m < kMTilesKv; ++m) {
#pragma unroll
    for (i32 half = 0; half < 2; ++half) {
      const i32 row = lane.kv_key + lane.row(m, 2 * half);
      if (row < rows) {
        u16* g_row = static_cast<u16*>(dst) + row * row_stride;
#pragma unroll
        for (i32 n = 0; n < kNTiles; ++n) {
          const i32 col = lane.kv_part * kNTiles * 8 + lane.col(n, 0);
          const u32 pair =
              pack2<Cfg::kBf16>(rD[m][n][2 * half] * scale, rD[m][n][2 * half + 1] * scale);
          if constexpr (Cfg::kGradVectorBytes >= 4) {
            if (col < kHeadDim) {
              st_global_u32(g_row + col, pair);
            }
          } else {
            if (col < kHeadDim) {
              st_global_u16(g_row + col, u16(pair));
            }
            if (col + 1 < kHeadDim) {
              st_global_u16(g_row + col + 1, u16(pair >> 16));
            }
          }
        }
      }
    }
  }
}

// dK and dV of one key tile: sums over the query heads of each K and V head, which need not be as
// many.
DEVICE void key_tile(const BwdParams& p, const KeyWork& work, const Lane& lane, u32 smem,
                     i32 n_block) {
  const i32 first_key = n_block * Cfg::kBlockN;
  const TileRange tiles = query_tiles<Cfg>(p, work.seq, first_key, Cfg::kBlockN);
  const i64 b = work.batch_idx, g_row = work.seq.k_row + first_key;
  const i32 rows = work.slot_k - first_key, head_end = work.first_head + p.heads_per_cta;
  Gradients gradients;
  clear(gradients.rDk);
  clear(gradients.rDv);
  for (i32 head = work.first_head; head < head_end;) {
    const i32 head_k = head / p.qhead_per_khead, head_v = head / p.qhead_per_vhead;
    const i32 end_k = (head_k + 1) * p.qhead_per_khead, end_v = (head_v + 1) * p.qhead_per_vhead;
    const i32 end = imin(end_k, end_v);
    if (tiles.begin < tiles.end) {
      run(gradients, p, work, lane, smem, n_block, tiles, head, end);
    }
    if (end == end_k) {
      u16* dk = static_cast<u16*>(p.dk) + b * p.dk_batch_stride + head_k * p.dk_head_stride +
                g_row * p.dk_row_stride;
      store_gradient<Cfg::kHeadDimQk>(gradients.rDk, dk, p.dk_row_stride, rows, p.dqk_scale, lane);
      clear(gradients.rDk);
    }
    if (end == end_v) {
      u16* dv = static_cast<u16*>(p.dv) + b * p.dv_batch_stride + head_v * p.dv_head_stride +
                g_row * p.dv_row_stride;
      store_gradient<Cfg::kHeadDimV>(gradients.rDv, dv, p.dv_row_stride, rows, p.dv_scale, lane);
      clear(gradients.rDv);
    }
    if constexpr (!Cfg::kGroupedHeads) {
      break;  // one head: no loop whose invariants would take registers
    }
    head = end;
  }
}

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) flash2_bwd(GRID_CONSTANT BwdParams p) {
  const Lane lane;
  const KeyWork work = key_work<Cfg>(p, lane.lane_idx);
  const u32 smem = smem_base();
  if constexpr (Cfg::kDeterministic) {
    // dq_accum[split] belongs to this CTA for its heads, which adds to it in one order.
    for (i32 n_block = work.n_block; n_block * Cfg::kBlockN < work.slot_k;
         n_block += p.num_splits) {
      key_tile(p, work, lane, smem, n_block);
    }
  } else if (work.n_block * Cfg::kBlockN < work.slot_k) {
    key_tile(p, work, lane, smem, work.n_block);
  }
}
