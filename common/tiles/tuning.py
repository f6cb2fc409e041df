"""What the autotuner must know of one kernel. Each tree lists its own in its `tuning.py`.

A tree says which tiles its kernel's rules allow and roughly what they cost; it neither compiles nor
measures. `flash_attn_interface/tune/command.py` does both, the same way for every tree and
direction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from itertools import islice
from typing import Any

from ..ask.problem import Problem, Target
from ..runtime import arch as arch_table
from ..runtime.spec import KernelSpec
from . import tuned_tiles

Tile = Any
"""A tile dataclass of a tree: frozen, with fields of type int and bool."""

REGISTER_STEP = 8  # registers are handed out to a thread in steps of so many


def _no_row_class(problem: Problem) -> int:
    return 0


@dataclass(frozen=True)
class Tunable:
    """One kernel as the tuner sees it; problems are those of the forward in all directions.

    kind: the tile's dataclass.
    builtin: the choice of the tree's own list.
    refuses: why the kernel cannot be built with a tile on an arch ("sm_90a"); None if it can.
    space: tiles worth a look, in any order; may yield some that are refused.
    cost: of a tile in arbitrary units, estimated; only decides which tiles are tried first.
    specs: the kernels of its plans, first the one that the tile shapes most.
    plan: a plan with this tile; its `run` takes what the direction's plans take.
    row_class: the `rows` of `tuned_tiles.key`.
    """

    tree: str
    direction: str  # "fwd" | "bwd" | "decode"
    kind: type[Any]
    builtin: Callable[[Problem, str], Tile]
    refuses: Callable[[Tile, Problem, str], str | None]
    space: Callable[[Problem, str], Iterator[Tile]]
    cost: Callable[[Tile, Problem], float]
    specs: Callable[[Problem, str, Tile], tuple[KernelSpec, ...]]
    plan: Callable[[Problem, Target, Tile], Any]
    row_class: Callable[[Problem], int] = _no_row_class

    def key(self, problem: Problem) -> str:
        return tuned_tiles.key(self.tree, self.direction, problem, self.row_class(problem))

    def shipped(self, problem: Problem, arch: str, gpu: str) -> Tile:
        """What the package chooses by itself: its table, else the tree's list."""
        found = tuned_tiles.tile(
            self.kind,
            self.key(problem),
            arch,
            gpu,
            lambda tile: self.refuses(tile, problem, arch),
            packaged_only=True,
        )
        return self.builtin(problem, arch) if found is None else found

    def candidates(self, problem: Problem, arch: str, limit: int) -> list[Tile]:
        """The `limit` cheapest tiles by estimate, in a fixed order; at most two, or one in sixteen,
        of one shape, since the estimate is too coarse to stake all on one.
        """
        chosen: list[Tile] = []
        of_shape: Counter[tuple[int, ...]] = Counter()
        for tile in self._allowed(problem, arch):
            shape = self._shape(tile)
            if of_shape[shape] < max(2, limit // 16) and len(chosen) < limit:
                of_shape[shape] += 1
                chosen.append(tile)
        return chosen

    def neighbours(self, tile: Tile, problem: Problem, arch: str, limit: int) -> list[Tile]:
        """The `limit` cheapest tiles that differ from this one in a single field."""
        values = astuple(tile)
        near = (
            other
            for other in self._allowed(problem, arch)
            if sum(a != b for a, b in zip(values, astuple(other), strict=True)) == 1
        )
        return list(islice(near, limit))

    def _allowed(self, problem: Problem, arch: str) -> list[Tile]:
        allowed = {
            tile for tile in self.space(problem, arch) if self.refuses(tile, problem, arch) is None
        }
        return sorted(allowed, key=lambda tile: (self.cost(tile, problem), astuple(tile)))

    def _shape(self, tile: Tile) -> tuple[int, ...]:
        """The fields by which two tiles are different kernels, not the same with other buffers."""
        sizes = ("block_m", "block_n", "num_warps", "num_mma_warpgroups", "row_warps", "num_teams")
        schedules = ("one_barrier", "split_roles", "ping_pong", "p_in_smem")
        of_dq = ("cluster_size", "add_stages", "dq_buffers")  # of the Hopper backward
        return tuple(int(getattr(tile, name, 0)) for name in (*sizes, *schedules, *of_dq))


def register_budget(arch: str, num_threads: int, ctas_per_sm: int) -> int:
    """Registers that a thread may have if so many CTAs are to fit on an SM."""
    limits = arch_table.limits(arch)
    share = limits.registers_per_sm // (num_threads * ctas_per_sm)
    return min(share // REGISTER_STEP * REGISTER_STEP, limits.max_registers_per_thread)
