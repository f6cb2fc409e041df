"""A feature that is being added, by the name in `Options.extra`: until its own block exists, every
backend refuses it. Tests send one through all layers."""

from __future__ import annotations

from ..ask.problem import Problem
from .direction import Direction

FIELDS: tuple[str, ...] = ("extra",)


def asked(problem: Problem) -> dict[str, bool]:
    return {problem.extra: True} if problem.extra else {}


def constants(problem: Problem, direction: Direction) -> dict[str, bool | int]:
    return {}


def values(problem: Problem) -> dict[str, int | float]:
    return {}
