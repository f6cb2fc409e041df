// Asynchronous copies global -> shared past the registers. Called by
// flash2/device/tile_copy.cuh.
//   dst: shared address, aligned to the copy's size.
//   src: global, aligned to the copy's size; nothing is read from it when valid_bytes is 0.
//   valid_bytes: 0..size are read from src, the rest of dst becomes zero: this pads tails.
// Done when the commit group that it joins has been waited for by the thread that issued it;
// other threads also need a barrier after that wait. Until then no thread may touch dst.
#pragma once
#include "common/ptx/base.cuh"

// Copies 16 bytes, cached in L2 only. PTX: cp.async.cg.shared.global (sm_80+).
DEVICE void cp_async_16(u32 dst, const void* src, i32 valid_bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dst), "l"(src),
               "r"(valid_bytes)
               : "memory");
}

// The same with a policy for L2. PTX: cp.async.cg.shared.global.L2::cache_hint (sm_80+).
DEVICE void cp_async_16_with_policy(u32 dst, const void* src, i32 valid_bytes, u64 policy) {
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(dst),
      "l"(src), "r"(valid_bytes), "l"(policy)
      : "memory");
}

// The policy for data that are not read again soon: they leave L2 before others do.
// PTX: createpolicy.fractional.L2::evict_first (sm_80+).
DEVICE u64 evict_first_policy() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Copies 8 bytes, cached in L1 and L2. PTX: cp.async.ca.shared.global (sm_80+).
DEVICE void cp_async_8(u32 dst, const void* src, i32 valid_bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(dst), "l"(src), "r"(valid_bytes)
               : "memory");
}

// Copies 4 bytes, cached in L1 and L2. PTX: cp.async.ca.shared.global (sm_80+).
DEVICE void cp_async_4(u32 dst, const void* src, i32 valid_bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(src), "r"(valid_bytes)
               : "memory");
}

// Closes this thread's current group of copies, which may be empty.
// PTX: cp.async.commit_group (sm_80+).
DEVICE void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the kPending latest committed groups of this thread are unfinished.
// PTX: cp.async.wait_group (sm_80+).
template <int kPending>
DEVICE void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
