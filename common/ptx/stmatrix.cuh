// Stores of 8 x 8 matrices of 16-bit elements from mma fragments to shared memory: ldmatrix.cuh the
// other way round. All 32 lanes take part.
//   addr: shared address of one row (8 elements), 16-byte aligned. Lane i names row i % 8 of matrix
//         i / 8.
// Register i of lane l holds the pair at (row l / 4, columns 2 * (l % 4) and + 1) of matrix i.
// The _trans form transposes: rows 2 * (l % 4) and + 1 of column l / 4.
// Ordered before another lane's loads only by a barrier or warp_sync().
#pragma once
#include "common/ptx/base.cuh"

// Stores four matrices. PTX: stmatrix.sync.aligned.m8n8.x4.shared.b16 (sm_90+).
DEVICE void stmatrix_x4(u32 addr, u32 r0, u32 r1, u32 r2, u32 r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

// Stores four transposed matrices. PTX: stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 (sm_90+).
DEVICE void stmatrix_x4_trans(u32 addr, u32 r0, u32 r1, u32 r2, u32 r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}
