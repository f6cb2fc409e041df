// The schedule of bwd.cu in split roles, with Cfg::kSplitRoles: one half of the warps has S^T, P^T
// and dV, the other dP^T, dS^T and dK. Called by key_tile() in bwd.cu. Reads Cfg: include
// "prelude.cuh" first. Change here: loop order, pipeline. Change elsewhere: see bwd.cu.
#pragma once
#include "flash2/device/bwd_loads.cuh"
#include "flash2/device/bwd_products.cuh"
#include "flash2/device/bwd_scores.cuh"
#include "flash2/device/bwd_turns.cuh"
#include "common/device/mask.cuh"
#include "common/device/score.cuh"
#include "common/ptx/barrier.cuh"

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

// run() of bwd_joint.cuh in one of the two roles. A step begins with the same barrier, and dS^T has
// two stages.
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
