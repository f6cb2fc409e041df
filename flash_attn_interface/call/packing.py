"""q, k and v as views of one tensor, and their gradients as views of its gradient.

A packed call has (q, kv, None) or (qkv, None, None) in the place of (q, k, v). Called by
`autograd.py` and `gradients.py`; which function takes which packing: `fa2.py`, `fa3.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._common.ask.call import Call, Tensors


class Packing(NamedTuple):
    """How a tensor holds several."""

    axis: int
    heads: tuple[int, ...] = ()  # sizes along the axis; empty: one index of the axis for each


def unpack(
    q: Tensor, k: Tensor | None, v: Tensor | None, packing: Packing | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q, k and v."""
    if k is None:
        q, k, v = _parts(q, packing)
    elif v is None:
        k, v = _parts(k, packing)
    return q, k, v


def unpacked(call: Call) -> Call:
    """The call on such views."""
    tensors, sequences, cache, options = call
    if options.packing is None:
        return call
    parts = unpack(*tensors[:3], options.packing)
    return Call(Tensors(*parts, *tensors[3:]), sequences, cache, options)


def _parts(packed: Tensor, packing: Packing | None) -> tuple[Tensor, ...]:
    assert packing is not None
    if packing.heads:
        return torch.split(packed, list(packing.heads), packing.axis)
    return packed.unbind(packing.axis)
