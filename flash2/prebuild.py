"""Which kernels of this folder an installation prebuilds. Called by `common/prebuild/build.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .._common.ask.kv_problem import Append
from .._common.ask.problem import Problem, Target
from .._common.prebuild.headdim import Pair, Wanted
from .._common.prebuild.problems import (
    backward_problems,
    cache_problems,
    forward_problems,
    gpus,
    paged_problems,
)
from .._common.runtime import arch as arch_table
from .._common.runtime.spec import KernelSpec
from .append_tiles import append_spec
from .decode_splits import MAX_CHOSEN_SPLITS
from .decode_tiles import PARTIAL_COLUMN_MULTIPLE, chosen_tile, combine_spec, decode_spec
from .part_tiles import backward_specs, forward_specs


def specs(pair: Pair, wanted: Wanted, arch: str) -> list[KernelSpec]:
    """The kernels for a pair of head dims on an arch, for what this tree serves of that pair.

    "sm_90a" means sm_90 here, whose kernels serve an H100 wherever the Hopper tree does not. Newer
    GPUs that run an arch's machine code may prefer other tiles: those are compiled for it too.
    """
    arch = arch.rstrip("af")
    found: dict[KernelSpec, None] = {}
    for runs_on in (arch, *arch_table.newer_compatible(arch)):
        for gpu in gpus(runs_on):
            for spec in _planned(pair, wanted, runs_on, gpu):
                found[replace(spec, arch=arch)] = None
    for spec in found:
        spec.validate()
    return list(found)


def _planned(pair: Pair, wanted: Wanted, arch: str, gpu: str) -> Iterator[KernelSpec]:
    for problem in forward_problems(pair, wanted):
        yield from forward_specs(problem, arch, gpu)
    for backward in backward_problems(pair, wanted):
        yield from backward_specs(backward, arch, gpu)
    for problem in paged_problems(pair, wanted):
        yield from forward_specs(problem, arch, gpu)
    for cache in cache_problems(pair, wanted):
        yield append_spec(cache, arch, (cache.append or Append()).new_vector_bytes)
        yield from _decode_specs(cache, arch, gpu)


def _decode_specs(problem: Problem, arch: str, gpu: str) -> Iterator[KernelSpec]:
    tile = chosen_tile(problem, Target(arch, 0, gpu=gpu))
    for split in (False, True):
        yield decode_spec(problem, arch, split, tile)
    wide = problem.head_dim_v % PARTIAL_COLUMN_MULTIPLE == 0
    for num_splits in (2, MAX_CHOSEN_SPLITS):  # combine_spec tells few from many
        yield combine_spec(arch, problem.dtype, problem.head_dim_v, num_splits, True, wide)
