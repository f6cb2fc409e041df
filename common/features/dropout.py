"""Dropout of P. Device code: common/device/dropout.cuh; its twin in Python is
common/launch/philox.py."""

from __future__ import annotations

from math import floor

from ..ask.problem import Problem
from .direction import Direction

FIELDS: tuple[str, ...] = ("dropout_p",)


def asked(problem: Problem) -> dict[str, bool]:
    return {"dropout": problem.dropout}


def constants(problem: Problem, direction: Direction) -> dict[str, bool | int]:
    return {"dropout": problem.dropout}


def values(problem: Problem) -> dict[str, int | float]:
    if not problem.dropout:
        return {}
    keep = keep_probability(problem)
    return {
        "keep_threshold": floor(keep * 255.0),
        "keep_scale": 1.0 / keep,
        "keep_probability": keep,
    }


def keep_probability(problem: Problem) -> float:
    """1 without dropout."""
    return 1.0 - problem.dropout_p
