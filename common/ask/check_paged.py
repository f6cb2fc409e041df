"""Checks of paged and left-padded keys for `checks.py`: the page table, and lengths on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .check_tensors import require_device, require_tensor

if TYPE_CHECKING:
    from .call import Tensors
    from .problem import Problem

MAX_TABLE_ELEMENTS = 2**31
"""The kernels index the table with 32 bits."""


def check_pages(name: str, tensor: Tensor, cu_seqlens_k: Tensor | None) -> None:
    """The shape of k or v where there is a page table."""
    if tensor.ndim != 4 or cu_seqlens_k is None:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}: expected (num_pages, page_size, num_heads, "
            "head_dim) and cu_seqlens_k because block_table is given"
        )


def check_page_table(table: Any, k: Tensor, batch: int, name: str = "block_table") -> int:
    """Rows that the pages of one sequence have together. k: (num_pages, page_size, ...)."""
    require_tensor(name, table, "an int32 torch.Tensor")
    if table.dtype != torch.int32:
        raise TypeError(
            f"{name} has dtype {table.dtype}: expected torch.int32, use .to(torch.int32)"
        )
    if table.ndim != 2 or table.shape[0] != batch:
        raise ValueError(
            f"{name} has shape {tuple(table.shape)}: expected (batch, max_pages), batch being "
            f"{batch}"
        )
    require_device(name, table, k.device, "k")
    if table.shape[1] > 1 and table.stride(1) != 1:
        raise ValueError(
            f"{name} has stride {table.stride()}: the last must be 1, use .contiguous()"
        )
    if batch * table.stride(0) >= MAX_TABLE_ELEMENTS:
        raise ValueError(
            f"{name} has {batch} rows with a stride of {table.stride(0)}: it must span less than "
            f"{MAX_TABLE_ELEMENTS} elements"
        )
    page_size = k.shape[1]
    if page_size < 1:
        raise ValueError(f"k has shape {tuple(k.shape)}: the page size, its second, must be >= 1")
    return table.shape[1] * page_size if k.shape[0] else 0


def check_paged_values(call: Tensors, problem: Problem) -> None:
    """Read lengths and table, which must be in CPU memory; reject what points outside."""
    used = [problem.seqlen_k] * problem.batch
    if call.cu_seqlens_k is not None:
        ends = call.cu_seqlens_k.tolist()
        used = [end - start for start, end in zip(ends, ends[1:], strict=False)]
    if max(used) > problem.seqlen_k and problem.page_size:
        raise ValueError(
            f"cu_seqlens_k: a sequence has {max(used)} keys but block_table has room for "
            f"{problem.seqlen_k}, {problem.seqlen_k // problem.page_size} pages of "
            f"{problem.page_size}: widen it"
        )
    if call.seqused_k is not None:
        used = [min(limit, n) for limit, n in zip(used, call.seqused_k.tolist(), strict=True)]
    first = [0] * problem.batch
    if call.leftpad_k is not None:
        first = call.leftpad_k.tolist()
        if any(not 0 <= begin <= end for begin, end in zip(first, used, strict=True)):
            raise ValueError(
                "leftpad_k: each must lie between 0 and the length of its sequence; got "
                f"{min(first)} to {max(first)} for lengths {min(used)} to {max(used)}, by "
                "cu_seqlens_k and seqused_k"
            )
    if call.page_table is None:
        return
    for b, (begin, end) in enumerate(zip(first, used, strict=True)):
        pages = call.page_table[b, begin // problem.page_size : -(-end // problem.page_size)]
        if begin < end and not 0 <= int(pages.min()) <= int(pages.max()) < problem.cache_slots:
            raise ValueError(
                f"block_table: row {b} uses pages {int(pages.min())} to {int(pages.max())} but k "
                f"has {problem.cache_slots} pages"
            )
