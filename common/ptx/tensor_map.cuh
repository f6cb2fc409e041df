// The tensor map of a TMA transfer as a kernel sees it: opaque, encoded by
// common/launch/tensor_map.py. A field of a parameter block, whose address the instructions of
// tma.cuh take.
#pragma once
#include "common/ptx/base.cuh"

struct alignas(64) TensorMap {
  u64 opaque[16];
};

// Fetches the map into the descriptor cache, so that the first transfer need not wait for it.
// PTX: prefetch.tensormap (sm_90+).
DEVICE void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
