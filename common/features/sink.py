"""Attention sinks: one more logit in the denominator of a head's rows, with no value. Device code:
common/device/sink.cuh. A backward needs no code of its own: softmax_lse contains the sink.
"""

from __future__ import annotations

from ..ask.problem import Problem
from .direction import Direction

FIELDS: tuple[str, ...] = ("sink",)


def asked(problem: Problem) -> dict[str, bool]:
    return {"sink": problem.sink}


def constants(problem: Problem, direction: Direction) -> dict[str, bool | int]:
    return {"sink": problem.sink and direction != "backward"}


def values(problem: Problem) -> dict[str, int | float]:
    return {}
