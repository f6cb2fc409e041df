"""Launches flash2_fwd (fwd.cu): fills its parameters once per problem, patches pointers per call.

Called by `flash_attn_interface/call/dispatch.py`, which keeps one plan per problem and thread. Tile
choices: `fwd_tiles.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._common.ask.call import Cache, Tensors
from .._common.ask.problem import Problem, Target
from .._common.features import union
from .._common.launch import kernels
from .._common.launch.plan_values import out_template, template
from . import fwd_tiles

# K and V of the units that run together should stay in L2 (A100 2 x 20 MB, H100 50 MB), with room
# for Q and O.
L2_BUDGET_BYTES = 16 * 2**20
DMASK_MULTIPLE = 128

# Tensors that a problem may lack: fields of FwdParams.
_OPTIONAL = (*Tensors._fields[3:], "rng_state")


class ForwardPlan:
    """One problem on one target: kernel, grid and a parameter block. Not shared between threads.

    Making one compiles nothing and needs no GPU. `run` loads the kernel at its first call,
    allocates the outputs, patches the pointers and launches on torch's current stream.
    """

    def __init__(
        self, problem: Problem, target: Target, tile: fwd_tiles.ForwardTile | None = None
    ) -> None:
        """tile: instead of the tables' choice."""
        self.problem = problem
        self.target = target
        self.spec = fwd_tiles.forward_spec(problem, target.arch, tile, target.gpu)
        self.tiles_per_unit, self.num_units = _work(problem, int(self.spec["block_m"]))
        self.grid = self.tiles_per_unit * self.num_units
        if self.grid >= 2**31:
            raise NotImplementedError(
                f"{self.grid} query tiles exceed the launch grid of 2**31 - 1: split the batch"
            )
        self.device = (
            torch.device("cpu") if target.simulated else torch.device("cuda", target.device_index)
        )
        p = problem
        self._has_optional = any(
            (
                p.varlen_q, p.varlen_k, p.has_seqused_q, p.has_seqused_k, p.alibi, p.dropout,
                p.page_size, p.cache_batch_idx, p.leftpad_k, p.sink,
            )
        )  # fmt: skip
        self._kernel: kernels.Kernel | None = None  # loaded, maybe compiled, by the first run

    def _prepare(self) -> kernels.Kernel:
        """Loads the kernel and makes all that runs share."""
        kernel = kernels.load(self.spec, self.target)
        p, device = self.problem, self.device
        self._out_like, self._out_axes = out_template(p, device)
        self._lse_like = template(p.lse_shape, torch.float32, device)
        self._block = kernel.layout.block()
        for name, value in self._values().items():
            self._block.set(name, value)
        slot = self._block.pointer_slot
        self._q, self._k, self._v, self._out = slot("q"), slot("k"), slot("v"), slot("out")
        self._lse, self._dmask = slot("softmax_lse"), slot("s_dmask")
        self._optional = tuple(slot(name) for name in _OPTIONAL)
        self._page_table_stride = self._block.scalar_slot("page_table_stride")
        self._last_table_row = self._block.scalar_slot("last_table_row")
        self._kernel = kernel
        return kernel

    def run(
        self, tensors: Tensors, cache: Cache | None = None, rng_state: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(out, softmax_lse or None, s_dmask or None) of tensors that fit the problem.

        page_table: (batch, or more with cache_batch_idx; seqlen_k / page_size). s_aux: float32.
        """
        kernel = self._kernel or self._prepare()
        out = torch.empty_like(self._out_like, memory_format=torch.contiguous_format)
        if self._out_axes is not None:
            out = out.permute(self._out_axes)
        q, k, v, *lengths_and_tables = tensors
        self._q.value = q.data_ptr()
        self._k.value = k.data_ptr()
        self._v.value = v.data_ptr()
        self._out.value = out.data_ptr()
        lse = dmask = None
        if self.problem.return_lse:
            lse = torch.empty_like(self._lse_like, memory_format=torch.contiguous_format)
            self._lse.value = lse.data_ptr()
        if self.problem.return_softmax:
            dmask = torch.zeros(self._dmask_shape(), dtype=out.dtype, device=self.device)
            self._dmask.value = dmask.data_ptr()
        optional = (*lengths_and_tables, rng_state)
        page_table = tensors.page_table
        if page_table is not None:
            self._page_table_stride.value = page_table.stride(0)
            self._last_table_row.value = page_table.shape[0] - 1
        if self._has_optional:
            for slot, tensor in zip(self._optional, optional, strict=True):
                if tensor is not None:
                    slot.value = tensor.data_ptr()
        kernel.launch(self.grid, self._block, (q, k, v, out, lse, dmask, *optional))
        return out, lse, dmask

    def describe(self) -> str:
        """Several lines for people: kernel, grid and order of work."""
        return (
            f"{self.spec.describe()}\n"
            f"grid: {self.grid} CTAs of {self.spec['num_threads']} threads, "
            f"{self.spec['smem_bytes']} bytes of shared memory; "
            f"{self.num_units} units of {self.tiles_per_unit} tiles, "
            f"{self._units_per_group()} units together"
        )

    def _dmask_shape(self) -> tuple[int, int, int, int]:
        p = self.problem
        rows, cols = (-(-n // DMASK_MULTIPLE) * DMASK_MULTIPLE for n in (p.seqlen_q, p.seqlen_k))
        return (p.batch, p.num_heads_q, rows, cols)

    def _units_per_group(self) -> int:
        """Query heads whose K and V fit the L2 budget; those of one K or V head share it."""
        p = self.problem
        k_bytes = p.seqlen_k * p.head_dim_qk * fwd_tiles.ELEM_BYTES * p.num_heads_k
        v_bytes = p.seqlen_k * p.head_dim_v * fwd_tiles.ELEM_BYTES * p.num_heads_v
        bytes_per_unit = max((k_bytes + v_bytes) / p.num_heads_q, 1.0)
        return max(1, min(self.num_units, int(L2_BUDGET_BYTES / bytes_per_unit)))

    def _values(self) -> dict[str, Any]:
        """The fields of FwdParams that the problem fixes."""
        p = self.problem
        out_batch, out_row, out_head = p.out_strides
        values: dict[str, Any] = {
            "out_batch_stride": out_batch,
            "out_row_stride": out_row,
            "out_head_stride": out_head,
            "lse_batch_stride": 0 if p.varlen_q else p.num_heads_q * p.seqlen_q,
            "lse_head_stride": p.total_q if p.varlen_q else p.seqlen_q,
            "num_heads_q": p.num_heads_q,
            "qhead_per_khead": p.num_heads_q // p.num_heads_k,
            "qhead_per_vhead": p.num_heads_q // p.num_heads_v,
            "tiles_per_unit": self.tiles_per_unit,
            "num_units": self.num_units,
            "units_per_group": self._units_per_group(),
            **union.values(p),
        }
        for name, strides in (("q", p.q_strides), ("k", p.k_strides), ("v", p.v_strides)):
            for axis, stride in zip(("batch", "row", "head"), strides, strict=True):
                values[f"{name}_{axis}_stride"] = stride
        if p.return_softmax:
            values["dmask_rows"], values["dmask_cols"] = self._dmask_shape()[2:]
        return values


def _work(problem: Problem, block_m: int) -> tuple[int, int]:
    """(tiles_per_unit, num_units) of tile_scheduler.cuh.

    Packed: enough tiles for any split of total_q into sequences.
    """
    if problem.varlen_q:
        return -(-problem.total_q // block_m) + problem.batch, problem.num_heads_q
    return -(-problem.seqlen_q // block_m), problem.batch * problem.num_heads_q
