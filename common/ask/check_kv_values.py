"""Lengths, indices and page tables that point outside the cache, found by reading them.

Called by `flash_attn_interface/call/dispatch.py` for tensors in CPU memory, for the PyTorch
reference, and for any when FLASH_ATTN_INTERFACE_CHECK_CACHE is on, which then waits for the GPU.
"""

from __future__ import annotations

from torch import Tensor

from .call import Call
from .checks import shorten
from .problem import Problem


def check_cache_values(call: Call, problem: Problem) -> None:
    """ValueError for the first that is out of range; without it, kernels clamp."""
    tensors, cache, append = call.tensors, call.cache, problem.append
    assert cache is not None and append is not None
    batch, capacity = problem.batch, problem.seqlen_k
    _check_offsets("q", tensors.cu_seqlens_q, problem.total_q, problem.seqlen_q, "max_seqlen_q")
    new = [append.seqlen_new] * batch
    if cache.cu_seqlens_k_new is not None:
        total_new = 0 if cache.k is None else cache.k.shape[0]
        new = _check_offsets(
            "k_new", cache.cu_seqlens_k_new, total_new, capacity, "the capacity of k_cache"
        )
    used = [capacity] * batch
    if cache.seqlens is not None:
        given = cache.seqlens
        lengths = given.tolist() if isinstance(given, Tensor) else [given] * batch
        used = [length + more for length, more in zip(lengths, new, strict=True)]
        if min(lengths) < 0 or max(used) > capacity:
            raise ValueError(
                f"cache_seqlens is {shorten(lengths)}: expected 0 to {capacity}, the capacity of "
                f"k_cache by its shape or page_table (block_table), with {shorten(new)} new rows "
                "(k)"
            )
    first = [0] * batch
    if tensors.leftpad_k is not None:
        first = tensors.leftpad_k.tolist()
        if any(not 0 <= begin <= end for begin, end in zip(first, used, strict=True)):
            raise ValueError(
                f"cache_leftpad is {shorten(first)}: expected 0 to the valid keys, {shorten(used)}"
            )
    if cache.rotary_seqlens is not None and append.has_rotary_seqlens:
        positions = cache.rotary_seqlens.tolist()
        if min(positions) < 0:
            raise ValueError(f"rotary_seqlens is {shorten(positions)}: expected positions >= 0")
    table = tensors.page_table
    rows = list(range(batch))
    if tensors.cache_batch_idx is not None:
        rows = tensors.cache_batch_idx.tolist()
        count = problem.cache_slots if table is None else table.shape[0]
        if min(rows) < 0 or max(rows) >= count:
            of = "k_cache" if table is None else "page_table (block_table)"
            raise ValueError(
                f"cache_batch_idx is {shorten(rows)}: expected 0 to {count - 1}, rows of {of}"
            )
    if table is not None:
        _check_pages(table.tolist(), rows, first, used, problem)


def _check_offsets(
    side: str, cu_seqlens: Tensor | None, total: int, longest: int, why: str
) -> list[int]:
    """The lengths that they delimit. why: what bounds the longest."""
    if cu_seqlens is None:
        return []
    ends = cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(ends, ends[1:], strict=False)]
    if ends[0] != 0 or min(lengths) < 0 or ends[-1] > total:
        raise ValueError(
            f"cu_seqlens_{side} is {shorten(ends)}: must start at 0, never decrease and end at "
            f"most at the {total} rows of {side.removesuffix('_new')}"
        )
    if max(lengths) > longest:
        raise ValueError(
            f"cu_seqlens_{side} is {shorten(ends)}: its longest sequence has {max(lengths)} rows, "
            f"at most {longest} are allowed here, by {why}"
        )
    return lengths


def _check_pages(
    table: list[list[int]],
    rows: list[int],
    first: list[int],
    used: list[int],
    problem: Problem,
) -> None:
    """Of the pages that hold valid keys; entries beyond them may be anything."""
    page_size, num_pages = problem.page_size, problem.cache_slots
    for row, begin, end in zip(rows, first, used, strict=True):
        if begin >= end:
            continue
        pages = table[row][begin // page_size : -(-end // page_size)]
        if min(pages) < 0 or max(pages) >= num_pages:
            raise ValueError(
                f"page_table (block_table) has {shorten(pages)} for the valid keys of its row "
                f"{row}: expected 0 to {num_pages - 1}, the pages of k_cache"
            )
