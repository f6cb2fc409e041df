// Where rows lie, and the rule for offsets that may exceed 31 bits.
//
// Every stride in device code is an i64, hence so is every product with one; parameter blocks hold
// them so. RowStride is the one exception: where the host sees that 32 bits hold kMaxStep rows
// (common/tiles/row_strides.py, the one rule on that side), it saves registers. No other header
// narrows a stride: tests/project/test_repo_rules.py.
#pragma once
#include "common/device/elem.cuh"

template <bool kWide>
struct RowStride {
  // A narrow stride times at most so many rows is below 2^31 bytes.
  static constexpr i32 kMaxStep = 256;

  Select<kWide, i64, i32> bytes;

  // stride: in 16-bit elements.
  DEVICE explicit RowStride(i64 stride)
      : bytes(static_cast<decltype(bytes)>(stride * kElemBytes)) {}

  // Bytes from row 0 to any row.
  DEVICE i64 offset(i32 row) const { return i64(row) * bytes; }

  // Bytes of `steps` steps of kRows rows each. The product of a step is made first, since it is the
  // same in every one.
  template <i32 kRows>
  DEVICE i64 steps(i32 steps) const {
    static_assert(kRows <= kMaxStep);
    return steps * i64(kRows * bytes);
  }
};
