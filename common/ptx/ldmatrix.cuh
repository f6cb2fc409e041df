// Loads of 8 x 8 matrices of 16-bit elements from shared memory into mma fragments.
// Called by flash2/device/gemm.cuh. All 32 lanes take part.
//   addr: shared address of one row (8 elements), 16-byte aligned. Lane i names row i % 8 of matrix
//         i / 8; the x2 forms use lanes 0..15 and ignore the addresses of the others.
// Register i of lane l receives the pair at (row l / 4, columns 2 * (l % 4) and + 1) of matrix i.
// The _trans forms transpose each matrix first: rows 2 * (l % 4) and + 1 of column l / 4.
// Ordered after another lane's stores only by a barrier or warp_sync().
#pragma once
#include "common/ptx/base.cuh"

// Loads four matrices. PTX: ldmatrix.sync.aligned.m8n8.x4.shared.b16 (sm_75+).
DEVICE void ldmatrix_x4(u32& r0, u32& r1, u32& r2, u32& r3, u32 addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
               : "r"(addr));
}

// Loads four transposed matrices. PTX: ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 (sm_75+).
DEVICE void ldmatrix_x4_trans(u32& r0, u32& r1, u32& r2, u32& r3, u32 addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
               : "r"(addr));
}

// Loads two matrices. PTX: ldmatrix.sync.aligned.m8n8.x2.shared.b16 (sm_75+).
DEVICE void ldmatrix_x2(u32& r0, u32& r1, u32 addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r0), "=r"(r1)
               : "r"(addr));
}

// Loads two transposed matrices. PTX: ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 (sm_75+).
DEVICE void ldmatrix_x2_trans(u32& r0, u32& r1, u32 addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r0), "=r"(r1)
               : "r"(addr));
}
