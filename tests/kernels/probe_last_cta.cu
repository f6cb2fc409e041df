// Each CTA copies its words from in to out; the last one to finish adds up all that the others have
// written.
//   in, out: (grid, num_threads) words.
//   aux: counter, zero before and after; CTA that was last; sums of out over the CTAs, one a
//   thread.
#include "prelude.cuh"

#include "common/ptx/barrier.cuh"
#include "common/ptx/memory.cuh"
#include "tests/kernels/probe_params.cuh"

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) probe_last_cta(GRID_CONSTANT ProbeParams p) {
  const i32 thread = block_idx() * Cfg::kNumThreads + thread_idx();
  st_global_u32(p.out + thread, ld_global_u32(p.in + thread));
  cta_sync();
  if (thread_idx() == 0) {
    st_shared_u32(smem_base(), atomic_inc_acq_rel_global_u32(p.aux, u32(grid_dim() - 1)));
  }
  cta_sync();
  if (ld_shared_u32(smem_base()) == u32(grid_dim() - 1)) {
    u32 sum = 0;
    for (i32 cta = 0; cta < grid_dim(); ++cta) {
      sum += ld_global_u32(p.out + cta * Cfg::kNumThreads + thread_idx());
    }
    st_global_u32(p.aux + 2 + thread_idx(), sum);
    if (thread_idx() == 0) {
      st_global_u32(p.aux + 1, u32(block_idx()));
    }
  }
}
