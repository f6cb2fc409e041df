// Parameter block of the wrapper tests' kernels. Read by tests/support/probes.py too.
#pragma once
#include "common/ptx/base.cuh"

struct ProbeParams {
  const u32* in;  // what it holds is the kernel's business
  u32* out;
  u32* aux;   // nullable
  i32 count;  // work items
  i32 which;  // variant, where a kernel has several
};
