// Each thread copies Cfg::kCopyBytes four times to shared memory, over a pattern, in two groups.
//   in, out: (4, num_threads, copy_bytes) bytes.  aux: (4, num_threads) valid bytes of each copy.
#include "prelude.cuh"

#include "common/ptx/barrier.cuh"
#include "common/ptx/cp_async.cuh"
#include "common/ptx/memory.cuh"
#include "tests/kernels/probe_params.cuh"

DEVICE void copy(u32 dst, const u32* src, i32 valid_bytes) {
  if constexpr (Cfg::kCopyBytes == 16 && Cfg::kPolicy) {
    cp_async_16_with_policy(dst, src, valid_bytes, evict_first_policy());
  } else if constexpr (Cfg::kCopyBytes == 16) {
    cp_async_16(dst, src, valid_bytes);
  } else if constexpr (Cfg::kCopyBytes == 8) {
    cp_async_8(dst, src, valid_bytes);
  } else {
    cp_async_4(dst, src, valid_bytes);
  }
}

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) probe_cp_async(GRID_CONSTANT ProbeParams p) {
  constexpr i32 kWords = Cfg::kCopyBytes / 4;
  constexpr i32 kRoundWords = Cfg::kNumThreads * kWords;
  static_assert(Cfg::kSmemBytes == 4 * 4 * kRoundWords);
  for (i32 i = thread_idx(); i < 4 * kRoundWords; i += Cfg::kNumThreads) {
    st_shared_u32(smem_base() + u32(4 * i), 0xdeadbeefu);
  }
  cta_sync();
  for (i32 round = 0; round < 4; ++round) {
    const i32 word = round * kRoundWords + thread_idx() * kWords;
    copy(smem_base() + u32(4 * word), p.in + word,
         ld_global_i32(p.aux + round * Cfg::kNumThreads + thread_idx()));
    if (round % 2 == 1) {
      cp_async_commit_group();
    }
  }
  // The first group's bytes are the thread's own after one wait, everybody's after the barrier.
  cp_async_wait_group<1>();
  for (i32 i = 0; i < kWords; ++i) {
    const i32 word = thread_idx() * kWords + i;
    st_global_u32(p.out + word, ld_shared_u32(smem_base() + u32(4 * word)));
  }
  cp_async_wait_group<0>();
  cta_sync();
  for (i32 i = kRoundWords + thread_idx(); i < 4 * kRoundWords; i += Cfg::kNumThreads) {
    st_global_u32(p.out + i, ld_shared_u32(smem_base() + u32(4 * i)));
  }
}
