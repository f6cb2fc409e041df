// One of a chain of launches, each of which reads what the one before it has written: out[i] = in[n
// - 1 - i] + 1, n words in all. It lets its successor start at once and has work to do before its
// own wait. p.which: mistakes, run on the simulator only; lines marked as in
// probe_hopper_misuse.cu.
#include "prelude.cuh"

#include "common/ptx/barrier.cuh"
#include "common/ptx/griddepcontrol.cuh"
#include "common/ptx/memory.cuh"
#include "tests/kernels/hopper_probe_params.cuh"

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm)
probe_griddepcontrol(GRID_CONSTANT HopperProbeParams p) {
  griddepcontrol_launch_dependents();
  const i32 thread = block_idx() * Cfg::kNumThreads + thread_idx();
  const i32 last = grid_dim() * Cfg::kNumThreads - 1;
  const i32 mistake = p.which;
  if (mistake == 1) {
    st_global_u32(p.out + thread, ld_global_u32(p.in + last - thread));  // BAD 1: too early
  }
  if (mistake == 2) {
    st_global_u32(const_cast<u32*>(p.in) + thread, 0);  // BAD 2: others may write it
  }
  if (mistake == 3) {
    return;  // without waiting
  }
  if (thread_idx() == 0) {
    griddepcontrol_wait();
  }
  if (mistake != 4) {
    cta_sync();
  }
  const u32 word = ld_global_u32(p.in + last - thread);  // BAD 4: only thread 0 has waited
  st_global_u32(p.out + thread, word + 1);
}
