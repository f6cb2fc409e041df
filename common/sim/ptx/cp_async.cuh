// Twin of common/ptx/cp_async.cuh for the simulator. The data lands when the thread waits for its
// group, not before; until then the destination holds NaN.
#pragma once
#include "common/ptx/base.cuh"

DEVICE void cp_async_16(u32 dst, const void* src, i32 valid_bytes, SITE) {
  flash_sim::cp_async(dst, src, 16, valid_bytes, site);
}

DEVICE void cp_async_16_with_policy(u32 dst, const void* src, i32 valid_bytes, u64 policy, SITE) {
  flash_sim::cp_async(dst, src, 16, valid_bytes, site);
}

DEVICE u64 evict_first_policy() { return 0; }

DEVICE void cp_async_8(u32 dst, const void* src, i32 valid_bytes, SITE) {
  flash_sim::cp_async(dst, src, 8, valid_bytes, site);
}

DEVICE void cp_async_4(u32 dst, const void* src, i32 valid_bytes, SITE) {
  flash_sim::cp_async(dst, src, 4, valid_bytes, site);
}

DEVICE void cp_async_commit_group() { flash_sim::cp_async_commit_group(); }

template <int kPending>
DEVICE void cp_async_wait_group() {
  flash_sim::cp_async_wait_group(kPending);
}
