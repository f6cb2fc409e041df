"""A kernel's constants and parameter values as the union of the feature blocks, and what a backend
refuses as the difference between what is asked and what it serves.

To add a feature, write its block and enter it in BLOCKS. Then every attention kernel of both trees
has its constants and values, and every backend refuses it until its SERVES names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ..ask.backward_problem import BackwardProblem
from ..ask.problem import Problem
from . import dropout, dtype, extra, kv, lengths, mask, outputs, score, sink
from .direction import Direction


class Block(Protocol):
    """One feature, or a few that one header of common/device/ owns."""

    @property
    def FIELDS(self) -> tuple[str, ...]:
        """Fields of Problem that are the block's."""

    def asked(self, problem: Problem) -> dict[str, bool]:
        """Name of each feature -> whether the problem asks for it."""

    def constants(self, problem: Problem, direction: Direction) -> dict[str, bool | int]:
        """Compile-time constants; the same names for every problem and direction."""

    def values(self, problem: Problem) -> dict[str, int | float]:
        """Fields of the block's struct in the kernels' parameters. Those of features that are off
        may be absent: they stay 0. Pointers are patched by each call.
        """


BLOCKS: tuple[Block, ...] = (dtype, lengths, mask, score, dropout, sink, kv, outputs, extra)

# Fields of Problem that are no feature: every kernel has some value of them.
SHAPE_FIELDS = (
    "head_dim_qk", "head_dim_v", "num_heads_q", "num_heads_k", "num_heads_v", "q_strides",
    "k_strides", "v_strides", "vector_bytes",
)  # fmt: skip
HINT_FIELDS = ("sm_margin", "pack_gqa")  # without influence on the result


def constants(problem: Problem, direction: Direction) -> dict[str, bool | int]:
    """What all blocks give to an attention kernel's KernelSpec."""
    found: dict[str, bool | int] = {}
    for block in BLOCKS:
        found |= block.constants(problem, direction)
    return found


def values(problem: Problem) -> dict[str, int | float]:
    """What all blocks give to an attention kernel's parameters."""
    found: dict[str, int | float] = {}
    for block in BLOCKS:
        found |= block.values(problem)
    return found


def asked(problem: Problem | BackwardProblem) -> dict[str, bool]:
    """Name of each feature -> whether the problem asks for it."""
    if isinstance(problem, BackwardProblem):
        return {**asked(problem.forward), "deterministic": problem.deterministic}
    found: dict[str, bool] = {}
    for block in BLOCKS:
        found |= block.asked(problem)
    return found


Serves = Mapping[Direction, frozenset[str]]

_TITLES: dict[Direction, str] = {
    "forward": "forward",
    "backward": "backward",
    "decode": "attention over a cache",
}


def refuses(problem: Problem | BackwardProblem, serves: Serves, direction: Direction) -> str | None:
    """What the problem asks that the backend does not serve; None if there is nothing."""
    served = serves[direction]
    missing = [name for name, is_asked in asked(problem).items() if is_asked and name not in served]
    return f"its {_TITLES[direction]} does not serve {', '.join(missing)}" if missing else None
