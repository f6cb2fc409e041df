// Approximate functions.  in: (count,) floats.  out: (count, 4) = ex2, lg2, rcp, tanh.
#include "prelude.cuh"

#include "common/ptx/math.cuh"
#include "common/ptx/memory.cuh"
#include "tests/kernels/probe_params.cuh"

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) probe_math(GRID_CONSTANT ProbeParams p) {
  for (i32 i = block_idx() * Cfg::kNumThreads + thread_idx(); i < p.count;
       i += grid_dim() * Cfg::kNumThreads) {
    const f32 x = ld_global_f32(p.in + i);
    st_global_f32(p.out + 4 * i, ex2_approx(x));
    st_global_f32(p.out + 4 * i + 1, lg2_approx(x));
    st_global_f32(p.out + 4 * i + 2, rcp_approx(x));
    st_global_f32(p.out + 4 * i + 3, tanh_approx(x));
  }
}
