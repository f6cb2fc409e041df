// Twin of common/ptx/bulk.cuh for the simulator.
#pragma once
#include "common/ptx/base.cuh"
#include "common/sim/runtime/calls_hopper.h"

DEVICE void bulk_load(u32 dst, const void* src, u32 bytes, u32 bar, SITE) {
  flash_sim::bulk_load(dst, src, bytes, bar, site);
}

DEVICE void bulk_reduce_add_f32(f32* dst, u32 src, u32 bytes, SITE) {
  flash_sim::bulk_reduce_add_f32(dst, src, bytes, site);
}
