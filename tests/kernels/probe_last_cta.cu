// Each CTA copies its words from in to out; the last one to finish adds up all that the others have
// written. So does each other CTA that learns in time, by looking again and again, that all have.
//   in, out: (grid, num_threads) words.
//   aux: counter of 64 bits, zero before and after; CTA that was last; CTAs that added up; sums of
//   out over the CTAs, one a thread; the same again, from any CTA that added up.
#include "prelude.cuh"

#include "common/ptx/barrier.cuh"
#include "common/ptx/memory.cuh"
#include "tests/kernels/probe_params.cuh"

constexpr u64 kLeft = u64(1) << 32;

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) probe_last_cta(GRID_CONSTANT ProbeParams p) {
  const i32 thread = block_idx() * Cfg::kNumThreads + thread_idx();
  u64* counter = reinterpret_cast<u64*>(p.aux);
  const u32 all = u32(grid_dim());
  st_global_u32(p.out + thread, ld_global_u32(p.in + thread));
  cta_sync();
  if (thread_idx() == 0) {
    u32 arrived = u32(atomic_add_acq_rel_global_u64(counter, 1)) + 1;
    const bool last = arrived == all;
    for (i32 i = 0; i < p.which && arrived < all; ++i) {
      arrived = u32(ld_acquire_global_u64(counter));
    }
    st_shared_u32(smem_base(), arrived);
    st_shared_u32(smem_base() + 4, last);
    if (u32(atomic_add_global_u64(counter, kLeft) >> 32) == all - 1) {
      st_global_u64(counter, 0);
    }
  }
  cta_sync();
  if (ld_shared_u32(smem_base()) == all) {
    u32 sum = 0;
    for (i32 cta = 0; cta < grid_dim(); ++cta) {
      sum += ld_global_u32(p.out + cta * Cfg::kNumThreads + thread_idx());
    }
    const bool last = ld_shared_u32(smem_base() + 4) != 0;
    st_global_u32(p.aux + 4 + thread_idx() + (last ? 0 : Cfg::kNumThreads), sum);
    if (thread_idx() == 0) {
      atomic_add_global_u32(p.aux + 3, 1);
      if (last) {
        st_global_u32(p.aux + 2, u32(block_idx()));
      }
    }
  }
}
