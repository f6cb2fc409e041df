// Twin of common/ptx/base.cuh for the simulator. Includes its twins' link to the runtime; the types
// are defined there.
#pragma once
#include "common/sim/runtime/calls.h"

#define DEVICE inline
#define KERNEL(threads, min_ctas) extern "C" void
// The launcher compares flash_sim_cluster_size with the KernelSpec.
#define CLUSTER_KERNEL(threads, min_ctas, ctas)                                   \
  extern "C" {                                                                    \
  __attribute__((visibility("default"))) extern const i32 flash_sim_cluster_size; \
  const i32 flash_sim_cluster_size = ctas;                                        \
  }                                                                               \
  extern "C" void
#define GRID_CONSTANT const

extern "C" {  // without <math.h>: compile time
f32 fmaxf(f32, f32) noexcept;
f32 fminf(f32, f32) noexcept;
f32 fabsf(f32) noexcept;
}

DEVICE i32 thread_idx() { return flash_sim::thread_idx(); }

DEVICE i32 block_idx() { return flash_sim::block_idx(); }

DEVICE i32 grid_dim() { return flash_sim::grid_dim(); }

DEVICE u32 smem_base() { return flash_sim::kSmemBase; }

DEVICE u32 f32_as_bits(f32 value) { return __builtin_bit_cast(u32, value); }

DEVICE f32 bits_as_f32(u32 bits) { return __builtin_bit_cast(f32, bits); }
