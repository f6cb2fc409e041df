"""Where the rows of out lie: as torch.empty_like(q) lays them out, whatever head_dim_v is.

A q without gaps whose axes are permuted, say the transpose of a (batch, num_heads_q, seqlen_q,
head_dim_qk) tensor, gives an out that is permuted alike; any other q a contiguous out. Kernels,
reference and the shape functions of the operators share this rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def memory_order(sizes: Sequence[int], strides: Sequence[int], row_size: int) -> tuple[int, ...]:
    """The axes, all but the last, of out from the outermost to the innermost in memory.

    sizes, strides: of q without its last axis, which is contiguous and row_size long.
    """
    natural = tuple(range(len(sizes)))
    if 0 in sizes:
        return natural
    long = [axis for axis in natural if sizes[axis] > 1]
    order = sorted(long, key=lambda axis: -strides[axis])
    step = row_size
    for axis in reversed(order):
        if strides[axis] != step:
            return natural
        step *= sizes[axis]
    if order == long:
        return natural
    return (*(axis for axis in natural if sizes[axis] == 1), *order)


def strides_in(order: Sequence[int], sizes: Sequence[int], row_size: int) -> tuple[int, ...]:
    """Strides of the axes in `order`, the rows being row_size long."""
    steps = accumulate((sizes[axis] for axis in reversed(order)), mul, initial=row_size)
    by_axis = dict(zip(reversed(order), steps, strict=False))
    return tuple(by_axis[axis] for axis in range(len(sizes)))


def new_out(q: Tensor, head_dim_v: int) -> Tensor:
    """Memory for out: (..., num_heads_q, head_dim_v)."""
    sizes = q.shape[:-1]
    if q.is_contiguous() or q.stride(-1) != 1:  # the latter is copied before a kernel reads it
        return q.new_empty((*sizes, head_dim_v))
    order = memory_order(sizes, q.stride()[:-1], q.shape[-1])
    return q.new_empty_strided((*sizes, head_dim_v), (*strides_in(order, sizes, head_dim_v), 1))


def laid_out(out: Tensor, q: Tensor) -> Tensor:
    """`out`, moved to where `new_out` would have put it; differentiable."""
    order = natural = tuple(range(q.ndim - 1))
    if not q.is_contiguous() and q.stride(-1) == 1:
        order = memory_order(q.shape[:-1], q.stride()[:-1], q.shape[-1])
    if order == natural:
        return out.contiguous()
    back = (*(order.index(axis) for axis in natural), q.ndim - 1)
    return out.permute(*order, q.ndim - 1).contiguous().permute(back)
