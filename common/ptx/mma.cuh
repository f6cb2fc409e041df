// Warp-level tensor core products, d += a * b with fp32 accumulation.
// Called by flash2/device/gemm.cuh. Elements of lane l, with row = l / 4 and col = 2 * (l % 4):
//   a, 16 x 16: a[0] at (row, col), a[1] (row + 8, col), a[2] (row, col + 8),
//               a[3] (row + 8, col + 8); each holds that element and its right neighbour
//   b, 16 x 8:  b0 at (col, row), b1 (col + 8, row); each holds that element and the one below
//   d, 16 x 8:  d[0], d[1] at (row, col), (row, col + 1); d[2], d[3] the same in row + 8
// The lower 16 bits of a register hold the element with the smaller index.
#pragma once
#include "common/ptx/base.cuh"

// Multiplies fp16 fragments. PTX: mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 (sm_80+).
// All 32 lanes take part.
DEVICE void mma_m16n8k16_f16(f32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  // clang-format off
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  // clang-format on
}

// Multiplies bf16 fragments. PTX: mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 (sm_80+).
// All 32 lanes take part.
DEVICE void mma_m16n8k16_bf16(f32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  // clang-format off
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  // clang-format on
}
