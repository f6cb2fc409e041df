// CTAs that add their row of floats to each row of out, by two warps, in an order: row t gets those
// of CTA 0, 1, ... One thread waits and counts for all.
//   in: (grid, 64) floats.  out: (grid, 64) floats, then as many counters of the additions, 0
//   before.
//   p.which: 0: right. 1: right, by a fence of its own. What is wrong otherwise: 2: the count does
//   not release. 3: no barrier between additions and count. 4: no barrier between the look and
//   additions. 5: nothing waits. 6: waits for one turn too few.
#include "prelude.cuh"

#include "common/device/global_wait.cuh"
#include "common/ptx/barrier.cuh"
#include "common/ptx/memory.cuh"
#include "tests/kernels/probe_params.cuh"

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) probe_ordered_reds(GRID_CONSTANT ProbeParams p) {
  static_assert(Cfg::kNumThreads == 64);
  f32* out = static_cast<f32*>(static_cast<void*>(p.out));
  const f32 value = bits_as_f32(ld_global_u32(p.in + block_idx() * 64 + thread_idx()));
  for (i32 row = 0; row < grid_dim(); ++row) {
    u32* counter = p.out + grid_dim() * 64 + row;
    const i32 turn = block_idx() - (p.which == 6 ? 1 : 0);
    if (thread_idx() == 0 && turn > 0 && p.which != 5) {
      wait_global_at_least(counter, u32(turn));
    }
    if (p.which != 4) {
      cta_sync();
    }
    red_global_add_f32(out + row * 64 + thread_idx(), value);
    if (p.which != 3) {
      cta_sync();
    }
    if (thread_idx() == 0) {
      if (p.which == 1) {
        fence_acq_rel_gpu();
      }
      if (p.which == 1 || p.which == 2) {
        atomic_add_global_u32(counter, 1);
      } else {
        red_release_global_add_u32(counter, 1);
      }
    }
  }
}
