// TMA: boxes of a tensor between global and shared memory, moved by one thread's request.
// Called by the kernels of hopper/.
//   map: in a parameter block (GRID_CONSTANT), encoded by common/launch/tensor_map.py: address,
//   dims,
//        strides, box, swizzle.
//   dst, src: shared address of the box, 128-byte aligned; aligned to 8 rows of the swizzle (1024,
//        512 or 256 bytes) for the pattern to start with the box.
//   c0..: first element of the box in each dim, innermost first, c0 a multiple of 16 bytes; may lie
//         outside of the tensor, but not below 0 for a store (an illegal instruction).
// A load fills what lies outside with zeros, a store leaves it out: whole rows, and of a row what
// follows its last 16-byte unit.
#pragma once
#include "common/ptx/base.cuh"
#include "common/ptx/tensor_map.cuh"

// Loads a box; its bytes count towards the mbarrier's phase once they have landed. Until that phase
// is complete no thread may touch dst.
// PTX: cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes (sm_90+).
DEVICE void tma_load_4d(u32 dst, const TensorMap* map, u32 bar, i32 c0, i32 c1, i32 c2, i32 c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(dst),
      "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// As tma_load_4d.
// PTX: cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes (sm_90+).
DEVICE void tma_load_5d(u32 dst, const TensorMap* map, u32 bar, i32 c0, i32 c1, i32 c2, i32 c3,
                        i32 c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(dst),
      "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// Stores a box. Reads src until the group it joins has been waited for by this thread. What
// threads wrote to src needs fence_proxy_async_shared() by each writer and a barrier before this.
// PTX: cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group (sm_90+).
DEVICE void tma_store_4d(const TensorMap* map, u32 src, i32 c0, i32 c1, i32 c2, i32 c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group "
      "[%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
      "r"(src), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// As tma_store_4d. PTX: cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group (sm_90+).
DEVICE void tma_store_5d(const TensorMap* map, u32 src, i32 c0, i32 c1, i32 c2, i32 c3, i32 c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group "
      "[%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
      "r"(src), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// Closes this thread's current group of stores, which may be empty.
// PTX: cp.async.bulk.commit_group (sm_90+).
DEVICE void tma_store_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all but the kPending latest committed groups of this thread have read their sources,
// which may then be overwritten. PTX: cp.async.bulk.wait_group.read (sm_90+).
template <int kPending>
DEVICE void tma_store_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Waits until all but the kPending latest committed groups of this thread are complete.
// PTX: cp.async.bulk.wait_group (sm_90+).
template <int kPending>
DEVICE void tma_store_wait_group() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// Orders this thread's ordinary accesses to shared memory before later ones by TMA and wgmma: "the
// async proxy". PTX: fence.proxy.async.shared::cta (sm_90+).
DEVICE void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same for global memory. PTX: fence.proxy.async.global (sm_90+).
DEVICE void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
