// Twin of common/ptx/ldmatrix.cuh for the simulator.
#pragma once
#include "common/ptx/base.cuh"

DEVICE void ldmatrix_x4(u32& r0, u32& r1, u32& r2, u32& r3, u32 addr, SITE) {
  flash_sim::LdmatrixArgs args{{&r0, &r1, &r2, &r3}, addr};
  flash_sim::warp_op(flash_sim::WarpOp::kLdmatrixX4, &args, site);
}

DEVICE void ldmatrix_x4_trans(u32& r0, u32& r1, u32& r2, u32& r3, u32 addr, SITE) {
  flash_sim::LdmatrixArgs args{{&r0, &r1, &r2, &r3}, addr};
  flash_sim::warp_op(flash_sim::WarpOp::kLdmatrixX4Trans, &args, site);
}

DEVICE void ldmatrix_x2(u32& r0, u32& r1, u32 addr, SITE) {
  flash_sim::LdmatrixArgs args{{&r0, &r1}, addr};
  flash_sim::warp_op(flash_sim::WarpOp::kLdmatrixX2, &args, site);
}

DEVICE void ldmatrix_x2_trans(u32& r0, u32& r1, u32 addr, SITE) {
  flash_sim::LdmatrixArgs args{{&r0, &r1}, addr};
  flash_sim::warp_op(flash_sim::WarpOp::kLdmatrixX2Trans, &args, site);
}
