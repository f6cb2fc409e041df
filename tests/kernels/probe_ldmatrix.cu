// The four forms of ldmatrix, by one warp.
//   in: (256,) words, 64 rows of 16 bytes of shared memory.  aux: (32,) row that each lane names.
//   out: (4, 32 lanes, 4) = x4, x4_trans, x2, x2_trans.
#include "prelude.cuh"

#include "common/ptx/barrier.cuh"
#include "common/ptx/ldmatrix.cuh"
#include "common/ptx/memory.cuh"
#include "tests/kernels/probe_params.cuh"

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) probe_ldmatrix(GRID_CONSTANT ProbeParams p) {
  const i32 lane = thread_idx();
  for (i32 i = lane; i < 256; i += 32) {
    st_shared_u32(smem_base() + u32(4 * i), ld_global_u32(p.in + i));
  }
  warp_sync();
  const u32 addr = smem_base() + 16u * ld_global_u32(p.aux + lane);
  u32 r[4][4] = {};
  ldmatrix_x4(r[0][0], r[0][1], r[0][2], r[0][3], addr);
  ldmatrix_x4_trans(r[1][0], r[1][1], r[1][2], r[1][3], addr);
  ldmatrix_x2(r[2][0], r[2][1], addr);
  ldmatrix_x2_trans(r[3][0], r[3][1], addr);
  for (i32 form = 0; form < 4; ++form) {
    st_global_v4(p.out + (form * 32 + lane) * 4, r[form]);
  }
}
