// hopper/bwd.cu: dK, dV and the fp32 sums of dQ, for sm_90a (WGMMA, TMA). Launched by
// hopper/bwd.py between bwd_preprocess.cu, which prepares softmax_d and lse_log2, and
// bwd_convert.cu, which rounds dQ; both are those of flash2/.
// CTA: one tile of kBlockN keys and query heads that read the same K head and the same V head.
// Warpgroups: one that loads (a thread for TMA, a warp for lse and D), one that computes dQ, and
// those with all of 64 keys each (KeyRole) or, with Cfg::kSplitRoles, one with the upper and one
// with the lower line of
//   S^T = K Q^T      P^T = exp(S^T - lse)            dV += P^T dO
//   dP^T = V dO^T    dS^T = P^T * (dP^T - D)         dK += dS^T Q      dQ += dS K
// Roles meet at mbarriers only, so one's exponentials run beside another's products.
// docs/hopper_backward_schedule.md shows who does what when.
// Change here: roles, registers. Change elsewhere: what a role does -> bwd_roles.cuh,
// bwd_split_roles.cuh, bwd_dq.cuh, elementwise part -> bwd_scores.cuh, loads -> bwd_producer.cuh,
// stores of dK and dV -> bwd_epilogue.cuh, memory map and walk over the queries -> bwd_layout.cuh,
// order of the CTAs -> bwd_work.cuh, tile sizes -> bwd_tiles.py.
#include "prelude.cuh"  // generated for this problem: struct Cfg

#include "common/device/params.cuh"
#include "common/ptx/barrier.cuh"
#include "common/ptx/cluster.cuh"
#include "common/ptx/griddepcontrol.cuh"
#include "common/ptx/setmaxnreg.cuh"
#include "common/ptx/shuffle.cuh"
#include "common/ptx/tma.cuh"
#include "hopper/bwd_dq.cuh"
#include "hopper/bwd_layout.cuh"
#include "hopper/bwd_producer.cuh"
#include "hopper/bwd_roles.cuh"
#include "hopper/bwd_split_roles.cuh"

DEVICE void init_barriers(u32 smem) {
  mbarrier_init(smem + Smem::kBarKFull, 1);
  mbarrier_init(smem + Smem::kBarVFull, 1);
  QRing(smem).init(kReaders, 2);
  DoRing(smem).init(kReaders, 2);
  DsRing(smem).init(4, 4 * kKeyBlocks);
  for (i32 i = 0; i < kKeyBlocks; ++i) {
    mbarrier_init(smem + Smem::kBarPFull + u32(8 * i), 4);
    mbarrier_init(smem + Smem::kBarPEmpty + u32(8 * i), 4);
  }
  mbarrier_init(smem + Smem::kBarKPeerFull, 1);
  for (i32 i = 0; i < Cfg::kStagesDs; ++i) {
    mbarrier_init(smem + Smem::kBarSentEmpty + u32(8 * i), 4);
  }
  fence_mbarrier_init();
}

// Meets all threads of the cluster: before any reaches into another CTA, and before any returns.
DEVICE void cluster_sync() {
  if constexpr (kCtas > 1) {
    warp_sync();
    cluster_arrive();
    cluster_wait();
  }
}

// Registers of a role, of the kLaunchRegisters that its threads start with.
template <i32 kRegisters>
DEVICE void take_registers() {
  if constexpr (kRegisters > Cfg::kLaunchRegisters) {
    setmaxnreg_inc<kRegisters>();
  } else if constexpr (kRegisters < Cfg::kLaunchRegisters) {
    setmaxnreg_dec<kRegisters>();
  }
}

// The rest of a warp's life, in one role.
template <class Role, class... Arguments>
DEVICE void run_role(const HopperBwdParams& p, u32 smem, Arguments... arguments) {
  const KeyTile tile(smem);
  Role role(p, tile, smem, arguments...);
  walk(role, tile);
  role.finish();
}

CLUSTER_KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm, Cfg::kClusterSize)
hopper_bwd(GRID_CONSTANT HopperBwdParams p) {
  const u32 smem = smem_base();
  const i32 wg_idx = i32(shfl_idx_u32(u32(thread_idx() / 128), 0));  // uniform, and known to be
  if (thread_idx() == 0) {
    prefetch_tensor_map(&p.q_map);
    prefetch_tensor_map(&p.k_map);
    prefetch_tensor_map(&p.v_map);
    prefetch_tensor_map(&p.dout_map);
    init_barriers(smem);
  }
  if (wg_idx == 1 && thread_idx() / 32 == 4) {
    KeyTile(smem).init(p);
  }
  init_aux(smem);
  cta_sync();
  griddepcontrol_launch_dependents();
  if (KeyTile(smem).empty()) {
    griddepcontrol_wait();  // what follows relies on this launch to end after the one ahead
    return;
  }
  cluster_sync();
  if (wg_idx == 0) {
    take_registers<Cfg::kProducerRegisters>();
    const i32 warp_idx = i32(shfl_idx_u32(u32(thread_idx() / 32), 0));
    if (warp_idx == 0 && thread_idx() % 32 == 0) {
      run_role<Producer>(p, smem);
    } else if (warp_idx == 1) {
      run_role<StatWriter<true>>(p, smem);
    } else if (warp_idx == 2) {
      run_role<StatWriter<false>>(p, smem);
    }
  } else if (wg_idx == 1) {
    take_registers<Cfg::kDqRegisters>();
    run_role<DqRole>(p, smem);
  } else if constexpr (!Cfg::kSplitRoles) {
    take_registers<Cfg::kScoreRegisters>();
    run_role<KeyRole>(p, smem, wg_idx - 2);
  } else if (wg_idx == 2) {
    take_registers<Cfg::kScoreRegisters>();
    run_role<ScoreRole>(p, smem);
  } else {
    take_registers<Cfg::kGradientRegisters>();
    run_role<GradientRole>(p, smem);
  }
  cluster_sync();
}
