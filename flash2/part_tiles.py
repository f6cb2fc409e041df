"""Problem -> KernelSpecs of fwd.cu and bwd.cu for a head_dim_v that these take in parts. Pure
functions. Called by `fwd_parts.py`, `bwd_parts.py`, and by `prebuild.py`, which has no torch.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from .._common.ask.backward_problem import BackwardProblem
from .._common.ask.problem import Problem
from .._common.runtime.spec import KernelSpec
from . import bwd_order, bwd_tiles
from .fwd_tiles import ELEM_BYTES, LINE_COLUMNS, MAX_HEAD_DIM_V, forward_spec

MAX_PARTS = 2


def parts(head_dim_v: int) -> tuple[tuple[int, int], ...]:
    """(first column, columns) of each part: the first ones are whole lines of shared memory, so
    that every part is aligned as V is."""
    if head_dim_v <= MAX_HEAD_DIM_V:
        return ((0, head_dim_v),)
    half = -(-head_dim_v // (MAX_PARTS * LINE_COLUMNS)) * LINE_COLUMNS
    return (0, half), (half, head_dim_v - half)


def part_problem(problem: Problem, first: int, columns: int) -> Problem:
    """Attention to some columns of V. What does not depend on V is left to the first part."""
    return replace(
        problem,
        head_dim_v=columns,
        return_lse=problem.return_lse and first == 0,
        return_softmax=problem.return_softmax and first == 0,
    )


def part_spec(problem: Problem, first: int, columns: int, arch: str, gpu: str = "") -> KernelSpec:
    """The kernel of a part; its rows of O lie in those of the whole."""
    spec = forward_spec(part_problem(problem, first, columns), arch, gpu=gpu)
    constants = dict(spec.constants)
    constants["out_vector_bytes"] = gcd(problem.head_dim_v * ELEM_BYTES, 16)
    return KernelSpec.make(spec.source, spec.entry, spec.params, spec.arch, **constants)


def forward_specs(problem: Problem, arch: str, gpu: str = "") -> list[KernelSpec]:
    """The kernels of a forward: one, or one of each part."""
    return [
        part_spec(problem, first, columns, arch, gpu)
        for first, columns in parts(problem.head_dim_v)
    ]


def refuses_head_dims(problem: Problem, arch: str) -> str | None:
    """Why `bwd.cu` has no tile for these head dims on an arch; None if it has one."""
    try:
        bwd_tiles.backward_tile(problem, arch)
    except NotImplementedError as error:
        return str(error)
    return None


def backward_parts(problem: Problem, arch: str) -> tuple[tuple[int, int], ...]:
    """(first column, columns) of each part: the fewest parts for which `bwd.cu` has a tile."""
    for count in range(1, problem.head_dim_v // LINE_COLUMNS + 2):
        columns = problem.head_dim_v
        if count > 1:
            columns = -(-problem.head_dim_v // (count * LINE_COLUMNS)) * LINE_COLUMNS
        if refuses_head_dims(replace(problem, head_dim_v=columns), arch) is None:
            return tuple(
                (first, min(columns, problem.head_dim_v - first))
                for first in range(0, problem.head_dim_v, columns)
            )
    raise NotImplementedError(
        f"no backward tile of head dims ({problem.head_dim_qk}, {problem.head_dim_v}) fits {arch}, "
        "however few columns of V it has"
    )


def part_backward(problem: BackwardProblem, first: int, columns: int) -> BackwardProblem:
    """The gradients through some columns of V."""
    return replace(problem, forward=part_problem(problem.forward, first, columns))


def backward_specs(problem: BackwardProblem, arch: str, gpu: str = "") -> list[KernelSpec]:
    """The kernels of a backward, of all its parts."""
    return [
        spec
        for part in backward_parts(problem.forward, arch)
        for spec in bwd_order.backward_specs(part_backward(problem, *part), arch, gpu=gpu)
    ]
