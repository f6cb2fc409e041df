// What the roles of hopper/bwd.cu that compute have in common, and KeyRole: a warpgroup with all of
// 64 keys. Included by bwd.cu only. Split roles: bwd_split_roles.cuh, dQ: bwd_dq.cuh.
// docs/hopper_backward_schedule.md draws who does what when.
#pragma once
#include "common/ptx/barrier.cuh"
#include "common/ptx/bulk.cuh"
#include "common/ptx/cluster.cuh"
#include "common/ptx/griddepcontrol.cuh"
#include "common/ptx/stmatrix.cuh"
#include "common/ptx/tma.cuh"
#include "hopper/bwd_epilogue.cuh"
#include "hopper/bwd_layout.cuh"
#include "hopper/bwd_scores.cuh"

enum NamedBarrier {
  kBarSend = 1,  // + key block: dS^T of the block lies ready for the other CTA
};

// A warp's end of what several roles do.
struct RoleBase {
  const HopperBwdParams& p;
  const KeyTile& tile;
  Warp warp;
  bool keys_pending;

  DEVICE RoleBase(const HopperBwdParams& p, const KeyTile& tile, u32 smem)
      : p(p), tile(tile), warp(smem), keys_pending(true) {}

  DEVICE u32 rank() const { return kCtas > 1 ? u32(tile.get(KeyTile::kRank)) : 0; }
  // The first step that needs K or V waits for it. bar: Smem::kBarKFull or kBarVFull.
  DEVICE void wait_keys(u32 bar) {
    if (keys_pending) {
      wait_phase(warp.smem + bar, 0);
      keys_pending = false;
    }
  }
};

DEVICE void wait_phase_cluster(u32 bar, u32 parity) {
  while (!mbarrier_try_wait_parity_cluster(bar, parity)) {
  }
}

// Hands dS^T to the warpgroup that makes dQ of it: this CTA's, or in every other step the other's.
struct DsWriter {
  u32 rank;
  DsRing own;
  u32 sent_stage = 0, sent_parity = 1;
  u32 step = 0;

  DEVICE DsWriter(u32 smem, u32 rank) : rank(rank), own(smem) {}

  // Of key block `block`. first, last: of the blocks of a step that this warp hands over.
  DEVICE void put(const Packed& rDs, const Warp& warp, i32 block, bool first, bool last) {
    const u32 in_tile = u32(block) * kQueryChunkBytes;
    if (kCtas == 1 || step % 2 == rank) {
      if (first) {
        own.wait_empty();
      }
      store_ds(own.tile() + in_tile, rDs, warp);
      warp_sync();
      if (warp.leads()) {
        if constexpr (kCtas > 1) {  // a fourth of a block of the other CTA's
          mbarrier_arrive_expect_tx(own.full(), kQueryChunkBytes / 4);
        } else {
          mbarrier_arrive(own.full());
        }
      }
      if (last) {
        own.advance();
      }
    } else {
      if (first) {
        wait_phase_cluster(warp.smem + Smem::kBarSentEmpty + sent_stage * 8, sent_parity);
      }
      const u32 from = warp.smem + Smem::kSentDs + sent_stage * Smem::kOwnDsBytes + in_tile;
      const u32 to =
          warp.smem + Smem::kDs + sent_stage * Smem::kDsBytes + Smem::kOwnDsBytes + in_tile;
      store_ds(from, rDs, warp);
      named_barrier_sync(kBarSend + block, 128);
      if (warp.warp_idx == 0 && warp.leads()) {
        bulk_copy_to_cluster(
            mapa_shared_cluster(to, rank ^ 1u), from, kQueryChunkBytes,
            mapa_shared_cluster(warp.smem + Smem::kBarDsFull + sent_stage * 8, rank ^ 1u));
      }
      if (last) {
        const bool end = sent_stage + 1 == Cfg::kStagesDs;
        sent_stage = end ? 0 : sent_stage + 1;
        sent_parity ^= end ? 1u : 0u;
      }
    }
    step += last ? 1u : 0u;
  }
};

// Joint division: all of S^T, dP^T, dV and dK of 64 keys.
struct KeyRole : RoleBase {
  i32 block;
  QRing q;
  DoRing dos;
  DsWriter ds;
  DkSum rDk;
  DvSum rDv;

  DEVICE KeyRole(const HopperBwdParams& p, const KeyTile& tile, u32 smem, i32 block)
      : RoleBase(p, tile, smem), block(block), q(smem), dos(smem), ds(smem, rank()) {
    clear(rDk);
    clear(rDv);
  }

  DEVICE i32 first_row() const { return block * 64 + warp.warp_idx * 16; }

  DEVICE void step(i32 head, i32 m_block) {
    const u32 rows = u32(block * 64 * 128);
    const ScoreTile scores{p, tile, first_row(), warp.lane_idx};
    f32 rS[kRegsS];
    Packed rP, rX;
    if (keys_pending) {
      wait_phase(warp.smem + Smem::kBarKFull, 0);
    }
    q.wait();
    wgmma_fence();
    issue_scores<Cfg::kHeadDimQk, Cfg::kAuxLse>(rS, warp.smem + Smem::kK + rows, q.tile(),
                                                warp.smem + Smem::kOnes, lse_stage(q));
    wgmma_wait_group<0>();
    wgmma_hold(rS);
    scores.finish_scores(rS, rP, rX, head, m_block, lse_stage(q));

    f32 rDp[kRegsS];
    wait_keys(Smem::kBarVFull);
    dos.wait();
    wgmma_fence();
    issue_scores<Cfg::kHeadDimV, Cfg::kAuxD>(rDp, warp.smem + Smem::kV + rows, dos.tile(),
                                             warp.smem + Smem::kOnes, d_stage(dos));
    issue_gradient(rDv, rP, dos.tile());
    wgmma_wait_group<1>();
    wgmma_hold(rDp);
    Packed rDs;
    scores.finish_ds(rDs, rX, rDp, d_stage(dos));
    wgmma_fence();
    issue_gradient(rDk, rDs, q.tile());
    ds.put(rDs, warp, block, true, true);
    wgmma_wait_group<1>();
    hold(rDv);
    dos.release(warp.leads());
    wgmma_wait_group<0>();
    hold(rDk);
    q.release(warp.leads());
  }

  DEVICE void finish() const {
    store_dv(rDv, p, tile, first_row(), warp.lane_idx);
    store_dk(rDk, p, tile, first_row(), warp.lane_idx);
  }
};
