// Twin of common/ptx/wgmma.cuh for the simulator, for every N. A product is computed when it is
// waited for; until then d holds NaN.
#pragma once
#include "common/ptx/base.cuh"
#include "common/sim/runtime/calls_hopper.h"

template <bool kBf16, bool kTransB, int kNumRegs>
DEVICE void wgmma_ss(f32 (&d)[kNumRegs], u64 desc_a, u64 desc_b, bool accumulate, SITE) {
  static_assert(kNumRegs % 4 == 0 && kNumRegs <= 128);
  flash_sim::WgmmaArgs args{d, nullptr, desc_a, desc_b, 2 * kNumRegs, kBf16, kTransB, accumulate};
  flash_sim::warp_op(flash_sim::WarpOp::kWgmma, &args, site);
}

template <bool kBf16, bool kTransB, int kNumRegs>
DEVICE void wgmma_rs(f32 (&d)[kNumRegs], const u32 (&a)[4], u64 desc_b, bool accumulate, SITE) {
  static_assert(kNumRegs % 4 == 0 && kNumRegs <= 128);
  flash_sim::WgmmaArgs args{d, a, 0, desc_b, 2 * kNumRegs, kBf16, kTransB, accumulate};
  flash_sim::warp_op(flash_sim::WarpOp::kWgmma, &args, site);
}

DEVICE void wgmma_fence(SITE) {
  flash_sim::LaneArgs args{0};
  flash_sim::warp_op(flash_sim::WarpOp::kWgmmaFence, &args, site);
}

DEVICE void wgmma_commit_group(SITE) {
  flash_sim::LaneArgs args{0};
  flash_sim::warp_op(flash_sim::WarpOp::kWgmmaCommitGroup, &args, site);
}

template <int kPending>
DEVICE void wgmma_wait_group(SITE) {
  flash_sim::LaneArgs args{kPending};
  flash_sim::warp_op(flash_sim::WarpOp::kWgmmaWaitGroup, &args, site);
}

template <int kN>
DEVICE void wgmma_hold(f32 (&d)[kN], SITE) {
  flash_sim::wgmma_hold(d, kN, site);
}

template <int kN>
DEVICE void wgmma_pin(u32 (&a)[kN]) {}
