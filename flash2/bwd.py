"""Launches the backward: bwd_preprocess.cu, bwd.cu, bwd_convert.cu, on one parameter block.

Called by the autograd of `flash_attn_interface/`. Tile choices: `bwd_tiles.py`.
"""

from __future__ import annotations

from math import floor, lcm
from typing import Any

import torch
from torch import Tensor

from .._common import kernels
from .._common.backward_problem import BackwardProblem
from .._common.plan_values import score_values
from .._common.problem import Target
from . import bwd_tiles
from .bwd_tiles import BackwardTile
from .tiles import ELEM_BYTES

STAT_ROWS = 128  # bwd_work.cuh: softmax_d gives each sequence whole tiles of so many rows
ACCUM_ROWS = 16  # bwd_work.cuh: dq_accum likewise
# Q, dO and dq_accum of the heads that run together should stay in L2 (A100 2 x 20 MB, H100 50 MB).
L2_BUDGET_BYTES = 24 * 2**20
MAX_DETERMINISTIC_SPLITS = 8
SIMULATED_SMS = 4


class BackwardPlan:
    """One backward problem on one target: three kernels and a parameter block.

    Not shared between threads. Making one compiles nothing and needs no GPU; the first run loads
    the kernels.

    dk and dv are bitwise reproducible, each the fp32 sum over its query heads in a fixed order. dq
    is if deterministic: split s of its accumulator belongs to one CTA per head group, which takes
    key tiles s, s + num_splits, ... in order.

    Memory that `run` takes beyond its results: 4 bytes per query row and head (softmax_lse in other
    units), and the fp32 accumulator of dq, num_splits * num_heads_q * rows * columns * 4 bytes;
    rows are rounded up to 16 in each sequence, columns as `BackwardTile.accum_columns`. num_splits
    is 1, if deterministic min(ceil(SMs / (batch * head groups)), key tiles of the longest sequence,
    MAX_DETERMINISTIC_SPLITS). A head group is lcm(num_heads_q / num_heads_k, num_heads_q /
    num_heads_v) query heads.
    """

    def __init__(
        self, problem: BackwardProblem, target: Target, tile: BackwardTile | None = None
    ) -> None:
        """tile: instead of the tables' choice."""
        self.problem = problem
        self.target = target
        self.specs = bwd_tiles.backward_specs(problem, target.arch, tile, target.gpu)
        self.device = (
            torch.device("cpu") if target.simulated else torch.device("cuda", target.device_index)
        )
        forward = problem.forward
        self._heads_per_cta = lcm(forward.qhead_per_khead, forward.qhead_per_vhead)
        self._is_empty = min(forward.total_q, forward.total_k) == 0
        self._kernels: tuple[kernels.Kernel, ...] = ()  # loaded, maybe compiled, by the first run

    def _prepare(self) -> None:
        """Everything that runs share."""
        self.num_splits = self._num_splits()
        values = self._values()
        query_grid = self._query_tiles() * self.problem.forward.num_heads_q
        key_grid = values["k_units"] * values["k_tiles_per_unit"]
        if max(query_grid, key_grid) >= 2**31:
            raise NotImplementedError(
                f"{max(query_grid, key_grid)} tiles exceed the launch grid of 2**31 - 1: "
                "split the batch"
            )
        self.grids = (query_grid, key_grid, query_grid)
        loaded = tuple(kernels.load(spec, self.target) for spec in self.specs)
        self._block = loaded[0].layout.block()
        for name, value in values.items():
            self._block.set(name, value)
        slot = self._block.pointer_slot
        self._slots = tuple(slot(name) for name in _POINTERS)
        self._kernels = loaded

    def run(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        rng_state: Tensor | None = None,
        dlse: Tensor | None = None,
    ) -> Tensor:
        """Writes dq, dk and dv, all of their rows; returns softmax_d = rowsum(dout * out) - dlse.

        Args:
            out, softmax_lse: of the forward, or merged over more keys than k holds (ring
                attention): then the results are what these keys contribute to the gradients.
            dlse: gradient of softmax_lse, same shape; None is zero.

        Returns:
            fp32 (batch, num_heads_q, seqlen_q rounded up to 128); packed (num_heads_q, total_q +
            128 * batch), where sequence b begins at cu_seqlens_q[b] + 128 * b.
        """
        softmax_d = self._empty(self._stat_shape())
        if self._is_empty:
            for gradient in (dq, dk, dv):
                gradient.zero_()
            return softmax_d.zero_()
        if not self._kernels:
            self._prepare()
        softmax_lse = _fp32_contiguous(softmax_lse)
        dlse = None if dlse is None else _fp32_contiguous(dlse)
        lse_log2 = self._empty(self._stat_shape())
        dq_accum = self._empty((self.num_splits * self._accum_rows() * self._accum_columns(),))
        tensors = (
            dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, seqused_q,
            seqused_k, alibi_slopes, rng_state, dlse, softmax_d, lse_log2, dq_accum,
        )  # fmt: skip
        for slot, tensor in zip(self._slots, tensors, strict=True):
            slot.value = 0 if tensor is None else tensor.data_ptr()
        for kernel, grid in zip(self._kernels, self.grids, strict=True):
            kernel.launch(grid, self._block, tensors)
        return softmax_d

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

    def _num_splits(self) -> int:
        if not self.problem.deterministic:
            return 1
        p = self.problem.forward
        units = p.batch * p.num_heads_q // self._heads_per_cta
        sms = SIMULATED_SMS
        if not self.target.simulated:
            sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        key_tiles = -(-p.seqlen_k // int(self.specs[1]["block_n"]))
        return max(1, min(-(-sms // units), key_tiles, MAX_DETERMINISTIC_SPLITS))

    def _key_work(self) -> dict[str, int]:
        """Units, tiles and groups of bwd_work.cuh."""
        p = self.problem.forward
        groups = p.num_heads_q // self._heads_per_cta
        block_n = int(self.specs[1]["block_n"])
        units, tiles = p.batch * groups, -(-p.seqlen_k // block_n)
        if self.problem.deterministic:
            tiles = self.num_splits
            units += groups if p.varlen_k else 0  # the tail of the packed keys counts as a sequence
        elif p.varlen_k:
            units, tiles = groups, -(-p.total_k // block_n) + p.batch
        row_bytes = ELEM_BYTES * (p.head_dim_qk + p.head_dim_v) + 4 * self._accum_columns()
        unit_bytes = p.seqlen_q * row_bytes * self._heads_per_cta
        together = max(1, min(units, L2_BUDGET_BYTES // max(unit_bytes, 1)))
        return {"k_units": units, "k_tiles_per_unit": tiles, "k_units_per_group": together}

    def _values(self) -> dict[str, Any]:
        """The fields of BwdParams that the problem fixes."""
        problem, p = self.problem, self.problem.forward
        stat_rows = self._stat_shape()[-1]
        accum_head = self._accum_rows_per_head() * self._accum_columns()
        keep_probability = 1.0 - p.dropout_p
        unshift = 2.0 ** -int(self.specs[1]["probability_shift"])
        values: dict[str, Any] = {
            "lse_batch_stride": 0 if p.varlen_q else p.num_heads_q * p.seqlen_q,
            "lse_head_stride": p.total_q if p.varlen_q else p.seqlen_q,
            "stat_batch_stride": 0 if p.varlen_q else p.num_heads_q * stat_rows,
            "stat_head_stride": stat_rows,
            "accum_split_stride": self._accum_rows() * self._accum_columns(),
            "accum_batch_stride": 0 if p.varlen_q else p.num_heads_q * accum_head,
            "accum_head_stride": accum_head,
            "batch": p.batch,
            "seqlen_q": p.seqlen_q,
            "seqlen_k": p.seqlen_k,
            "total_q": p.total_q,
            "total_k": p.total_k,
            "num_heads_q": p.num_heads_q,
            "qhead_per_khead": p.qhead_per_khead,
            "qhead_per_vhead": p.qhead_per_vhead,
            "heads_per_cta": self._heads_per_cta,
            "q_tiles_per_unit": -(-p.seqlen_q // STAT_ROWS),
            "num_splits": self.num_splits,
            **score_values(p),
            "dqk_scale": p.softmax_scale / keep_probability * unshift,
            "dv_scale": 1.0 / keep_probability * unshift,
            "keep_threshold": floor(keep_probability * 255.0),
            "keep_probability": keep_probability,
            **self._key_work(),
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
    "dq_accum",
)  # fmt: skip


def _fp32_contiguous(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()
