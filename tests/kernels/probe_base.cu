// Coordinates and bit casts.
//   in: (grid, num_threads) floats.  out: (grid, num_threads, 4).
#include "prelude.cuh"

#include "common/ptx/memory.cuh"
#include "tests/kernels/probe_params.cuh"

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) probe_base(GRID_CONSTANT ProbeParams p) {
  const i32 thread = block_idx() * Cfg::kNumThreads + thread_idx();
  u32 values[4];
  values[0] = u32(thread_idx()) | u32(block_idx()) << 16;
  values[1] = u32(grid_dim());
  values[2] = smem_base() % 1024u;
  values[3] = f32_as_bits(bits_as_f32(ld_global_u32(p.in + thread)) * 2.0f);
  st_global_v4(p.out + 4 * thread, values);
}
