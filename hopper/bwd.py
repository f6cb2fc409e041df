"""Launches hopper_bwd (bwd.cu) between the streaming kernels of the Ampere tree, on one parameter
block.

Called by the autograd of `flash_attn_interface/`. Tile choices: `bwd_tiles.py`. What each CTA does,
beside what stands here: `flash2/bwd_schedule.py`. What is before and after it, and the memory that
it takes: `flash2/bwd.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import gcd
from typing import Any

from torch import Tensor

from flash_attn_interface._common.ask.backward_problem import BackwardProblem
from flash_attn_interface._common.launch import tensor_map
from flash_attn_interface._common.runtime.spec import KernelSpec
from flash_attn_interface._flash2 import bwd_schedule
from flash_attn_interface._flash2.bwd import BackwardPlan as StreamedBackwardPlan
from flash_attn_interface._flash2.bwd_schedule import BackwardSchedule

from . import bwd_tiles, tensor_maps
from .tensor_maps import MapPlan

# Deterministic: so many key tiles of a unit run at a time, other units between them. More would
# wait for each other at each query tile; fewer would not share queries in L2.
ORDERED_TILES_TOGETHER = 3


def schedule(
    problem: BackwardProblem, kernel: KernelSpec, num_sms: int, heads_per_cta: int = 0
) -> BackwardSchedule:
    """As flash2's, of clusters for CTAs. The heads of a CTA read one K head and one V head: it
    loads these once, and its sums are of one head each.
    """
    p, ctas = problem.forward, int(kernel["cluster_size"])
    clusters = {
        "block_m": kernel["block_m"],
        "block_n": int(kernel["block_n"]) * ctas,
        "accum_columns": kernel["accum_columns"],
        "min_ctas_per_sm": 1,
    }
    slots = num_sms // ctas
    unordered = replace(problem, deterministic=False)
    heads = heads_per_cta or bwd_schedule.choose_heads_per_cta(unordered, clusters, slots)
    if p.qhead_per_khead != p.qhead_per_vhead:
        common = gcd(p.qhead_per_khead, p.qhead_per_vhead)
        heads = max(n for n in range(1, common + 1) if common % n == 0 and n <= heads)
    chosen = bwd_schedule.schedule(unordered, clusters, slots, heads)
    tiles, units = chosen.k_tiles_per_unit, chosen.k_units
    if problem.deterministic:
        together = max(1, slots // ORDERED_TILES_TOGETHER)
    elif p.causal and not p.varlen_k:
        together = units_together(slots, tiles)
    else:
        return chosen
    turns = -(-units // min(units, together))
    return replace(chosen, k_tiles_per_phase=tiles, k_units_per_turn=-(-units // turns))


def units_together(slots: int, tiles: int) -> int:
    """Units whose key tiles take turns when causal, the longest first: enough to fill the GPU a few
    times, so that it ends evenly, and few enough for L2 (docs/performance/).
    """
    return max(4, min(16, 4 * slots // tiles))


class BackwardPlan(StreamedBackwardPlan):
    """As flash2's, with the main kernel of this tree."""

    schedule_of = staticmethod(schedule)
    programmatic = True

    def _choose_specs(self, tile: Any) -> tuple[KernelSpec, ...]:
        return bwd_tiles.backward_specs(self.problem, self.target.arch, tile, self.target.gpu)

    def _prepare(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        super()._prepare(dout, q, k, v)
        kind: tensor_map.Kind = "simulated" if self.target.simulated else "device"
        self._setters: tuple[Callable[[int], None], ...] = tuple(
            tensor_maps.address_setter(self._block, plan, kind, tensor.data_ptr())
            for plan, tensor in zip(self.map_plans(), (dout, q, k, v), strict=True)
        )

    def _point_maps(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        for set_address, tensor in zip(self._setters, (dout, q, k, v), strict=True):
            set_address(tensor.data_ptr())

    def map_plans(self) -> tuple[MapPlan, ...]:
        """Of dout, q, k and v."""
        main = self.specs[1]
        return tuple(
            tensor_maps.plan_map(
                f"{side.name}_map",
                self.problem.forward.dtype,
                side.head_dim,
                side.sizes,
                side.strides,
                ragged_rows=side.ragged_rows,
                box_rows=int(main["block_m" if side.of_queries else "block_n"]),
                swizzle_bytes=2 * bwd_tiles.CHUNK_COLUMNS,
            )
            for side in tensor_maps.sides(self.problem)
        )

    def _main_grid(self) -> int:
        return super()._main_grid() * int(self.specs[1]["cluster_size"])

    def _values(self) -> dict[str, Any]:
        rows = {
            f"{side.name}_batch_rows": side.batch_rows for side in tensor_maps.sides(self.problem)
        }
        return {**super()._values(), **rows}


def refuses(problem: BackwardProblem) -> str | None:
    """Why this tree's kernel cannot serve the problem; None if it can."""
    p = problem.forward
    reason = bwd_tiles.refuses_head_dims(p.head_dim_qk, p.head_dim_v)
    if reason is not None:
        return reason
    if p.softmax_scale == 0.0:
        return "its masks are applied before the scale, which must not be 0"
    return tensor_maps.refuses_backward_layout(problem)
