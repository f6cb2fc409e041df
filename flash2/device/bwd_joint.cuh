// The joint schedule of bwd.cu, without Cfg::kSplitRoles: every warp computes all products of a
// step. Called by key_tile() in bwd.cu. Reads Cfg: include "prelude.cuh" first. Change here: loop
// order, pipeline. Change elsewhere: see bwd.cu.
#pragma once
#include "flash2/device/bwd_loads.cuh"
#include "flash2/device/bwd_products.cuh"
#include "flash2/device/bwd_scores.cuh"
#include "flash2/device/bwd_turns.cuh"
#include "common/device/mask.cuh"
#include "common/device/score.cuh"
#include "common/ptx/barrier.cuh"

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
