// The vocabulary of device code: types, function qualifiers, thread coordinates, bit casts.
// Included by every wrapper and by each header in common/device/.
// Twin for the simulator: common/sim/ptx/base.cuh, same names and parameter lists.
// Wrappers in this folder emit one instruction each and decide nothing; `asm` occurs nowhere else.
#pragma once

using i32 = int;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;
using u16 = unsigned short;
using u8 = unsigned char;
using f32 = float;

// Every function that runs on the device, member functions included.
#define DEVICE __device__ __forceinline__
// The one entry of a kernel file: KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) flash2_fwd(...).
#define KERNEL(threads, min_ctas) extern "C" __global__ void __launch_bounds__(threads, min_ctas)
// An entry whose CTAs form clusters: CLUSTER_KERNEL(..., Cfg::kClusterSize), see cluster.cuh
// (sm_90+).
#define CLUSTER_KERNEL(threads, min_ctas, ctas) \
  extern "C" __global__ void __cluster_dims__(ctas, 1, 1) __launch_bounds__(threads, min_ctas)
// Its parameter block stays in constant memory: GRID_CONSTANT FwdParams p.
#define GRID_CONSTANT const __grid_constant__

DEVICE i32 thread_idx() { return static_cast<i32>(threadIdx.x); }

DEVICE i32 block_idx() { return static_cast<i32>(blockIdx.x); }

DEVICE i32 grid_dim() { return static_cast<i32>(gridDim.x); }

// First byte of the CTA's dynamic shared memory as a 32-bit shared address, 1024-byte aligned.
// It isn't 0: the driver keeps the first KiB.
DEVICE u32 smem_base() {
  extern __shared__ __align__(1024) u8 dynamic_smem[];
  return static_cast<u32>(__cvta_generic_to_shared(dynamic_smem));
}

DEVICE u32 f32_as_bits(f32 value) { return __float_as_uint(value); }

DEVICE f32 bits_as_f32(u32 bits) { return __uint_as_float(bits); }
