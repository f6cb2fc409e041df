"""Launches the backward: bwd_preprocess.cu, bwd.cu, bwd_convert.cu and, where CTAs of bwd.cu share
K or V heads, bwd_sum.cu, on one parameter block.

Called by the autograd of `flash_attn_interface/`. Tile choices: `bwd_tiles.py`. What each CTA does:
`bwd_schedule.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._common.ask.backward_problem import BackwardProblem
from .._common.ask.call import Backward, Tensors
from .._common.ask.problem import Target
from .._common.features import dropout, union
from .._common.launch import kernels
from .._common.runtime.spec import KernelSpec
from . import bwd_order, bwd_schedule, bwd_tiles
from .bwd_schedule import BackwardSchedule
from .bwd_tiles import BackwardTile

STAT_ROWS = 128  # bwd_work.cuh: softmax_d gives each sequence whole tiles of so many rows
ACCUM_ROWS = 16  # bwd_work.cuh: the accumulators likewise
SIMULATED_SMS = 4


class BackwardPlan:
    """One backward problem on one target: kernels and a parameter block.

    Not shared between threads. Making one compiles nothing and needs no GPU; the first run loads
    the kernels.

    dk and dv are bitwise reproducible, each the fp32 sum over its query heads in a fixed order. dq
    is if deterministic, in one of two ways. Ordered: key tiles add to one accumulator in order, by
    counters of 4 bytes per 16 rows and head behind it. Else split s of its accumulator belongs to
    one CTA per query head, which takes key tiles s, s + dq_splits, ... in order.

    Memory that `run` takes beyond its results: 4 bytes per query row and head (softmax_lse in other
    units), and fp32 accumulators:
    - of dq, dq_splits * num_heads_q * rows * columns * 4 bytes; dq_splits is 1 unless
      deterministic and not ordered, then at most `bwd_schedule.MAX_DETERMINISTIC_SPLITS`.
    - of dk and dv, only where several CTAs share a head of K or V: that number of CTAs *
      num_heads_k * rows * columns * 4 bytes, dv likewise. `bwd_schedule.choose_heads_per_cta` sees
      to it that the CTAs are fewer than the query heads that share it.
    Rows are rounded up to 16 in each sequence, columns as in `BackwardTile.accum_columns`.
    """

    def __init__(
        self,
        problem: BackwardProblem,
        target: Target,
        tile: BackwardTile | None = None,
        heads_per_cta: int = 0,
    ) -> None:
        """tile: instead of the tables' choice. heads_per_cta: instead of bwd_schedule's."""
        self.problem = problem
        self.target = target
        self.specs = self._choose_specs(tile)
        self.device = (
            torch.device("cpu") if target.simulated else torch.device("cuda", target.device_index)
        )
        forward = problem.forward
        self._heads_per_cta = heads_per_cta
        self._is_empty = min(forward.total_q, forward.total_k) == 0
        self._kernels: tuple[kernels.Kernel, ...] = ()  # loaded, maybe compiled, by the first run

    # What another tree's plan has of its own.
    def _choose_specs(self, tile: BackwardTile | None) -> tuple[KernelSpec, ...]:
        arch, gpu = self.target.arch, self.target.gpu
        return bwd_order.backward_specs(self.problem, arch, tile, gpu, self._in_order())

    def _in_order(self) -> bool:
        """How to be deterministic, see above."""
        return bwd_order.ORDERED_ON_GPUS or self.target.simulated

    programmatic = False  # a kernel may start before the one ahead of it has ended
    schedule_of: Callable[..., BackwardSchedule] = staticmethod(bwd_schedule.schedule)

    def _prepare(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Everything that runs share."""
        problem, p = self.problem, self.problem.forward
        self.schedule = self.schedule_of(
            problem, self.specs[1], self._num_sms(), self._heads_per_cta
        )
        self._dq_accum_size = self.schedule.dq_splits * self._accum_rows() * self._accum_columns()
        if self.specs[0]["ordered"]:
            self._dq_accum_size += self._accum_rows() // ACCUM_ROWS  # counters
        share_k, share_v = (
            self.schedule.sharing_ctas(n) for n in (p.qhead_per_khead, p.qhead_per_vhead)
        )
        # Floats of each accumulator and CTAs of bwd_sum.cu, 0 where CTAs of bwd.cu share no head.
        rows = self._key_accum_rows() * (1 if p.varlen_k else p.batch)
        self._dk_accum_size = self._dv_accum_size = sum_grid = 0
        if share_k > 1:
            self._dk_accum_size = share_k * p.num_heads_k * rows * self._accum_columns()
            sum_grid += self._key_tiles() * p.num_heads_k
        if share_v > 1:
            columns = int(self.specs[3]["v_columns"])
            self._dv_accum_size = share_v * p.num_heads_v * rows * columns
            sum_grid += self._key_tiles() * p.num_heads_v
        values = self._values()
        query_grid = self._query_tiles() * p.num_heads_q
        key_grid = self._main_grid()
        largest = max(query_grid, key_grid, sum_grid)
        if largest >= 2**31:
            raise NotImplementedError(
                f"{largest} tiles exceed the launch grid of 2**31 - 1: split the batch"
            )
        self.grids = (query_grid, key_grid, query_grid, *([sum_grid] if sum_grid else []))
        specs = self.specs[: len(self.grids)]
        loaded = tuple(kernels.load(spec, self.target) for spec in specs)
        self._block = loaded[1].layout.block()  # of the main kernel; it holds that of the others
        for name, value in values.items():
            self._block.set(name, value)
        slot = self._block.pointer_slot
        self._slots = tuple(slot(name) for name in _POINTERS)
        self._kernels = loaded

    def run(self, tensors: Tensors, backward: Backward) -> Tensor:
        """Writes dq, dk and dv, all of their rows; returns softmax_d = rowsum(dout * out) - dlse.

        Args:
            tensors: out and softmax_lse of the backward's are the forward's, or merged over more
                keys than k holds (ring attention): then the results are what these keys contribute
                to the gradients. dlse: gradient of softmax_lse, same shape; None is zero.

        Returns:
            fp32 (batch, num_heads_q, seqlen_q rounded up to 128); packed (num_heads_q, total_q +
            128 * batch), where sequence b begins at cu_seqlens_q[b] + 128 * b.
        """
        q, k, v, *lengths = tensors[:8]
        dout, out, softmax_lse, dq, dk, dv, rng_state, dlse = backward
        softmax_d = self._empty(self._stat_shape())
        if self._is_empty:
            for gradient in (dq, dk, dv):
                gradient.zero_()
            return softmax_d.zero_()
        if not self._kernels:
            self._prepare(dout, q, k, v)
        softmax_lse = _fp32_contiguous(softmax_lse)
        dlse = None if dlse is None else _fp32_contiguous(dlse)
        rng_state = None if rng_state is None else rng_state.contiguous()
        lse_log2 = self._empty(self._stat_shape())
        dq_accum = self._empty((self._dq_accum_size,))
        dk_accum = self._empty((self._dk_accum_size,)) if self._dk_accum_size else None
        dv_accum = self._empty((self._dv_accum_size,)) if self._dv_accum_size else None
        read_and_written = (dout, q, k, v, out, softmax_lse, dq, dk, dv, *lengths, rng_state, dlse)
        scratch = (softmax_d, lse_log2, dq_accum, dk_accum, dv_accum)
        pointed_to: tuple[Tensor | None, ...] = (*read_and_written, *scratch)
        for slot, tensor in zip(self._slots, pointed_to, strict=True):
            slot.value = 0 if tensor is None else tensor.data_ptr()
        self._point_maps(dout, q, k, v)
        programmatic = False  # the first waits for all that is ahead on the stream
        for kernel, grid in zip(self._kernels, self.grids, strict=True):
            kernel.launch(grid, self._block, pointed_to, programmatic)
            programmatic = self.programmatic
        return softmax_d

    def _main_grid(self) -> int:
        return self.schedule.k_units * self.schedule.k_tiles_per_unit

    def _point_maps(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """For a main kernel that sees these by tensor maps."""

    def describe(self) -> str:
        """Several lines for people: the kernels in order."""
        return "\n".join(spec.describe() for spec in self.specs)

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def _stat_shape(self) -> tuple[int, ...]:
        p = self.problem.forward
        if p.varlen_q:
            return (p.num_heads_q, p.total_q + STAT_ROWS * p.batch)
        return (p.batch, p.num_heads_q, -(-p.seqlen_q // STAT_ROWS) * STAT_ROWS)

    def _accum_columns(self) -> int:
        return int(self.specs[1]["accum_columns"])

    def _accum_rows_per_head(self) -> int:
        """Rows of dq_accum for one head, dense of one sequence."""
        p = self.problem.forward
        if p.varlen_q:
            return (p.total_q // ACCUM_ROWS + p.batch) * ACCUM_ROWS
        return -(-p.seqlen_q // ACCUM_ROWS) * ACCUM_ROWS

    def _accum_rows(self) -> int:
        """Rows of dq_accum for one split."""
        p = self.problem.forward
        return self._accum_rows_per_head() * p.num_heads_q * (1 if p.varlen_q else p.batch)

    def _query_tiles(self) -> int:
        """Of one head: enough for any split of total_q into sequences."""
        p = self.problem.forward
        if p.varlen_q:
            return -(-p.total_q // STAT_ROWS) + p.batch
        return -(-p.seqlen_q // STAT_ROWS) * p.batch

    def _key_accum_rows(self) -> int:
        """Rows of dk_accum and dv_accum for one head, dense of one sequence."""
        p = self.problem.forward
        if p.varlen_k:
            return (p.total_k // ACCUM_ROWS + p.batch) * ACCUM_ROWS
        return -(-p.seqlen_k // ACCUM_ROWS) * ACCUM_ROWS

    def _key_tiles(self) -> int:
        """Of one head, for bwd_sum.cu: enough for any split of total_k into sequences."""
        p = self.problem.forward
        if p.varlen_k:
            return -(-p.total_k // STAT_ROWS) + p.batch
        return -(-p.seqlen_k // STAT_ROWS) * p.batch

    def _num_sms(self) -> int:
        if self.target.simulated:
            return SIMULATED_SMS
        return int(torch.cuda.get_device_properties(self.device).multi_processor_count)

    def _values(self) -> dict[str, Any]:
        """The fields of BwdParams that the problem fixes."""
        problem, p, schedule = self.problem, self.problem.forward, self.schedule
        stat_rows = self._stat_shape()[-1]
        accum_head = self._accum_rows_per_head() * self._accum_columns()
        keep_probability = dropout.keep_probability(p)
        ds_shift = bwd_tiles.ds_shift(p)
        unshift = 2.0 ** -int(self.specs[1]["probability_shift"])
        values: dict[str, Any] = {
            "lse_batch_stride": 0 if p.varlen_q else p.num_heads_q * p.seqlen_q,
            "lse_head_stride": p.total_q if p.varlen_q else p.seqlen_q,
            "stat_batch_stride": 0 if p.varlen_q else p.num_heads_q * stat_rows,
            "stat_head_stride": stat_rows,
            "accum_split_stride": self._accum_rows() * self._accum_columns(),
            "accum_batch_stride": 0 if p.varlen_q else p.num_heads_q * accum_head,
            "accum_head_stride": accum_head,
            "total_k": p.total_k,
            "num_heads_q": p.num_heads_q,
            "qhead_per_khead": p.qhead_per_khead,
            "qhead_per_vhead": p.qhead_per_vhead,
            "key_accum_rows": self._key_accum_rows(),
            "heads_per_group": schedule.heads_per_group,
            "heads_per_cta": schedule.heads_per_cta,
            "ctas_per_group": schedule.ctas_per_group,
            "k_tiles_per_unit": schedule.k_tiles_per_unit,
            "k_units": schedule.k_units,
            "k_tiles_per_phase": schedule.k_tiles_per_phase,
            "k_units_per_turn": schedule.k_units_per_turn,
            "k_sum_tiles": self._key_tiles(),
            "q_tiles_per_unit": -(-p.seqlen_q // STAT_ROWS),
            "num_splits": schedule.dq_splits,
            **union.values(p),
            "dqk_scale": p.softmax_scale / keep_probability * unshift * 2.0**ds_shift,
            "ds_scale": 2.0**-ds_shift,
            "dv_scale": 1.0 / keep_probability * unshift,
        }
        strides = {
            "q": p.q_strides,
            "k": p.k_strides,
            "v": p.v_strides,
            "out": problem.out_strides,
            "dout": problem.dout_strides,
            "dq": problem.dq_strides,
            "dk": problem.dk_strides,
            "dv": problem.dv_strides,
        }
        for name, of_tensor in strides.items():
            for axis, stride in zip(("batch", "row", "head"), of_tensor, strict=True):
                values[f"{name}_{axis}_stride"] = stride
        return values


# BwdParams' pointers in the order in which `run` lists its tensors.
_POINTERS = (
    "dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv", "cu_seqlens_q", "cu_seqlens_k",
    "seqused_q", "seqused_k", "alibi_slopes", "rng_state", "dlse", "softmax_d", "lse_log2",
    "dq_accum", "dk_accum", "dv_accum",
)  # fmt: skip


def _fp32_contiguous(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()
