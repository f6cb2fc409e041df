// Bulk copies without a tensor map: a run of bytes between global and shared memory, moved by one
// thread's request. For rows of statistics, and for sums that many CTAs add to in global memory.
//   dst, src: both 16-byte aligned.  bytes: a multiple of 16, not 0.
#pragma once
#include "common/ptx/base.cuh"

// Loads `bytes` bytes of global memory; they count towards the mbarrier's phase once they have
// landed, as a box of tma_load_4d does. Until that phase is complete no thread may touch dst.
//   dst: shared address.  src: must lie in a tensor with all its bytes.
// PTX: cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes (sm_90+).
DEVICE void bulk_load(u32 dst, const void* src, u32 bytes, u32 bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(dst),
      "l"(src), "r"(bytes), "r"(bar)
      : "memory");
}

// Adds bytes / 4 floats of shared memory to those at dst, each atomically; the order of additions
// is open. Joins this thread's current group of stores, as tma_store_4d does, and is waited for in
// the same way: src is read until tma_store_wait_group_read() returns, the sums are in global
// memory once tma_store_wait_group() does. What threads wrote to src needs
// fence_proxy_async_shared() by each writer and a barrier before this.
//   dst: global.  src: shared address.
// PTX: cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 (sm_90+).
DEVICE void bulk_reduce_add_f32(f32* dst, u32 src, u32 bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(dst),
      "r"(src), "r"(bytes)
      : "memory");
}
