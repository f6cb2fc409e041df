// Parameter block of the sm_90 wrapper tests' kernels. Read by tests/support/hopper_probes.py too.
#pragma once
#include "common/ptx/base.cuh"
#include "common/ptx/tensor_map.cuh"

struct HopperProbeParams {
  TensorMap map_a, map_b, map_c, map_d, map_e;  // what they map is the kernel's business
  const u32* in;
  u32* out;
  i32 which;           // variant, where a kernel has several
  i32 from[5], to[5];  // first elements of boxes, innermost dim first
};
