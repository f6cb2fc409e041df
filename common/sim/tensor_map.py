"""The simulator's tensor maps, read by ``struct EncodedTensorMap`` of runtime/tma.cpp.

Called by ``common/launch/tensor_map.py``, which has checked the arguments.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from ..params import TENSOR_MAP_BYTES

_MAGIC = 0x70616D54  # a map that the driver encoded, or none, is recognised as foreign
# Address first, as in the driver's; magic, swizzle, rank, bytes of an element; strides of dims 1
# and up in bytes; dims; box.
_FORMAT = "<QIHBB4Q5I5H"


def encode(
    element_bytes: int,
    address: int,
    dims: Sequence[int],
    strides_bytes: Sequence[int],
    box: Sequence[int],
    swizzle_bytes: int,
) -> bytes:
    rank = len(dims)
    missing = 5 - rank
    return struct.pack(
        _FORMAT,
        address,
        _MAGIC,
        swizzle_bytes,
        rank,
        element_bytes,
        *strides_bytes, *[0] * missing,
        *dims, *[1] * missing,
        *box, *[1] * missing,
    ).ljust(TENSOR_MAP_BYTES, b"\0")  # fmt: skip
