// Each thread carries 64 bytes in -> shared -> out with every width, then adds to aux.
//   in, out: (grid, num_threads, 16) words.
//   aux: float sum of the first word of each thread, counter, then each thread's old value of it.
#include "prelude.cuh"

#include "common/ptx/memory.cuh"
#include "tests/kernels/probe_params.cuh"

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) probe_memory(GRID_CONSTANT ProbeParams p) {
  const i32 thread = block_idx() * Cfg::kNumThreads + thread_idx();
  const u32* in = p.in + 16 * thread;
  u32* out = p.out + 16 * thread;
  const u32 s = smem_base() + u32(64 * thread_idx());

  u32 r[4];
  ld_global_v4(r, in);  // bytes 0..15
  st_shared_v4(s, r);
  st_shared_u64(s + 16, ld_global_u64(in + 4));
  st_shared_u64(s + 24, u64(ld_global_i64(in + 6)));
  st_shared_u32(s + 32, ld_global_u32(in + 8));
  st_shared_u32(s + 36, u32(ld_global_i32(in + 9)));
  st_shared_f32(s + 40, ld_global_f32(in + 10));
  st_shared_u16(s + 44, ld_global_u16(in + 11));
  st_shared_u16(s + 46, ld_global_u16(static_cast<const char*>(static_cast<const void*>(in)) + 46));
  ld_global_v4(r, in + 12);
  st_shared_v4(s + 48, r);

  st_global_u64(out, ld_shared_u64(s));
  st_global_u32(out + 2, ld_shared_u32(s + 8));
  st_global_f32(out + 3, ld_shared_f32(s + 12));
  ld_shared_v4(r, s + 16);
  st_global_v4(out + 4, r);
  for (i32 i = 0; i < 16; ++i) {
    st_global_u16(static_cast<char*>(static_cast<void*>(out)) + 32 + 2 * i,
                  ld_shared_u16(s + 32 + u32(2 * i)));
  }

  red_global_add_f32(static_cast<f32*>(static_cast<void*>(p.aux)), ld_global_f32(in));
  st_global_u32(p.aux + 2 + thread, atomic_add_global_u32(p.aux + 1, 3));
}
