"""Launches flash2_fwd (fwd.cu) for a head_dim_v over 256: twice, for either part of V's columns.

A warp holds O of all columns of its rows, and a thread has 255 registers: that bounds head_dim_v.
Scores and P are computed for each part. Of head dims (qk, v) that takes 2 qk + v products of a
column instead of qk + v, at (512, 512) 1.5 times as many. Called by `backend.py`; the kernels:
`part_tiles.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._common.ask.call import Cache, Tensors
from .._common.ask.problem import Problem, Target
from .._common.launch import kernels
from .._common.launch.plan_values import out_template
from . import part_tiles
from .fwd import ForwardPlan
from .fwd_tiles import ELEM_BYTES


class PartPlan(ForwardPlan):
    """Attention to some columns of V, into the same columns of the whole's O."""

    def __init__(self, whole: Problem, target: Target, first: int, columns: int) -> None:
        super().__init__(part_tiles.part_problem(whole, first, columns), target)
        self.whole = whole
        self.first_byte = first * ELEM_BYTES
        self.spec = part_tiles.part_spec(whole, first, columns, target.arch, target.gpu)

    def prepare(self) -> kernels.Kernel:
        """Loads the kernel, if that has not been done yet."""
        return self._kernel or self._prepare()

    def launch(
        self, out: Tensor, tensors: Tensors, rng_state: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Fills its columns of `out`; (softmax_lse or None, s_dmask or None)."""
        q, k, v, *lengths_and_tables = tensors
        optional = (*lengths_and_tables, rng_state)
        kernel = self.prepare()
        self._q.value, self._k.value = q.data_ptr(), k.data_ptr()
        self._v.value = v.data_ptr() + self.first_byte
        self._out.value = out.data_ptr() + self.first_byte
        lse = dmask = None
        if self.problem.return_lse:
            lse = torch.empty_like(self._lse_like, memory_format=torch.contiguous_format)
            self._lse.value = lse.data_ptr()
        if self.problem.return_softmax:
            dmask = torch.zeros(self._dmask_shape(), dtype=out.dtype, device=self.device)
            self._dmask.value = dmask.data_ptr()
        page_table = tensors.page_table
        if page_table is not None:
            self._page_table_stride.value = page_table.stride(0)
            self._last_table_row.value = page_table.shape[0] - 1
        for slot, tensor in zip(self._optional, optional, strict=True):
            if tensor is not None:
                slot.value = tensor.data_ptr()
        kernel.launch(self.grid, self._block, (q, k, v, out, lse, dmask, *optional))
        return lse, dmask

    def _values(self) -> dict[str, Any]:
        strides = zip(("batch", "row", "head"), self.whole.out_strides, strict=True)
        return super()._values() | {f"out_{axis}_stride": stride for axis, stride in strides}


class PartsPlan:
    """One problem on one target, as `ForwardPlan`: a plan for each part of V's columns."""

    def __init__(self, problem: Problem, target: Target) -> None:
        self.problem = problem
        self.target = target
        self.parts = [
            PartPlan(problem, target, first, columns)
            for first, columns in part_tiles.parts(problem.head_dim_v)
        ]
        self._out_like: Tensor | None = None
        self._out_axes: tuple[int, ...] | None = None

    def run(
        self, tensors: Tensors, cache: Cache | None = None, rng_state: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(out, softmax_lse or None, s_dmask or None) of tensors that fit the problem."""
        for part in self.parts:  # a kernel that cannot be had must not leave half of O behind
            part.prepare()
        if self._out_like is None:
            self._out_like, self._out_axes = out_template(self.problem, self.parts[0].device)
        out = torch.empty_like(self._out_like, memory_format=torch.contiguous_format)
        if self._out_axes is not None:
            out = out.permute(self._out_axes)
        (lse, dmask), *_ = [part.launch(out, tensors, rng_state) for part in self.parts]
        return out, lse, dmask

    def describe(self) -> str:
        """Several lines for people: the parts' kernels and grids."""
        return "\n".join(part.describe() for part in self.parts)
