"""Tensor maps: what TMA needs to know of a tensor to move boxes of it. 128 opaque bytes each.

Planners of hopper/ encode one per tensor and box, and store it in a ``TensorMap`` field of the
parameter block::

    block.set("q_map", encode("device", "bf16", address, dims, strides_bytes, box, 128))

"simulated" maps serve the twins in sim/ptx/tma.cuh; both kinds take and refuse the same arguments.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Sequence
from typing import Any, Literal

from ..params import TENSOR_MAP_BYTES
from . import driver

Kind = Literal["device", "simulated"]

ELEMENT_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
_CUDA_TYPES = {"fp16": "FLOAT16", "bf16": "BFLOAT16", "fp32": "FLOAT32"}


def encode(
    kind: Kind,
    dtype: str,
    address: int,
    dims: Sequence[int],
    strides_bytes: Sequence[int],
    box: Sequence[int],
    swizzle_bytes: int,
) -> bytes:
    """The map of a tensor of 1 to 5 dims, innermost (contiguous) first. ValueError names the fault.

    strides_bytes: of dims 1 and up, multiples of 16. box: elements moved at once in each dim.
    swizzle_bytes: 32, 64 or 128, which is then also the innermost extent of the box; 0 for none.
    """
    check_encodable(dtype, address, dims, strides_bytes, box, swizzle_bytes)
    if kind == "simulated":
        from ..sim import tensor_map as simulated

        return simulated.encode(
            ELEMENT_BYTES[dtype], address, dims, strides_bytes, box, swizzle_bytes
        )
    return _encode_for_device(dtype, address, dims, strides_bytes, box, swizzle_bytes)


@functools.cache
def address_comes_first(kind: Kind) -> bool:
    """Whether maps that differ in the address alone differ in their first 8 bytes, which are it.

    The layout is undocumented, so this asks the driver. For ``ParamBlock.tensor_map_slot``.
    """
    addresses = (0x7F1234567890, 0x12345670)
    maps = [encode(kind, "bf16", a, (64, 96, 4), (512, 128), (64, 32, 1), 128) for a in addresses]
    return len({m[8:] for m in maps}) == 1 and all(
        int.from_bytes(m[:8], "little") == a for m, a in zip(maps, addresses, strict=True)
    )


def check_encodable(
    dtype: str,
    address: int,
    dims: Sequence[int],
    strides_bytes: Sequence[int],
    box: Sequence[int],
    swizzle_bytes: int,
) -> None:
    """ValueError if the driver would refuse the map, or the kernels' layouts do not cover it."""
    element = ELEMENT_BYTES.get(dtype)
    if element is None:
        raise ValueError(f"tensor map of {dtype!r}; known are {', '.join(ELEMENT_BYTES)}")
    rank = len(dims)
    if not 1 <= rank <= 5 or len(box) != rank or len(strides_bytes) != rank - 1:
        raise ValueError(
            f"tensor map of dims {tuple(dims)}, strides {tuple(strides_bytes)}, box {tuple(box)}: "
            f"1 to 5 dims, a stride for each but the first, a box extent for each"
        )
    if address % 16 or not 0 < address < 2**64:
        raise ValueError(f"tensor map at {address:#x}: TMA needs 16-byte alignment")
    if not all(1 <= d < 2**32 for d in dims):
        raise ValueError(f"tensor map of dims {tuple(dims)}: each must be 1 to 2**32 - 1")
    if not all(s % 16 == 0 and 0 <= s < 2**40 for s in strides_bytes):
        raise ValueError(
            f"tensor map with strides of {tuple(strides_bytes)} bytes: TMA needs multiples of 16 "
            f"below 2**40"
        )
    if not all(1 <= extent <= 256 for extent in box) or box[0] * element % 16:
        raise ValueError(
            f"tensor map with box {tuple(box)}: extents are 1 to 256, the first fills 16-byte units"
        )
    if swizzle_bytes not in (0, 32, 64, 128):
        raise ValueError(f"swizzle of {swizzle_bytes} bytes; possible are 0 (none), 32, 64, 128")
    if swizzle_bytes and box[0] * element != swizzle_bytes:
        raise ValueError(
            f"box {tuple(box)} of {dtype} has rows of {box[0] * element} bytes, not the "
            f"{swizzle_bytes} of its swizzle"
        )


@functools.cache
def _driver() -> Any:
    return importlib.import_module("cuda.bindings.driver")


def _encode_for_device(
    dtype: str,
    address: int,
    dims: Sequence[int],
    strides_bytes: Sequence[int],
    box: Sequence[int],
    swizzle_bytes: int,
) -> bytes:
    cuda = _driver()
    swizzle = f"CU_TENSOR_MAP_SWIZZLE_{f'{swizzle_bytes}B' if swizzle_bytes else 'NONE'}"
    arguments = (
        getattr(cuda.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{_CUDA_TYPES[dtype]}"),
        len(dims),
        address,
        [cuda.cuuint64_t(d) for d in dims],
        [cuda.cuuint64_t(s) for s in strides_bytes],
        [cuda.cuuint32_t(extent) for extent in box],
        [cuda.cuuint32_t(1)] * len(dims),
        cuda.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(cuda.CUtensorMapSwizzle, swizzle),
        cuda.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        cuda.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    status, encoded = cuda.cuTensorMapEncodeTiled(*arguments)
    if int(status) == driver.INVALID_CONTEXT:
        driver.make_context_current(cuda)
        status, encoded = cuda.cuTensorMapEncodeTiled(*arguments)
    if int(status) != 0:
        raise RuntimeError(
            f"cuTensorMapEncodeTiled failed: {getattr(status, 'name', status)}, for {dtype} at "
            f"{address:#x}, dims {tuple(dims)}, strides {tuple(strides_bytes)} bytes, box "
            f"{tuple(box)}, swizzle {swizzle_bytes}"
        )
    return ctypes.string_at(int(encoded.getPtr()), TENSOR_MAP_BYTES)
