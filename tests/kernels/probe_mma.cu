// One mma per warp.
//   in: (warps, 32 lanes, 10) = a[4], b[2], d[4] of each lane.  out: (warps, 32 lanes, 4) = d.
#include "prelude.cuh"

#include "common/ptx/memory.cuh"
#include "common/ptx/mma.cuh"
#include "tests/kernels/probe_params.cuh"

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) probe_mma(GRID_CONSTANT ProbeParams p) {
  const i32 thread = block_idx() * Cfg::kNumThreads + thread_idx();
  const u32* in = p.in + 10 * thread;
  u32 rA[4], rB[2];
  f32 rD[4];
  for (i32 i = 0; i < 4; ++i) {
    rA[i] = ld_global_u32(in + i);
    rD[i] = ld_global_f32(in + 6 + i);
  }
  for (i32 i = 0; i < 2; ++i) {
    rB[i] = ld_global_u32(in + 4 + i);
  }
  if constexpr (Cfg::kBf16) {
    mma_m16n8k16_bf16(rD, rA, rB[0], rB[1]);
  } else {
    mma_m16n8k16_f16(rD, rA, rB[0], rB[1]);
  }
  for (i32 i = 0; i < 4; ++i) {
    st_global_f32(p.out + 4 * thread + i, rD[i]);
  }
}
