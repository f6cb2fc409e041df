"""Random tensors of a Case, in NaN-filled buffers.

A kernel that reads between rows, before the first or past the last element, or a row that is not in
use, gives NaN.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from cases import Case
from torch import Tensor

SEEDS = random.Random()  # conftest seeds it for each test


@dataclass(frozen=True)
class Inputs:
    """Tensors of one case, on its device. Rows that are not in use hold NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    seqused_q: Tensor | None
    seqused_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    alibi_slopes: Tensor | None


def make_inputs(case: Case, device: torch.device | str) -> Inputs:
    """Fresh random tensors for `case`; standard normal, q times `q_factor`."""
    seed = SEEDS.randrange(1 << 62)
    print(f"make_inputs({case.id}): generator seed {seed}")
    generator = torch.Generator(device).manual_seed(seed)

    if case.varlen:
        rows_q, rows_k, batch = sum(case.lengths_q) + case.tail, sum(case.lengths_k) + case.tail, 1
        longest_q, longest_k = max(case.lengths_q), max(case.lengths_k)
    else:
        rows_q, rows_k, batch = case.seqlen_q, case.seqlen_k, case.batch
        longest_q, longest_k = case.seqlen_q, case.seqlen_k
    shapes = {
        "q": (batch, rows_q, case.num_heads_q, case.head_dim_qk),
        "k": (batch, rows_k, case.num_heads_k, case.head_dim_qk),
        "v": (batch, rows_k, case.num_heads_v, case.head_dim_v),
    }
    views = _poisoned_views(case, shapes, device)
    for name, view in views.items():
        values = torch.randn(view.shape, generator=generator, device=device)
        view.copy_(values * case.q_factor if name == "q" else values)
    q, k, v = (view.squeeze(0) if case.varlen else view for view in views.values())
    if case.varlen:
        _poison_unused_rows([q], case.lengths_q, case.seqused_q)
        _poison_unused_rows([k, v], case.lengths_k, case.seqused_k)

    def integers(values: Sequence[int]) -> Tensor | None:
        return torch.tensor(values, dtype=torch.int32, device=device) if values else None

    slopes = None
    if case.alibi:
        shape = (case.num_heads_q,) if case.alibi == "heads" else (case.sequences, case.num_heads_q)
        slopes = torch.rand(shape, generator=generator, device=device) * 0.3
    claim = {"exact": lambda n: n, "small": lambda n: max(1, n // 2), "large": lambda n: 3 * n + 1}
    return Inputs(
        q,
        k,
        v,
        cu_seqlens_q=integers([0, *accumulate(case.lengths_q)] if case.varlen else ()),
        cu_seqlens_k=integers([0, *accumulate(case.lengths_k)] if case.varlen else ()),
        seqused_q=integers(case.seqused_q),
        seqused_k=integers(case.seqused_k),
        max_seqlen_q=claim[case.max_seqlen](longest_q),
        max_seqlen_k=claim[case.max_seqlen](longest_k),
        alibi_slopes=slopes,
    )


_GUARD = 512  # poisoned elements before and after each tensor


def _poisoned_views(
    case: Case, shapes: dict[str, tuple[int, int, int, int]], device: torch.device | str
) -> dict[str, Tensor]:
    """Views (batch, rows, heads, dim) in the memory layout of the case, in NaN-filled buffers."""
    if case.layout == "fused":  # one buffer, each token's q, k and v heads side by side
        (batch, rows, _, _) = shapes["q"]
        widths = [heads * dim for _, _, heads, dim in shapes.values()]
        token = sum(widths)
        buffer = _all_nan(2 * _GUARD + batch * rows * token, case.torch_dtype, device)
        starts = [_GUARD + before for before in (0, widths[0], widths[0] + widths[1])]
        return {
            name: buffer.as_strided(shape, (rows * token, token, shape[3], 1), start)
            for (name, shape), start in zip(shapes.items(), starts, strict=True)
        }
    step = case.align_bytes // 2  # elements; 16-byte layouts still leave gaps of one vector
    views = {}
    for name, (batch, rows, heads, dim) in shapes.items():
        offset = _GUARD
        head_stride, row_stride = dim, heads * dim
        batch_stride = rows * row_stride
        if case.layout == "bhsd":
            row_stride, head_stride = dim, rows * dim
        elif case.layout == "gaps":
            offset += step
            head_stride = -(-dim // step) * step + step
            row_stride = heads * head_stride + step
            row_stride += step * (row_stride // step % 2 == 0)  # aligned to no more than asked
            batch_stride = rows * row_stride + step
        elif case.layout == "offset":
            offset += step
        buffer = _all_nan(batch * batch_stride + offset + _GUARD, case.torch_dtype, device)
        strides = (batch_stride, row_stride, head_stride, 1)
        views[name] = buffer.as_strided((batch, rows, heads, dim), strides, offset)
    return views


def _all_nan(size: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return torch.full((size,), float("nan"), dtype=dtype, device=device)


def _poison_unused_rows(tensors: list[Tensor], lengths: Sequence[int], used: Sequence[int]) -> None:
    start = 0
    for length, count in zip(lengths, used or lengths, strict=True):
        for tensor in tensors:
            tensor[start + count : start + length] = float("nan")
        start += length
    for tensor in tensors:
        tensor[start:] = float("nan")
