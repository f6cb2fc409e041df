"""Sequences of different lengths: packed end to end, or partly used. Device code:
common/device/seqlen.cuh."""

from __future__ import annotations

from ..ask.problem import Problem
from .direction import Direction

FIELDS: tuple[str, ...] = (
    "batch", "seqlen_q", "seqlen_k", "total_q", "total_k", "varlen_q", "varlen_k", "has_seqused_q",
    "has_seqused_k",
)  # fmt: skip


def asked(problem: Problem) -> dict[str, bool]:
    return {
        "varlen": problem.varlen,
        "seqused": problem.has_seqused_q or problem.has_seqused_k,
    }


def constants(problem: Problem, direction: Direction) -> dict[str, bool | int]:
    """A decode kernel finds keys by their slot in the cache, never by cu_seqlens_k."""
    return {
        "varlen_q": problem.varlen_q,
        "varlen_k": problem.varlen_k and direction != "decode",
    }


def values(problem: Problem) -> dict[str, int | float]:
    return {
        "batch": problem.batch,
        "seqlen_q": problem.seqlen_q,
        "seqlen_k": problem.seqlen_k,
        "total_q": problem.total_q,
    }
