// Warpgroup-level tensor core products, d = a * b or d += a * b, m64 nN k16 with fp32 accumulation,
// executed asynchronously by the 128 threads of a warpgroup. Called by hopper/.
//   d: this thread's part of the 64 x N accumulator; its length, N / 2, selects N. Element i of
//   lane
//      l in warp w is at row 16 * w + l / 4 + 8 * (i / 2 % 2), column 8 * (i / 4) + 2 * (l % 4) +
//      i % 2.
//   desc_a, desc_b: matrices in shared memory, see common/device/wgmma_desc.cuh. The threads' own
//      stores to them need fence_proxy_async_shared() and a barrier first; TMA's do not.
//   a: A in registers, fragments of rows 16 * w.. as in mma.cuh.
//   kTransB: false: B is stored as N rows of 16 (K-major), true: as 16 rows of N (MN-major).
//   accumulate: false overwrites d.
// Order: wgmma_fence(), products, wgmma_commit_group(), wgmma_wait_group(), wgmma_hold(d). Between
// a product and its wait no thread may touch d, nor write a matrix in shared memory.
// The instructions are written out by common/ptx/wgmma.py, for each N that a constant of the
// KernelSpec called wgmma_<any>_n names.
#pragma once
#include "common/ptx/base.cuh"

template <int kN, bool kBf16, bool kTransB>
struct WgmmaProduct;  // undefined: no wgmma_<any>_n of the KernelSpec names this N
#include "common/ptx/wgmma_shapes.cuh"

// A and B from shared memory, A K-major. PTX: wgmma.mma_async.sync.aligned.m64nNk16 (sm_90a).
template <bool kBf16, bool kTransB, int kNumRegs>
DEVICE void wgmma_ss(f32 (&d)[kNumRegs], u64 desc_a, u64 desc_b, bool accumulate) {
  WgmmaProduct<2 * kNumRegs, kBf16, kTransB>::ss(d, desc_a, desc_b, accumulate);
}

// A from registers. PTX: wgmma.mma_async.sync.aligned.m64nNk16 (sm_90a).
template <bool kBf16, bool kTransB, int kNumRegs>
DEVICE void wgmma_rs(f32 (&d)[kNumRegs], const u32 (&a)[4], u64 desc_b, bool accumulate) {
  WgmmaProduct<2 * kNumRegs, kBf16, kTransB>::rs(d, a, desc_b, accumulate);
}

// Orders earlier accesses to accumulators and A fragments before the products that follow. Before
// the first product, and again once those registers have been touched.
// PTX: wgmma.fence.sync.aligned (sm_90a).
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the warpgroup's current group of products. PTX: wgmma.commit_group.sync.aligned (sm_90a).
DEVICE void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the kPending latest committed groups are unfinished.
// PTX: wgmma.wait_group.sync.aligned (sm_90a).
template <int kPending>
DEVICE void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from reading d before the wait that stands above. No instruction.
template <int kN>
DEVICE void wgmma_hold(f32 (&d)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    asm volatile("" : "+f"(d[i])::"memory");
  }
}

// Keeps the compiler from computing the A fragments a later than here, behind a wait or a branch,
// which would keep alive what they are computed from. No instruction.
template <int kN>
DEVICE void wgmma_pin(u32 (&a)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    asm volatile("" : "+r"(a[i]));
  }
}
