"""Keys and values of a cache as packed ones, for the reference. Reads lengths to the host."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from .._common.ask.call import Tensors
from .._common.ask.problem import Problem


def gathered(problem: Problem, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """(k, v, cu_seqlens_k) with the visible keys of each sequence end to end.

    Indices are clamped like the kernels'.
    """
    _, k, v, _, cu_seqlens_k, _, seqused_k, _, page_table, cache_batch_idx, leftpad_k, _ = tensors
    rows, lengths = [], []
    starts = None if cu_seqlens_k is None else cu_seqlens_k.tolist()
    for b in range(problem.batch):
        length = problem.seqlen_k if starts is None else starts[b + 1] - starts[b]
        if seqused_k is not None:
            length = min(length, max(0, int(seqused_k[b])))
        first = 0 if leftpad_k is None else min(max(0, int(leftpad_k[b])), length)
        positions = torch.arange(first, length, device=k.device)
        index = b if cache_batch_idx is None else int(cache_batch_idx[b])
        if page_table is not None:
            index = min(max(0, index), page_table.shape[0] - 1)
            pages = page_table[index].long()[positions // problem.page_size]
            pages = pages.clamp(0, problem.cache_slots - 1)
            positions = pages * problem.page_size + positions % problem.page_size
        elif starts is not None:
            positions += starts[b]
        else:
            index = min(max(0, index), k.shape[0] - 1)
            positions += index * k.shape[1]
        rows.append(positions)
        lengths.append(length - first)
    chosen = torch.cat(rows)
    if k.ndim == 4:
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=k.device)
    return k[chosen], v[chosen], ends
