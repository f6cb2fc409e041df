"""The one rule that decides whether a kernel's row strides need 64 bits.

Asked by every planner of kernels that copy rows with `flash2/device/tile_copy.cuh`. Device code
keeps all other strides in 64 bits anyway; `flash2/device/row_stride.cuh` says how a test checks it.
"""

from __future__ import annotations

ELEM_BYTES = 2
# RowStride::kMaxStep in row_stride.cuh, whose static_assert refuses a kernel that goes further: the
# largest number of rows whose bytes a kernel computes in the width of the stride.
MAX_STEP = 256


def wide_row_strides(*strides: int) -> bool:
    """Whether 32 bits are too few for MAX_STEP rows of any of the strides, in 16-bit elements."""
    return max(strides) * MAX_STEP * ELEM_BYTES >= 2**31
