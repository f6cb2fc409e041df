"""BackwardProblem -> KernelSpecs, with the way in which a deterministic dQ is added up. Pure
functions. Everything else about the kernels: `bwd_tiles.py`.

Ordered: all CTAs add to one dq_accum, each query tile's key tiles in order (bwd_turns.cuh).
Else CTAs have copies of dq_accum for themselves, which leaves SMs idle and memory busy.
"""

from __future__ import annotations

from dataclasses import replace

from .._common.ask.backward_problem import BackwardProblem
from .._common.runtime.spec import KernelSpec
from . import bwd_tiles
from .bwd_tiles import BackwardTile

# Issue 13: the ordered way has run in the simulator only, and a wait that never ends hangs a GPU.
ORDERED_ON_GPUS = False


def backward_specs(
    problem: BackwardProblem,
    arch: str,
    tile: BackwardTile | None = None,
    gpu: str = "",
    ordered: bool = ORDERED_ON_GPUS,
) -> tuple[KernelSpec, ...]:
    """As in bwd_tiles. ordered: how, if the problem is deterministic."""
    if not (problem.deterministic and ordered):
        return bwd_tiles.backward_specs(problem, arch, tile, gpu)
    one_copy = replace(problem, deterministic=False)
    return tuple(map(_in_order, bwd_tiles.backward_specs(one_copy, arch, tile, gpu)))


def _in_order(spec: KernelSpec) -> KernelSpec:
    """Where a kernel has to do with the order."""
    constants = ((name, value or name == "ordered") for name, value in spec.constants)
    return replace(spec, constants=tuple(constants))
