// CTAs that take turns at each tile of out: out = 3 * out + CTA + 1, which shows the order.
//   out: (tiles = grid, num_threads) words.  aux: (tiles,) counters of the turns taken, 0 before.
//   p.which % 3: how a turn is released.  p.which / 3: 0: CTA j begins at tile j and goes round, so
//   that it waits for later ones too; 1: all begin at tile 0; 2: as 0, and no CTA is ever first;
//   3: sleeps without having looked.
#include "prelude.cuh"

#include "common/device/global_wait.cuh"
#include "common/ptx/barrier.cuh"
#include "common/ptx/memory.cuh"
#include "tests/kernels/probe_params.cuh"

DEVICE void release(u32* counter, i32 form) {
  if (form == 0) {
    red_release_global_add_u32(counter, 1);
  } else if (form == 1) {
    st_release_global_u32(counter, ld_acquire_global_u32(counter) + 1);
  } else {
    fence_acq_rel_gpu();
    atomic_add_global_u32(counter, 1);
  }
}

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) probe_global_wait(GRID_CONSTANT ProbeParams p) {
  const i32 variant = p.which / 3;
  const i32 tiles = grid_dim();
  if (variant == 3) {
    nanosleep(1);
  }
  for (i32 i = 0; i < tiles; ++i) {
    const i32 tile = variant == 1 ? i : (block_idx() + i) % tiles;
    const u32 turn = u32(variant == 1 ? block_idx() : i) + (variant == 2 ? 1 : 0);
    u32* out = p.out + tile * Cfg::kNumThreads + thread_idx();
    if (thread_idx() == 0) {
      wait_global_at_least(p.aux + tile, turn);
    }
    cta_sync();
    st_global_u32(out, 3 * ld_global_u32(out) + u32(block_idx()) + 1);
    cta_sync();
    if (thread_idx() == 0) {
      release(p.aux + tile, p.which % 3);
    }
  }
}
