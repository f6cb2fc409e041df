// Twin of common/ptx/cluster.cuh for the simulator, where the CTAs of a cluster are one machine.
#pragma once
#include "common/ptx/base.cuh"
#include "common/sim/runtime/calls_hopper.h"

DEVICE u32 cluster_ctarank() { return flash_sim::cluster_ctarank(); }

DEVICE u32 mapa_shared_cluster(u32 addr, u32 rank, SITE) {
  return flash_sim::mapa_shared_cluster(addr, rank, site);
}

DEVICE void cluster_arrive(SITE) {
  flash_sim::LaneArgs args{0};
  flash_sim::warp_op(flash_sim::WarpOp::kClusterArrive, &args, site);
}

DEVICE void cluster_wait(SITE) {
  flash_sim::LaneArgs args{0};
  flash_sim::warp_op(flash_sim::WarpOp::kClusterWait, &args, site);
}

DEVICE void mbarrier_arrive_cluster(u32 bar, SITE) {
  flash_sim::mbarrier_arrive_cluster(bar, site);
}

DEVICE bool mbarrier_try_wait_parity_cluster(u32 bar, u32 parity, SITE) {
  return flash_sim::mbarrier_try_wait_parity_cluster(bar, parity, site);
}

DEVICE void bulk_copy_to_cluster(u32 dst, u32 src, u32 bytes, u32 bar, SITE) {
  flash_sim::bulk_copy_to_cluster(dst, src, bytes, bar, site);
}
