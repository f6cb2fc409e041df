"""The element type of q, k, v and out. Device code: common/device/elem.cuh."""

from __future__ import annotations

from ..ask.problem import Problem
from .direction import Direction

FIELDS: tuple[str, ...] = ("dtype",)


def asked(problem: Problem) -> dict[str, bool]:
    """A type has a name of its own, so that a new one is refused until a backend lists it."""
    return {"fp16": False, "bf16": False, problem.dtype: True}


def constants(problem: Problem, direction: Direction) -> dict[str, bool | int]:
    return element(problem.dtype)


def element(dtype: str) -> dict[str, bool | int]:
    """Of kernels that know no Problem."""
    return {"bf16": dtype == "bf16"}


def values(problem: Problem) -> dict[str, int | float]:
    return {}
