// Conversions.
//   in: (count,) words.  out: (count, 6) = f16x2 and bf16x2 of the word and the next one, both
//   roundings of the word, its lower half widened from fp16 and from bf16.
#include "prelude.cuh"

#include "common/ptx/convert.cuh"
#include "common/ptx/memory.cuh"
#include "tests/kernels/probe_params.cuh"

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) probe_convert(GRID_CONSTANT ProbeParams p) {
  for (i32 i = block_idx() * Cfg::kNumThreads + thread_idx(); i < p.count;
       i += grid_dim() * Cfg::kNumThreads) {
    const u32 word = ld_global_u32(p.in + i);
    const f32 value = bits_as_f32(word);
    const f32 next = bits_as_f32(ld_global_u32(p.in + (i + 1) % p.count));
    u32* out = p.out + 6 * i;
    st_global_u32(out, cvt_f16x2(value, next));
    st_global_u32(out + 1, cvt_bf16x2(value, next));
    st_global_u32(out + 2, f32_to_f16(value));
    st_global_u32(out + 3, f32_to_bf16(value));
    st_global_f32(out + 4, f16_to_f32(u16(word)));
    st_global_f32(out + 5, bf16_to_f32(u16(word)));
  }
}
