// Twin of common/ptx/tensor_map.cuh for the simulator.
#pragma once
#include "common/ptx/base.cuh"
#include "common/sim/runtime/calls_hopper.h"

struct alignas(64) TensorMap {
  u64 opaque[16];
};

DEVICE void prefetch_tensor_map(const TensorMap* map, SITE) {
  flash_sim::prefetch_tensor_map(map, site);
}
