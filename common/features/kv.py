"""Keys and values in a cache: pages, slots by index, left padding, a second query; and what is
written to the cache before the attention, with rotary embedding. Device code:
flash2/device/kv_source.cuh, flash2/append.cu."""

from __future__ import annotations

from ..ask.kv_problem import CacheProblem
from ..ask.problem import Problem
from .direction import Direction

FIELDS: tuple[str, ...] = (
    "page_size", "cache_batch_idx", "leftpad_k", "cache_slots", "qv", "qv_strides",
)  # fmt: skip


def asked(problem: Problem) -> dict[str, bool]:
    return {
        "pages": problem.page_size > 0,
        "cache_batch_idx": problem.cache_batch_idx,
        "leftpad_k": problem.leftpad_k,
        "qv": problem.qv,
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


def asked_of_cache(problem: CacheProblem) -> dict[str, bool]:
    """What a call over a cache asks besides its attention. A number of splits is any backend's."""
    return {"append": problem.appends, "rotary": problem.rotary}


def append_constants(problem: CacheProblem) -> dict[str, bool | int]:
    """Of flash2/append.cu."""
    return {
        "rotary": problem.rotary,
        "rotary_interleaved": problem.rotary and problem.rotary_interleaved,
    }


def append_values(problem: CacheProblem) -> dict[str, int | float]:
    """Of flash2/append.cu, besides `values`."""
    return {
        "seqlen_new": problem.seqlen_new,
        "rotary_dim": problem.rotary_dim,
        "rotary_rows": problem.rotary_rows,
        "rotary_per_row": problem.rotary_per_row,
        "cached_keys": problem.forward.seqlen_k,
    }
