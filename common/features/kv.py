"""Keys and values in a cache: pages, slots by index, left padding, a second query; and what is
written to the cache before the attention, with rotary embedding. Device code:
flash2/device/kv_source.cuh, flash2/append.cu."""

from __future__ import annotations

from ..ask.kv_problem import Append
from ..ask.problem import Problem
from .direction import Direction

FIELDS: tuple[str, ...] = (
    "page_size", "cache_batch_idx", "leftpad_k", "cache_slots", "qv", "qv_strides",
    "append", "num_splits",
)  # fmt: skip


def asked(problem: Problem) -> dict[str, bool]:
    """A number of splits is any backend's."""
    return {
        "pages": problem.page_size > 0,
        "cache_batch_idx": problem.cache_batch_idx,
        "leftpad_k": problem.leftpad_k,
        "qv": problem.qv,
        "append": problem.append is not None and problem.append.appends,
        "rotary": problem.append is not None and problem.append.rotary,
    }


def constants(problem: Problem, direction: Direction) -> dict[str, bool | int]:
    return {
        "paged": problem.page_size > 0,
        "cache_batch_idx": problem.cache_batch_idx,
        "leftpad_k": problem.leftpad_k,
        "qv": problem.qv,
    }


def values(problem: Problem) -> dict[str, int | float]:
    if not problem.cache_slots:
        return {}
    found: dict[str, int | float] = {"last_slot": problem.cache_slots - 1}
    if problem.page_size:
        magic, shift = page_division(problem.page_size)
        found |= {"page_size": problem.page_size, "page_magic": magic, "page_shift": shift}
    return found


def page_division(page_size: int) -> tuple[int, int]:
    """(magic, shift) with 2 * n * magic >> 32 >> shift == n // page_size for 0 <= n < 2**31.

    The kernels look pages up by it; magic fits 32 bits.
    """
    shift = (page_size - 1).bit_length()
    return 2 ** (31 + shift) // page_size + 1, shift


def append_constants(problem: Problem) -> dict[str, bool | int]:
    """Of flash2/append.cu."""
    new = problem.append or Append()
    return {"rotary": new.rotary, "rotary_interleaved": new.rotary and new.rotary_interleaved}


def append_values(problem: Problem) -> dict[str, int | float]:
    """Of flash2/append.cu, besides `values`."""
    new = problem.append or Append()
    return {
        "seqlen_new": new.seqlen_new,
        "rotary_dim": new.rotary_dim,
        "rotary_rows": new.rotary_rows,
        "rotary_per_row": new.rotary_per_row,
        "cached_keys": problem.seqlen_k,
    }
