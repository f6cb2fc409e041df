// Mistakes for compute-sanitizer, which has to find them: tests/sanitize.py. Two warps, 1024 bytes
// of shared memory. Unlike those of probe_misuse.cu they change what the kernel writes, so that the
// compiler keeps them, and they end on a GPU.
//   in, out: (64,) words.
#include "prelude.cuh"

#include "common/ptx/barrier.cuh"
#include "common/ptx/memory.cuh"
#include "tests/kernels/probe_params.cuh"

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) probe_planted(GRID_CONSTANT ProbeParams p) {
  const i32 thread = thread_idx();
  const u32 slot = smem_base() + 4u * u32(thread), other = smem_base() + 4u * u32(63 - thread);
  u32 value = 0;
  if (p.which == 0) {  // memcheck: one read past the end
    value = ld_global_u32(p.in + 1 + thread);
  } else if (p.which == 1) {  // racecheck: written by one warp, read by the other
    st_shared_u32(slot, u32(thread));
    value = ld_shared_u32(other);
  } else if (p.which == 2) {  // synccheck: two barriers where one is meant
    st_shared_u32(slot, u32(thread));
    if (thread < 32) {
      cta_sync();
      value = ld_shared_u32(other);
    } else {
      value = ld_global_u32(p.in + thread);
      cta_sync();
      value += ld_shared_u32(other);
    }
  }
  st_global_u32(p.out + thread, value);
}
