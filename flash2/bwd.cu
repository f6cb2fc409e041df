// flash2/bwd.cu: dK, dV and the fp32 sums of dQ, for sm_80 and up (mma.sync, cp.async).
// Launched by flash2/bwd.py between bwd_preprocess.cu, which prepares softmax_d and lse_log2, and
// bwd_convert.cu, which rounds dQ.
// CTA: one tile of kBlockN keys and query heads that share them (GQA). dK and dV stay in registers
// while it walks over the query tiles that see these keys, kBlockM queries a step. Where CTAs share
// a K or V head, bwd_sum.cu adds up what they leave.
// All tiles of scores are transposed, with keys as rows:
//   S^T = K Q^T      P^T = exp(S^T - lse)            dV += P^T dO
//   dP^T = V dO^T    dS^T = P^T * (dP^T - D)         dK += dS^T Q      dQ += dS K
// Every warp does all of it (Step), or half of the warps the upper line and half the lower one
// (Cfg::kSplitRoles, RoleStep).
// Change here: loop order, pipeline.
// Change elsewhere: shared memory and division among warps -> bwd_warps.cuh, copies ->
// bwd_loads.cuh, elementwise part -> bwd_scores.cuh, sums of gradients -> bwd_products.cuh, mask
// rules -> mask.cuh, what a CTA works on -> bwd_work.cuh, in which order key tiles add to dQ ->
// bwd_turns.cuh, tile sizes -> bwd_tiles.py.
#include "prelude.cuh"  // generated for this problem: struct Cfg

#include "flash2/device/bwd_loads.cuh"
#include "flash2/device/bwd_products.cuh"
#include "flash2/device/bwd_scores.cuh"
#include "flash2/device/bwd_turns.cuh"
#include "flash2/device/bwd_warps.cuh"
#include "common/device/bwd_work.cuh"
#include "flash2/device/gemm.cuh"
#include "common/device/mask.cuh"
#include "common/device/params.cuh"
#include "common/device/score.cuh"
#include "common/ptx/barrier.cuh"
#include "common/ptx/shuffle.cuh"

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
        finish_scores<true>(rS, rP, p, work, score, dropout, lane, row, key, sLse, NoFragment());
      } else {
        finish_scores<false>(rS, rP, p, work, score, dropout, lane, row, key, sLse, NoFragment());
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
      finish_ds(rDs, rDp, p, lane, sD, [&](f32(&rP)[2][4], i32 m, i32 n) {
#pragma unroll
        for (i32 i = 0; i < 8; ++i) {
          rP[i / 4][i % 4] = rS[m][n + i / 4][i % 4];
        }
      });
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
  const i32 first_key = n_block * Cfg::kBlockN, start = first_step(tiles, first_key);
  const Loader loader{p, work, lane, smem};
  const Turns turns{p, work, tiles, lane.thread_idx, n_block};
  Cursor at{head_begin, start};
  cta_sync();  // the run before is done with shared memory
  loader.load_first(at, first_key);

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

  const i32 num_steps = (tiles.end - tiles.begin) * (head_end - head_begin);
  Cursor before = at;
  for (i32 step = 0; step < num_steps; ++step) {
    Cursor next_at = at;
    advance(next_at, tiles, start);
    const i32 next_rows = step + 1 < num_steps ? work.seq.seqlen_q : 0;
    const i32 stage_q = Cfg::kStagesQ == 2 ? step % 2 : 0,
              stage_do = Cfg::kStagesDo == 2 ? step % 2 : 0;
    const u32 sDs = smem + Smem::kDs, sP = smem + Smem::kP;
    const u32 sDs_now = sDs + u32(kDelayedDq ? step % 2 * LayoutP::kBytes : 0);
    const bool masked = at.m_block < tiles.interior_begin || at.m_block >= tiles.interior_end;

    cp_async_wait_group<0>();
    cta_sync();
    turns.step(at, step, num_steps);
    if constexpr (kDelayedDq) {
      if (step > 0) {
        compute_and_add_dq(p, work, lane, before, smem,
                           sDs + u32((step + 1) % 2 * LayoutP::kBytes));
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
        Fragments<kMTilesDq, kNTilesDq> rDq;
        clear(rDq);
        accumulate_dq(rDq, lane, smem, sDs);
        accumulate_from_shared<LayoutQ>(gradients.rDk, sDs, loader.sQ(stage_q), lane, [&](i32 k) {
          add_dq<Cfg::kBlockM / 16>(rDq, p, work, lane, at, work.seq.seqlen_q, k);
        });
        if constexpr (Cfg::kStagesQ == 1) {
          cta_sync();
        }
      }
      if constexpr (Cfg::kStagesQ == 1) {
        loader.load_q<1>(next_at, next_rows, 0, 0);
      }
      if constexpr (kPInRegisters) {
        compute_and_add_dq(p, work, lane, at, smem, sDs);
      }
    }
    cp_async_commit_group();
    before = at;
    at = next_at;
  }
  cp_async_wait_group<0>();  // the zeros behind the last step
  if constexpr (kDelayedDq) {
    cta_sync();
    turns.step(at, num_steps, num_steps);
    compute_and_add_dq(p, work, lane, before, smem,
                       smem + Smem::kDs + u32((num_steps + 1) % 2 * LayoutP::kBytes));
  }
  turns.finish(at);
}
enum NamedBarrier {
  kBarHandoff = 1,    // + role_warp: P^T of a warp's part lies where dS^T will
  kBarScores = 9,     // P^T of the whole tile is in shared memory
  kBarGradients = 10  // dS^T is
};
static_assert(!Cfg::kSplitRoles || (kSubSteps == 1 && kRoleWarps <= 8 && Cfg::kStagesQ == 2 &&
                                    Cfg::kStagesDo == 2 && Cfg::kStagesDs == 2));

// One step of the walk in split roles. Two warps of the same role_warp, one of each role, have the
// same part of S^T and dP^T. They wait for each other only where P^T changes hands; so one's
// exponentials run beside the other's products. dQ of the step before is computed by all.
struct RoleStep {
  const BwdParams& p;
  const KeyWork& work;
  const Lane& lane;
  const Loader& loader;
  i32 first_key;
  Cursor before, at, next_at;
  i32 rows_before, next_rows;  // of the sequence; 0 where there is no such step
  i32 stage;
  bool masked;

  DEVICE u32 sDs(i32 of_stage) const {
    return loader.smem + Smem::kDs + u32(of_stage * LayoutP::kBytes);
  }

  // S^T, P^T and dV.
  DEVICE void scores(Fragments<kMTilesKv, kNTilesDv>& rDv) const {
    const Score<Cfg> score(p, work.batch_idx, at.head_idx);
    const MaybeDropout dropout(p, work.batch_idx, at.head_idx);
    Fragments<kMTilesS, kNTilesS> rS;
    Packed rP;
    clear(rS);
    product<LayoutK, LayoutQ, kDepthQk>(rS, loader.smem + Smem::kK, loader.sQ(stage),
                                        [&](i32 k) { load_next<kDepthQk / 16>(k); });
    const i32 query = at.m_block * Cfg::kBlockM + lane.s_query, key = first_key + lane.s_key;
    const u32 sLse = loader.sLse(stage) + u32(lane.s_query) * 4;
    const u32 sX_lane = sDs(stage) + u32((lane.s_key + lane.row(0, 0)) * LayoutP::kRowBytes +
                                         (lane.s_query + lane.col(0, 0)) * kElemBytes);
    const auto hand_over = [&](i32 m, i32 n) { store_handoff(sX_lane, rS[m][n], m, n); };
    if (masked) {
      finish_scores<true>(rS, rP, p, work, score, dropout, lane, query, key, sLse, hand_over);
    } else {
      finish_scores<false>(rS, rP, p, work, score, dropout, lane, query, key, sLse, hand_over);
    }
    named_barrier_arrive(kBarHandoff + lane.role_warp, 64);
    Fragments<kMTilesDq, kNTilesDq> rDq;
    if constexpr (kPInRegisters) {  // dV first: it frees P^T's registers
      accumulate_from_registers<LayoutDo, Cfg::kSubM>(rDv, rP, loader.sDo(stage), lane);
      dq_before(rDq);
      add_part<1>(rDq, 0);
    } else {
      store_packed(loader.smem + Smem::kP, rP, lane, lane.s_query);
      dq_before(rDq);
      named_barrier_sync(kBarScores, 32 * kRoleWarps);
      accumulate_from_shared<LayoutDo>(rDv, loader.smem + Smem::kP, loader.sDo(stage), lane,
                                       [&](i32 k) { add_part<Cfg::kBlockM / 16>(rDq, k); });
    }
  }

  // dP^T, dS^T and dK.
  DEVICE void gradients(Fragments<kMTilesKv, kNTilesDk>& rDk) const {
    const u32 sD = loader.sD(stage) + u32(lane.s_query) * 4;
    Fragments<kMTilesDq, kNTilesDq> rDq;
    Fragments<kMTilesS, kNTilesS> rDp;
    Packed rDs;
    if constexpr (kPInRegisters) {  // rDp is too large to keep rDq beside it
      dq_before(rDq);
      add_part<1>(rDq, 0);
      start_dp(rDp, lane, sD);
      product<LayoutV, LayoutDo, kDepthV>(rDp, loader.smem + Smem::kV, loader.sDo(stage),
                                          [&](i32 k) { load_next<kDepthV / 16>(k); });
    } else {
      clear(rDq);
      if (rows_before > 0) {
        accumulate_dq(rDq, lane, loader.smem, sDs(1 - stage),
                      [&](i32 k) { load_next<Cfg::kBlockN / 16>(k); });
      } else {
        load_next<1>(0);
      }
      start_dp(rDp, lane, sD);
      product<LayoutV, LayoutDo, kDepthV>(rDp, loader.smem + Smem::kV, loader.sDo(stage),
                                          [&](i32 k) { add_part<kDepthV / 16>(rDq, k); });
    }
    const u32 sX_lane = sDs(stage) +
                        u32(lane.s_key * LayoutP::kRowBytes + lane.s_query * kElemBytes) +
                        lane_offset_a<LayoutP>(lane.lane_idx);
    named_barrier_sync(kBarHandoff + lane.role_warp, 64);
    finish_ds(rDs, rDp, p, lane, sD,
              [&](f32(&rP)[2][4], i32 m, i32 n) { load_handoff(rP, sX_lane, m, n); });
    warp_sync();  // dS^T takes the place of P^T
    store_packed(sDs(stage), rDs, lane, lane.s_query);
    if constexpr (kPInRegisters) {
      accumulate_from_registers<LayoutQ, Cfg::kSubM>(rDk, rDs, loader.sQ(stage), lane);
    } else {
      named_barrier_sync(kBarGradients, 32 * kRoleWarps);
      accumulate_from_shared<LayoutQ>(rDk, sDs(stage), loader.sQ(stage), lane);
    }
  }

 private:
  // This warp's part of dQ of the step before.
  DEVICE void dq_before(Fragments<kMTilesDq, kNTilesDq>& rDq) const {
    clear(rDq);
    if (rows_before > 0) {
      accumulate_dq(rDq, lane, loader.smem, sDs(1 - stage));
    }
  }
  template <i32 kParts>
  DEVICE void add_part(const Fragments<kMTilesDq, kNTilesDq>& rDq, i32 part) const {
    add_dq<kParts>(rDq, p, work, lane, before, rows_before, part);
  }
  template <i32 kParts>
  DEVICE void load_next(i32 part) const {
    loader.load_q<kParts>(next_at, next_rows, 1 - stage, part);
    loader.load_do<kParts>(next_at, next_rows, 1 - stage, part);
  }
  // rD += A B^T, A = the warp's keys of K or V (sA), B = its queries of Q or dO (sB).
  template <class LayoutA, class LayoutB, i32 kDepth, class EachStep>
  DEVICE void product(Fragments<kMTilesS, kNTilesS>& rD, u32 sA, u32 sB, EachStep each_step) const {
    const u32 sA_lane =
        sA + u32(lane.s_key * LayoutA::kRowBytes) + lane_offset_a<LayoutA>(lane.lane_idx);
    gemm_abt<Cfg::kBf16, LayoutB, kDepth>(
        rD, sB + u32(lane.s_query * LayoutB::kRowBytes) + lane_offset_b<LayoutB>(lane.lane_idx),
        [&](u32(&rA)[4], i32 m, i32 k) { load_a<LayoutA>(rA, sA_lane, m, k); }, each_step);
  }
};

// run() in one of the two roles. A step begins with the same barrier, and dS^T has two stages.
template <bool kScores, i32 kNTiles>
DEVICE void run_role(Fragments<kMTilesKv, kNTiles>& rD, const BwdParams& p, const KeyWork& work,
                     const Lane& lane, u32 smem, i32 n_block, const TileRange& tiles,
                     i32 head_begin, i32 head_end) {
  const i32 first_key = n_block * Cfg::kBlockN, start = first_step(tiles, first_key);
  const Loader loader{p, work, lane, smem};
  const Turns turns{p, work, tiles, lane.thread_idx, n_block};
  Cursor at{head_begin, start};
  cta_sync();  // the run before is done with shared memory
  loader.load_first(at, first_key);

  const i32 num_steps = (tiles.end - tiles.begin) * (head_end - head_begin);
  Cursor before = at;
  for (i32 step = 0; step < num_steps; ++step) {
    Cursor next_at = at;
    advance(next_at, tiles, start);
    const bool masked = at.m_block < tiles.interior_begin || at.m_block >= tiles.interior_end;
    const RoleStep now{p,
                       work,
                       lane,
                       loader,
                       first_key,
                       before,
                       at,
                       next_at,
                       step > 0 ? work.seq.seqlen_q : 0,
                       step + 1 < num_steps ? work.seq.seqlen_q : 0,
                       step % 2,
                       masked};
    cp_async_wait_group<0>();
    cta_sync();
    turns.step(at, step, num_steps);
    if constexpr (kScores) {
      now.scores(rD);
    } else {
      now.gradients(rD);
    }
    cp_async_commit_group();
    before = at;
    at = next_at;
  }
  cp_async_wait_group<0>();  // the zeros behind the last step
  cta_sync();
  turns.step(at, num_steps, num_steps);
  compute_and_add_dq(p, work, lane, before, smem,
                     smem + Smem::kDs + u32((num_steps + 1) % 2 * LayoutP::kBytes));
  turns.finish(at);
}

// dK and dV of one key tile: sums over the CTA's query heads of each K and V head. kHasDk, kHasDv:
// what this warp computes of them.
template <bool kHasDk, bool kHasDv>
DEVICE void key_tile(const BwdParams& p, const KeyWork& work, Lane lane, u32 smem, i32 n_block) {
  const i32 first_key = n_block * Cfg::kBlockN;
  const TileRange tiles = query_tiles<Cfg>(p, work.seq, first_key, Cfg::kBlockN);
  Gradients gradients;
  clear(gradients.rDk);
  clear(gradients.rDv);
  for (i32 head = work.first_head; head < work.end_head;) {
    if constexpr (Cfg::kUnequalHeads) {  // all that follows from it is computed anew for each run:
      lane = Lane(shfl_idx_u32(u32(lane.thread_idx), lane.lane_idx));  // else it takes registers
    }
    const i32 head_k = head / p.qhead_per_khead;
    const i32 head_v = Cfg::kUnequalHeads ? head / p.qhead_per_vhead : head_k;
    i32 end_k = work.end_head, end_v = end_k, end = end_k;
    if constexpr (Cfg::kUnequalHeads) {
      end_k = imin(end_k, (head_k + 1) * p.qhead_per_khead);
      end_v = imin(end_v, (head_v + 1) * p.qhead_per_vhead);
      end = imin(end_k, end_v);
    }
    if (tiles.begin < tiles.end) {
      if constexpr (kHasDk && kHasDv) {
        run(gradients, p, work, lane, smem, n_block, tiles, head, end);
      } else if constexpr (kHasDv) {
        run_role<true>(gradients.rDv, p, work, lane, smem, n_block, tiles, head, end);
      } else {
        run_role<false>(gradients.rDk, p, work, lane, smem, n_block, tiles, head, end);
      }
    }
    if constexpr (Cfg::kGradVectorBytes == 16) {
      cta_sync();  // all warps are done with K and V
    }
    if constexpr (kHasDk) {
      if (end == end_k) {
        store<Cfg::kHeadDimQk, LayoutK>(gradients.rDk, p, work, lane, smem + Smem::kK, first_key,
                                        head_k, p.qhead_per_khead, p.dk, p.dk_batch_stride,
                                        p.dk_head_stride, p.dk_row_stride, p.dk_accum, p.dqk_scale);
        clear(gradients.rDk);
      }
    }
    if constexpr (kHasDv) {
      if (end == end_v) {
        store<Cfg::kHeadDimV, LayoutV>(gradients.rDv, p, work, lane, smem + Smem::kV, first_key,
                                       head_v, p.qhead_per_vhead, p.dv, p.dv_batch_stride,
                                       p.dv_head_stride, p.dv_row_stride, p.dv_accum, p.dv_scale);
        clear(gradients.rDv);
      }
    }
    if constexpr (!Cfg::kUnequalHeads) {
      break;  // one K and one V head
    }
    head = end;
  }
}

// A key tile by all warps of the CTA.
DEVICE void divide_key_tile(const BwdParams& p, const KeyWork& work, const Lane& lane, u32 smem,
                            i32 n_block) {
  if constexpr (!Cfg::kSplitRoles) {
    key_tile<true, true>(p, work, lane, smem, n_block);
  } else if (lane.thread_idx < 32 * kRoleWarps) {
    key_tile<false, true>(p, work, lane, smem, n_block);
  } else {
    key_tile<true, false>(p, work, lane, smem, n_block);
  }
}

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) flash2_bwd(GRID_CONSTANT BwdParams p) {
  const Lane lane(thread_idx());
  const KeyWork work = key_work<Cfg, Cfg::kBlockN>(p, block_idx(), lane.lane_idx);
  const u32 smem = smem_base();
  if constexpr (Cfg::kDeterministic) {
    // dq_accum[split] belongs to this CTA for its heads, which adds to it in one order.
    for (i32 n_block = work.n_block; n_block * Cfg::kBlockN < work.slot_k;
         n_block += p.num_splits) {
      divide_key_tile(p, work, lane, smem, n_block);
    }
  } else if (work.n_block * Cfg::kBlockN < work.slot_k) {
    divide_key_tile(p, work, lane, smem, work.n_block);
  }
}
