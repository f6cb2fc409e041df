// Twin of common/ptx/barrier.cuh for the simulator.
#pragma once
#include "common/ptx/base.cuh"

DEVICE void cta_sync(SITE) {
  flash_sim::LaneArgs args{0};
  flash_sim::warp_op(flash_sim::WarpOp::kCtaSync, &args, site);
}

DEVICE void warp_sync(SITE) {
  flash_sim::LaneArgs args{0};
  flash_sim::warp_op(flash_sim::WarpOp::kWarpSync, &args, site);
}

DEVICE void named_barrier_sync(i32 id, i32 threads, SITE) {
  flash_sim::LaneArgs args{static_cast<u32>(id), threads};
  flash_sim::warp_op(flash_sim::WarpOp::kNamedBarrierSync, &args, site);
}

DEVICE void named_barrier_arrive(i32 id, i32 threads, SITE) {
  flash_sim::LaneArgs args{static_cast<u32>(id), threads};
  flash_sim::warp_op(flash_sim::WarpOp::kNamedBarrierArrive, &args, site);
}
