"""Which keys a query sees. Device code: common/device/mask.cuh."""

from __future__ import annotations

from ..ask.problem import Problem
from .direction import Direction

FIELDS: tuple[str, ...] = ("causal", "window_left", "window_right", "attention_chunk")

# The kernels' 32-bit index arithmetic holds sequence length + window; see MAX_SEQLEN in the trees'
# backend.py.
MAX_WINDOW = 2**29


def asked(problem: Problem) -> dict[str, bool]:
    return {
        "causal": problem.causal,
        "window": problem.local,
        "attention_chunk": problem.attention_chunk > 0,
    }


def constants(problem: Problem, direction: Direction) -> dict[str, bool | int]:
    return {
        "causal": problem.causal,
        "local": problem.local,
        "chunk": problem.attention_chunk > 0,
    }


def values(problem: Problem) -> dict[str, int | float]:
    return {
        "window_left": min(problem.window_left, MAX_WINDOW),
        "window_right": min(problem.window_right, MAX_WINDOW),
        "attention_chunk": min(problem.attention_chunk, MAX_WINDOW),
    }
