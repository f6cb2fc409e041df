// Twin of common/ptx/tma.cuh for the simulator.
#pragma once
#include "common/ptx/base.cuh"
#include "common/ptx/tensor_map.cuh"

DEVICE void tma_load_4d(u32 dst, const TensorMap* map, u32 bar, i32 c0, i32 c1, i32 c2, i32 c3,
                        SITE) {
  const i32 coords[] = {c0, c1, c2, c3};
  flash_sim::tma_load(dst, map, bar, coords, 4, site);
}

DEVICE void tma_load_5d(u32 dst, const TensorMap* map, u32 bar, i32 c0, i32 c1, i32 c2, i32 c3,
                        i32 c4, SITE) {
  const i32 coords[] = {c0, c1, c2, c3, c4};
  flash_sim::tma_load(dst, map, bar, coords, 5, site);
}

DEVICE void tma_store_4d(const TensorMap* map, u32 src, i32 c0, i32 c1, i32 c2, i32 c3, SITE) {
  const i32 coords[] = {c0, c1, c2, c3};
  flash_sim::tma_store(map, src, coords, 4, site);
}

DEVICE void tma_store_5d(const TensorMap* map, u32 src, i32 c0, i32 c1, i32 c2, i32 c3, i32 c4,
                         SITE) {
  const i32 coords[] = {c0, c1, c2, c3, c4};
  flash_sim::tma_store(map, src, coords, 5, site);
}

DEVICE void tma_store_commit_group() { flash_sim::tma_store_commit_group(); }

template <int kPending>
DEVICE void tma_store_wait_group_read() {
  flash_sim::tma_store_wait_group_read(kPending);
}

template <int kPending>
DEVICE void tma_store_wait_group() {
  flash_sim::tma_store_wait_group(kPending);
}

DEVICE void fence_proxy_async_shared() { flash_sim::fence_proxy_async_shared(); }

DEVICE void fence_proxy_async_global() {}
