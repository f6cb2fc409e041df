// Both forms of stmatrix, by one warp.
//   in: (32 lanes, 5) words: the four registers and the row that the lane names, a permutation.
//   out: (2, 128) words = 32 rows of 16 bytes after stmatrix_x4, after stmatrix_x4_trans.
#include "prelude.cuh"

#include "common/ptx/barrier.cuh"
#include "common/ptx/memory.cuh"
#include "common/ptx/stmatrix.cuh"
#include "tests/kernels/hopper_probe_params.cuh"

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) probe_stmatrix(GRID_CONSTANT HopperProbeParams p) {
  const i32 lane = thread_idx();
  u32 r[5];
  for (i32 i = 0; i < 5; ++i) {
    r[i] = ld_global_u32(p.in + lane * 5 + i);
  }
  for (i32 form = 0; form < 2; ++form) {
    const u32 rows = smem_base() + u32(form) * 512;
    if (form == 0) {
      stmatrix_x4(rows + 16 * r[4], r[0], r[1], r[2], r[3]);
    } else {
      stmatrix_x4_trans(rows + 16 * r[4], r[0], r[1], r[2], r[3]);
    }
    warp_sync();
    for (i32 i = lane; i < 128; i += 32) {
      st_global_u32(p.out + form * 128 + i, ld_shared_u32(rows + 4u * u32(i)));
    }
  }
}
