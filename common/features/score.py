"""From the product of a query and a key to its score: scale, softcap, ALiBi. Device code:
common/device/score.cuh."""

from __future__ import annotations

from math import e, log2

from ..ask.problem import Problem
from .direction import Direction

FIELDS: tuple[str, ...] = ("softmax_scale", "softcap", "alibi", "alibi_strides")

LOG2E = log2(e)


def asked(problem: Problem) -> dict[str, bool]:
    return {"softcap": problem.softcap > 0.0, "alibi": problem.alibi}


def constants(problem: Problem, direction: Direction) -> dict[str, bool | int]:
    return {
        "softcap": problem.softcap > 0.0,
        "large_softcap": problem.large_softcap,
        "alibi": problem.alibi,
        # A backward recomputes P from softmax_lse, whatever the sign of the scale.
        "prescale": problem.softmax_scale <= 0.0 and direction != "backward",
    }


def values(problem: Problem) -> dict[str, int | float]:
    found: dict[str, int | float] = {
        "softmax_scale_log2": problem.softmax_scale * LOG2E,
        "alibi_batch_stride": problem.alibi_strides[0],
        "alibi_head_stride": problem.alibi_strides[1],
    }
    if problem.softcap > 0.0:
        found["softcap_in"] = problem.softmax_scale / problem.softcap
        found["softcap_out"] = problem.softcap * LOG2E
    return found
