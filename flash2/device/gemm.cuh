// Tile products of one warp with mma.m16n8k16 on operands in shared memory (TileLayout or
// LineTileLayout of tile_copy.cuh).
//
// Fragment of a 16 x 8 product, rD[4]: lane holds rows lane / 4 (elements 0, 1) and lane / 4 + 8
// (elements 2, 3), columns 2 * (lane % 4) and + 1. A warp's tile is rD[kMTiles][kNTiles][4]:
// kMTiles * 16 rows, kNTiles * 8 columns.
#pragma once
#include "common/device/elem.cuh"
#include "common/ptx/ldmatrix.cuh"
#include "common/ptx/shuffle.cuh"

template <i32 kMTiles, i32 kNTiles>
DEVICE void clear(f32 (&rD)[kMTiles][kNTiles][4]) {
#pragma unroll
  for (i32 m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (i32 n = 0; n < kNTiles; ++n) {
      rD[m][n][0] = rD[m][n][1] = rD[m][n][2] = rD[m][n][3] = 0.0f;
    }
  }
}

// Offset of a lane's ldmatrix row for an A operand, 16 x 16 elements stored row by row.
template <class Layout>
DEVICE u32 lane_offset_a(i32 lane_idx) {
  return Layout::offset(lane_idx % 16, lane_idx / 16 * 16);
}
// The same for a B operand stored as rows of n (K in Q K^T): two 8-row n tiles, 16 deep.
template <class Layout>
DEVICE u32 lane_offset_b(i32 lane_idx) {
  return Layout::offset(lane_idx % 8 + lane_idx / 16 * 8, lane_idx / 8 % 2 * 16);
}
// The same for a B operand stored as rows of k (V in P V), read with ldmatrix.trans: 16 deep, two
// 8-column n tiles.
template <class Layout>
DEVICE u32 lane_offset_b_trans(i32 lane_idx) {
  return lane_offset_a<Layout>(lane_idx);
}

// rA = the 16 x 16 operand at row tile m and depth step k of a tile.
template <class Layout>
DEVICE void load_a(u32 (&rA)[4], u32 s_lane, i32 m, i32 k) {
  ldmatrix_x4(rA[0], rA[1], rA[2], rA[3], Layout::moved(s_lane, m * 16, k * 32));
}

// The same of an operand stored transposed, as rows of k; the lane's offset is that of
// lane_offset_b.
template <class Layout>
DEVICE void load_a_trans(u32 (&rA)[4], u32 s_lane, i32 m, i32 k) {
  ldmatrix_x4_trans(rA[0], rA[1], rA[2], rA[3], Layout::moved(s_lane, k * 16, m * 32));
}

// rD += A B^T: A from registers or shared memory through load(rA, m, k), B = rows of n in shared
// memory. each_step(k) runs behind step k of kDepth / 16: a place for copies that should not come
// in one burst.
template <bool kIsBf16, class LayoutB, i32 kDepth, i32 kMTiles, i32 kNTiles, class LoadA,
          class EachStep>
DEVICE void gemm_abt(f32 (&rD)[kMTiles][kNTiles][4], u32 sB_lane, LoadA load, EachStep each_step) {
  static_assert(kNTiles % 2 == 0 && kDepth % 16 == 0);
#pragma unroll
  for (i32 k = 0; k < kDepth / 16; ++k) {
    u32 rA[kMTiles][4];
#pragma unroll
    for (i32 m = 0; m < kMTiles; ++m) {
      load(rA[m], m, k);
    }
#pragma unroll
    for (i32 n = 0; n < kNTiles; n += 2) {
      u32 rB[4];
      ldmatrix_x4(rB[0], rB[1], rB[2], rB[3], LayoutB::moved(sB_lane, n * 8, k * 32));
#pragma unroll
      for (i32 m = 0; m < kMTiles; ++m) {
        mma<kIsBf16>(rD[m][n], rA[m], rB[0], rB[1]);
        mma<kIsBf16>(rD[m][n + 1], rA[m], rB[2], rB[3]);
      }
    }
    each_step(k);
  }
}

// rD += A B: A through load(rA, m, k), B = rows of k in shared memory.
template <bool kIsBf16, class LayoutB, i32 kDepth, i32 kMTiles, i32 kNTiles, class LoadA,
          class EachStep>
DEVICE void gemm_ab(f32 (&rD)[kMTiles][kNTiles][4], u32 sB_lane, LoadA load, EachStep each_step) {
  static_assert(kNTiles % 2 == 0 && kDepth % 16 == 0);
#pragma unroll
  for (i32 k = 0; k < kDepth / 16; ++k) {
    u32 rA[kMTiles][4];
#pragma unroll
    for (i32 m = 0; m < kMTiles; ++m) {
      load(rA[m], m, k);
    }
#pragma unroll
    for (i32 n = 0; n < kNTiles; n += 2) {
      u32 rB[4];
      ldmatrix_x4_trans(rB[0], rB[1], rB[2], rB[3], LayoutB::moved(sB_lane, k * 16, n * 16));
#pragma unroll
      for (i32 m = 0; m < kMTiles; ++m) {
        mma<kIsBf16>(rD[m][n], rA[m], rB[0], rB[1]);
        mma<kIsBf16>(rD[m][n + 1], rA[m], rB[2], rB[3]);
      }
    }
    each_step(k);
  }
}

// rA = depth step k (16 columns) of row tile m of an fp32 accumulator, rounded: an accumulator is
// laid out as the A operand of the next product, so P feeds P V without leaving its lane.
template <bool kIsBf16, i32 kMTiles, i32 kNTiles>
DEVICE void accumulator_as_a(u32 (&rA)[4], const f32 (&rD)[kMTiles][kNTiles][4], i32 m, i32 k) {
  rA[0] = pack2<kIsBf16>(rD[m][2 * k][0], rD[m][2 * k][1]);
  rA[1] = pack2<kIsBf16>(rD[m][2 * k][2], rD[m][2 * k][3]);
  rA[2] = pack2<kIsBf16>(rD[m][2 * k + 1][0], rD[m][2 * k + 1][1]);
  rA[3] = pack2<kIsBf16>(rD[m][2 * k + 1][2], rD[m][2 * k + 1][3]);
}

// words[i] of lane q of a quad becomes words[q] of its lane i. With words[i] = two packed columns
// of tile n + i of an accumulator, lane q has the eight columns of tile n + q of its row: 16 bytes.
DEVICE void transpose_quad(u32 (&words)[4], i32 lane_idx) {
#pragma unroll
  for (i32 bit = 1; bit < 4; bit *= 2) {
    const bool upper = (lane_idx & bit) != 0;
#pragma unroll
    for (i32 i = 0; i < 4; ++i) {
      if ((i & bit) == 0) {  // of each pair of words, one stays and one goes
        const u32 got = shfl_xor_u32(upper ? words[i] : words[i + bit], bit);
        (upper ? words[i] : words[i + bit]) = got;
      }
    }
  }
}
