// How the kernels of this folder name rows to TMA.
#pragma once
#include "common/ptx/base.cuh"

// Where a box of rows begins, in the dims of a tensor map beside column and head:
//   (column, row, head, 1, batch), or ragged (column, row, head, end of the sequence, wrap).
// A ragged sequence ends where the second dim does, so that TMA itself fills the rows behind it
// with zeros and writes none; hopper/tensor_maps.py says how the coordinates add up.
struct RowCoords {
  i32 row, dim3, dim4;
};
constexpr i32 kRaggedRows = 1 << 30;

//   row: within the sequence.  first_row, length: of the sequence, if ragged.
template <bool kRagged>
DEVICE RowCoords row_coords(i32 row, i32 first_row, i32 length, i32 batch_idx) {
  if constexpr (kRagged) {
    return {kRaggedRows - length + row, first_row + length, kRaggedRows};
  }
  return {row, 0, batch_idx};
}
