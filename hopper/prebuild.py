"""Which kernels of this folder an installation prebuilds. Called by `common/prebuild/build.py`."""

from __future__ import annotations

from dataclasses import replace

from flash_attn_interface._common.ask.problem import Problem
from flash_attn_interface._common.prebuild.headdim import Pair, Wanted
from flash_attn_interface._common.prebuild.problems import (
    backward_problems,
    forward_problems,
    gpus,
)
from flash_attn_interface._common.runtime.spec import KernelSpec

from . import bwd_tiles
from .fwd_tiles import ARCH, forward_spec, refuses_head_dims


def specs(pair: Pair, wanted: Wanted, arch: str) -> list[KernelSpec]:
    """The kernels for a pair of head dims; none if they, or the arch, are beyond this tree."""
    if arch.rstrip("a") != ARCH.rstrip("a") or refuses_head_dims(*pair) is not None:
        return []
    found: dict[KernelSpec, None] = {}
    for gpu in gpus(ARCH):
        for problem in forward_problems(pair, wanted):
            for seqlen in LENGTHS:
                found[forward_spec(_of_length(problem, seqlen), ARCH, gpu=gpu)] = None
        if bwd_tiles.refuses_head_dims(*pair) is not None:
            continue
        for backward in backward_problems(pair, wanted):
            for seqlen in LENGTHS:
                asked = replace(backward, forward=_of_length(backward.forward, seqlen))
                for spec in bwd_tiles.backward_specs(asked, ARCH, gpu=gpu):
                    found[spec] = None
    return list(found)


# Tiles depend on the number of keys: samples close enough to meet every step of the table.
LENGTHS = tuple(factor << log2 for log2 in range(5, 16) for factor in (2, 3))


def _of_length(problem: Problem, seqlen: int) -> Problem:
    rows = problem.batch * seqlen
    return replace(problem, seqlen_q=seqlen, seqlen_k=seqlen, total_q=rows, total_k=rows)
