// Each thread adds its four floats of `in` to the four of `out` that its lane names; all threads of
// a lane meet there.
//   in: (grid, num_threads, 4) floats.  out: (32, 4) floats.
#include "prelude.cuh"

#include "common/ptx/memory.cuh"
#include "tests/kernels/probe_params.cuh"

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) probe_red_v4(GRID_CONSTANT ProbeParams p) {
  const i32 thread = block_idx() * Cfg::kNumThreads + thread_idx();
  f32 value[4];
  for (i32 i = 0; i < 4; ++i) {
    value[i] = ld_global_f32(p.in + 4 * thread + i);
  }
  f32* out = static_cast<f32*>(static_cast<void*>(p.out));
  red_global_add_v4_f32(out + 4 * (thread_idx() % 32), value);
}
