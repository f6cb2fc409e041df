// Twin of common/ptx/mma.cuh for the simulator.
#pragma once
#include "common/ptx/base.cuh"

DEVICE void mma_m16n8k16_f16(f32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, SITE) {
  flash_sim::MmaArgs args{d, a, {b0, b1}};
  flash_sim::warp_op(flash_sim::WarpOp::kMmaF16, &args, site);
}

DEVICE void mma_m16n8k16_bf16(f32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, SITE) {
  flash_sim::MmaArgs args{d, a, {b0, b1}};
  flash_sim::warp_op(flash_sim::WarpOp::kMmaBf16, &args, site);
}
