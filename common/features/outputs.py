"""What a forward returns besides out."""

from __future__ import annotations

from ..ask.problem import Problem
from .direction import Direction

FIELDS: tuple[str, ...] = ("return_lse", "return_softmax")


def asked(problem: Problem) -> dict[str, bool]:
    return {"softmax_lse": problem.return_lse, "s_dmask": problem.return_softmax}


def constants(problem: Problem, direction: Direction) -> dict[str, bool | int]:
    """Whether to write softmax_lse, its pointer says."""
    return {"return_softmax": problem.return_softmax and direction == "forward"}


def values(problem: Problem) -> dict[str, int | float]:
    """The places of results are the plans' business."""
    return {}
