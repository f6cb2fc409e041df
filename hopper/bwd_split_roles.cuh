// Roles of hopper/bwd.cu if Cfg::kSplitRoles: one warpgroup with S^T, P^T and dV of all keys, one
// with dP^T, dS^T and dK. P^T goes from one to the other through shared memory. Included by bwd.cu
// only.
#pragma once
#include "hopper/bwd_roles.cuh"

// Where a lane's fragments of P^T lie on their way from one role to the other: 16 bytes each.
DEVICE u32 handoff(const Warp& warp, i32 block, i32 k) {
  return warp.smem + Smem::kP +
         u32(((block * 4 + warp.warp_idx) * kStepsM + k) * 512 + warp.lane_idx * 16);
}

// Split roles, first: S^T, P^T and dV.
struct ScoreRole : RoleBase {
  QRing q;
  DoRing dos;
  DvSum rDv[kKeyBlocks];
  u32 p_parity;

  DEVICE ScoreRole(const HopperBwdParams& p, const KeyTile& tile, u32 smem)
      : RoleBase(p, tile, smem), q(smem), dos(smem), p_parity(1) {
#pragma unroll
    for (i32 block = 0; block < kKeyBlocks; ++block) {
      clear(rDv[block]);
    }
  }

  DEVICE void step(i32 head, i32 m_block) {
    wait_keys(Smem::kBarKFull);
    q.wait();
#pragma unroll
    for (i32 block = 0; block < kKeyBlocks; ++block) {
      const ScoreTile scores{p, tile, block * 64 + warp.warp_idx * 16, warp.lane_idx};
      f32 rS[kRegsS];
      Packed rP, rX;
      wgmma_fence();
      issue_scores<Cfg::kHeadDimQk, Cfg::kAuxLse>(rS, warp.smem + Smem::kK + u32(block * 64 * 128),
                                                  q.tile(), warp.smem + Smem::kOnes, lse_stage(q));
      wgmma_wait_group<0>();
      wgmma_hold(rS);
      if (block > 0) {
        hold(rDv[block > 0 ? block - 1 : 0]);
      }
      scores.finish_scores(rS, rP, rX, head, m_block, lse_stage(q));
      wait_phase(warp.smem + Smem::kBarPEmpty + u32(8 * block), p_parity);
#pragma unroll
      for (i32 k = 0; k < kStepsM; ++k) {
        st_shared_v4(handoff(warp, block, k), rX[k]);
      }
      warp_sync();
      if (warp.leads()) {
        mbarrier_arrive(warp.smem + Smem::kBarPFull + u32(8 * block));
      }
      if (block == 0) {
        dos.wait();
      }
      wgmma_fence();
      issue_gradient(rDv[block], rP, dos.tile());
    }
    q.release(warp.leads());
    wgmma_wait_group<0>();
    hold(rDv[kKeyBlocks - 1]);
    dos.release(warp.leads());
    p_parity ^= 1u;
  }

  DEVICE void finish() const {
#pragma unroll
    for (i32 block = 0; block < kKeyBlocks; ++block) {
      store_dv(rDv[block], p, tile, block * 64 + warp.warp_idx * 16, warp.lane_idx);
    }
  }
};

// Split roles, second: dP^T, dS^T and dK.
struct GradientRole : RoleBase {
  QRing q;
  DoRing dos;
  DsWriter ds;
  DkSum rDk[kKeyBlocks];
  u32 p_parity;

  DEVICE GradientRole(const HopperBwdParams& p, const KeyTile& tile, u32 smem)
      : RoleBase(p, tile, smem), q(smem), dos(smem), ds(smem, rank()), p_parity(0) {
#pragma unroll
    for (i32 block = 0; block < kKeyBlocks; ++block) {
      clear(rDk[block]);
    }
  }

  DEVICE void step(i32, i32) {
    const ScoreTile scores{p, tile, 0, warp.lane_idx};
    wait_keys(Smem::kBarVFull);
    dos.wait();
#pragma unroll
    for (i32 block = 0; block < kKeyBlocks; ++block) {
      f32 rDp[kRegsS];
      Packed rX, rDs;
      wgmma_fence();
      issue_scores<Cfg::kHeadDimV, Cfg::kAuxD>(rDp, warp.smem + Smem::kV + u32(block * 64 * 128),
                                               dos.tile(), warp.smem + Smem::kOnes, d_stage(dos));
      wait_phase(warp.smem + Smem::kBarPFull + u32(8 * block), p_parity);
#pragma unroll
      for (i32 k = 0; k < kStepsM; ++k) {
        ld_shared_v4(rX[k], handoff(warp, block, k));
      }
      warp_sync();
      if (warp.leads()) {
        mbarrier_arrive(warp.smem + Smem::kBarPEmpty + u32(8 * block));
      }
      wgmma_wait_group<0>();
      wgmma_hold(rDp);
      if (block > 0) {
        hold(rDk[block > 0 ? block - 1 : 0]);
      }
      scores.finish_ds(rDs, rX, rDp, d_stage(dos));
      if (block == 0) {
        q.wait();
      }
      wgmma_fence();
      issue_gradient(rDk[block], rDs, q.tile());
      ds.put(rDs, warp, block, block == 0, block == kKeyBlocks - 1);
    }
    dos.release(warp.leads());
    wgmma_wait_group<0>();
    hold(rDk[kKeyBlocks - 1]);
    q.release(warp.leads());
    p_parity ^= 1u;
  }

  DEVICE void finish() const {
#pragma unroll
    for (i32 block = 0; block < kKeyBlocks; ++block) {
      store_dk(rDk[block], p, tile, block * 64 + warp.warp_idx * 16, warp.lane_idx);
    }
  }
};
