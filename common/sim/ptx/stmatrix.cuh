// Twin of common/ptx/stmatrix.cuh for the simulator.
#pragma once
#include "common/ptx/base.cuh"
#include "common/sim/runtime/calls_hopper.h"

DEVICE void stmatrix_x4(u32 addr, u32 r0, u32 r1, u32 r2, u32 r3, SITE) {
  flash_sim::StmatrixArgs args{addr, {r0, r1, r2, r3}};
  flash_sim::warp_op(flash_sim::WarpOp::kStmatrixX4, &args, site);
}

DEVICE void stmatrix_x4_trans(u32 addr, u32 r0, u32 r1, u32 r2, u32 r3, SITE) {
  flash_sim::StmatrixArgs args{addr, {r0, r1, r2, r3}};
  flash_sim::warp_op(flash_sim::WarpOp::kStmatrixX4Trans, &args, site);
}
