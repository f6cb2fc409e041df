// Shuffles and votes.
//   in: (warps, 32 lanes, 2) = value, operand 0..31.  out: (warps, 32 lanes, 8).
#include "prelude.cuh"

#include "common/ptx/memory.cuh"
#include "common/ptx/shuffle.cuh"
#include "tests/kernels/probe_params.cuh"

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) probe_shuffle(GRID_CONSTANT ProbeParams p) {
  const i32 thread = block_idx() * Cfg::kNumThreads + thread_idx();
  const u32 value = ld_global_u32(p.in + 2 * thread);
  const i32 operand = ld_global_i32(p.in + 2 * thread + 1);
  const i32 uniform = i32(shfl_idx_u32(u32(operand), 0));
  u32 r[8];
  r[0] = f32_as_bits(shfl_xor_f32(bits_as_f32(value), uniform));
  r[1] = shfl_xor_u32(value, uniform);
  r[2] = shfl_idx_u32(value, operand);
  r[3] = shfl_up_u32(value, uniform);
  r[4] = vote_any((value & 31u) == 0u);
  r[5] = vote_any(false);
  r[6] = vote_ballot((value & 1u) != 0u);
  r[7] = u32(uniform);
  for (i32 i = 0; i < 8; ++i) {
    st_global_u32(p.out + 8 * thread + i, r[i]);
  }
}
