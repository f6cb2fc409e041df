"""Launches hopper_fwd (fwd.cu) or hopper_fwd_wide (fwd_wide.cu): fills their parameters once per
problem, patches addresses per call.

Called by `flash_attn_interface/call/dispatch.py`, which keeps one plan per problem and thread. Tile
choices: `fwd_tiles.py`. Tensor maps: `tensor_maps.py`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from flash_attn_interface._common.ask.call import Tensors
from flash_attn_interface._common.ask.problem import Problem, Target
from flash_attn_interface._common.features import union
from flash_attn_interface._common.launch import kernels, launch_counters, tensor_map
from flash_attn_interface._common.launch.plan_values import out_template, template

from . import fwd_tiles, tensor_maps, wide_tiles
from .gqa_packing import stored_heads
from .tensor_maps import MapPlan

# K and V of the units that run together should stay in L2 (50 MB), with room for Q and O.
L2_BUDGET_BYTES = 32 * 2**20
# CTAs, where no device can be asked: of an H100 SXM, and few, so that each draws several tiles.
DEFAULT_SMS, SIMULATED_SMS = fwd_tiles.SMS, 2

# Tensors that a problem may lack: fields of HopperFwdParams.
_OPTIONAL = (*Tensors._fields[3:8], "rng_state", "s_aux")


class ForwardPlan:
    """One problem on one target: kernel, grid and a parameter block. Not shared between threads.

    Making one compiles nothing and needs no GPU. `run` loads the kernel at its first call,
    allocates the outputs, patches the addresses and launches on torch's current stream.
    """

    def __init__(
        self, problem: Problem, target: Target, tile: fwd_tiles.ForwardTile | None = None
    ) -> None:
        """tile: instead of the tables' choice."""
        p = problem
        self.problem = p
        self.target = target
        self.spec = fwd_tiles.forward_spec(p, target.arch, tile, target.gpu)
        self.gqa_group = int(self.spec["gqa_group"])
        self.tiles_per_unit, self.num_units = _work(p, int(self.spec["query_rows"]), self.gqa_group)
        self.num_tiles = self.tiles_per_unit * self.num_units
        self.units_per_group = _units_per_group(p, self.num_units, self.gqa_group)
        if self.num_tiles >= 2**30:
            raise NotImplementedError(
                f"{self.num_tiles} query tiles exceed the scheduler's 2**30: split the batch"
            )
        self.grid = max(1, min(_num_sms(target) - p.sm_margin, self.num_tiles))
        self.device = (
            torch.device("cpu") if target.simulated else torch.device("cuda", target.device_index)
        )
        self._has_optional = any(
            (p.varlen_q, p.varlen_k, p.has_seqused_q, p.has_seqused_k, p.alibi, p.dropout, p.sink)
        )
        self._kernel: kernels.Kernel | None = None  # loaded, maybe compiled, by the first run

    def _prepare(self, q: Tensor, k: Tensor, v: Tensor) -> kernels.Kernel:
        """Loads the kernel and makes all that runs share."""
        kernel = kernels.load(self.spec, self.target)
        p, device = self.problem, self.device
        self._out_like, self._out_axes = out_template(p, device)
        self._lse_like = template(p.lse_shape, torch.float32, device)
        self._block = kernel.layout.block()
        for name, value in self._values().items():
            self._block.set(name, value)
        kind: tensor_map.Kind = "simulated" if self.target.simulated else "device"
        self._set_q, self._set_k, self._set_v, self._set_out = (
            tensor_maps.address_setter(self._block, plan, kind, tensor.data_ptr())
            for plan, tensor in zip(self.map_plans(), (q, k, v, q), strict=True)
        )
        slot = self._block.pointer_slot
        self._lse, self._counter = slot("softmax_lse"), slot("tile_counter")
        if self.gqa_group > 1 or self.spec.entry == wide_tiles.ENTRY:  # stored without TMA
            self._set_out = partial(setattr, slot("out"), "value")
        self._optional = tuple(slot(name) for name in _OPTIONAL)
        self._own_counter: Tensor | None = None
        if self.target.simulated:
            self._own_counter = torch.zeros(1, dtype=torch.int32)
            self._counter.value = self._own_counter.data_ptr()
        else:
            launch_counters.prepare(self.target.device_index)
        self._kernel = kernel
        return kernel

    def run(
        self, tensors: Tensors, cache: None = None, rng_state: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, None]:
        """(out, softmax_lse or None, None) of tensors that fit the problem."""
        q, k, v = tensors[:3]
        kernel = self._kernel or self._prepare(q, k, v)
        out = torch.empty_like(self._out_like, memory_format=torch.contiguous_format)
        if self._out_axes is not None:
            out = out.permute(self._out_axes)
        self._set_q(q.data_ptr())
        self._set_k(k.data_ptr())
        self._set_v(v.data_ptr())
        self._set_out(out.data_ptr())
        lse = None
        if self.problem.return_lse:
            lse = torch.empty_like(self._lse_like, memory_format=torch.contiguous_format)
            self._lse.value = lse.data_ptr()
        optional = (*tensors[3:8], rng_state, tensors.s_aux)
        if self._has_optional:
            for slot, tensor in zip(self._optional, optional, strict=True):
                if tensor is not None:
                    slot.value = tensor.data_ptr()
        if self._own_counter is None:
            self._counter.value = launch_counters.address(self.target.device_index, 1)
        try:
            kernel.launch(self.grid, self._block, (q, k, v, out, lse, self._own_counter, *optional))
        except BaseException:  # a simulated launch may have stopped anywhere
            if self._own_counter is not None:
                self._own_counter.zero_()
            raise
        return out, lse, None

    def describe(self) -> str:
        """Several lines for people: kernel, grid and order of work."""
        return (
            f"{self.spec.describe()}\n"
            f"grid: {self.grid} CTAs of {self.spec['num_threads']} threads, "
            f"{self.spec['smem_bytes']} bytes of shared memory, draw {self.num_tiles} tiles; "
            f"{self.num_units} units of {self.tiles_per_unit} tiles, "
            f"{self.units_per_group} units together"
        )

    def map_plans(self) -> tuple[MapPlan, MapPlan, MapPlan, MapPlan]:
        """Of q, k, v and out."""
        p = self.problem
        rows_q = (1, p.total_q) if p.varlen_q else (p.batch, p.seqlen_q)
        rows_k = (1, p.total_k) if p.varlen_k else (p.batch, p.seqlen_k)
        swizzle_qk, swizzle_v = int(self.spec["swizzle_qk"]), int(self.spec["swizzle_v"])
        block_n = int(self.spec["block_n"])
        ragged_q = p.total_q if p.varlen_q else 0
        ragged_k = tensor_maps.ragged_rows(p, p.k_strides)
        ragged_v = tensor_maps.ragged_rows(p, p.v_strides)
        heads_k, heads_v = stored_heads(p)
        return (
            tensor_maps.plan_map(
                "q_map", p.dtype, p.head_dim_qk, (*rows_q, p.num_heads_q), p.q_strides,
                ragged_rows=ragged_q, box_rows=fwd_tiles.WG_ROWS, swizzle_bytes=swizzle_qk,
            )
            if self.gqa_group == 1
            else tensor_maps.plan_packed_heads_map(
                "q_map", p.dtype, p.head_dim_qk, (*rows_q, p.num_heads_q), p.q_strides,
                group=self.gqa_group, swizzle_bytes=swizzle_qk,
            ),
            tensor_maps.plan_map(
                "k_map", p.dtype, p.head_dim_qk, (*rows_k, heads_k), p.k_strides,
                ragged_rows=ragged_k, box_rows=block_n, swizzle_bytes=swizzle_qk,
            ),
            tensor_maps.plan_map(
                "v_map", p.dtype, p.head_dim_v, (*rows_k, heads_v), p.v_strides,
                ragged_rows=ragged_v, box_rows=block_n, swizzle_bytes=swizzle_v,
            ),
            tensor_maps.plan_map(
                "out_map", p.dtype, p.head_dim_v, (*rows_q, p.num_heads_q), p.out_strides,
                ragged_rows=ragged_q, box_rows=fwd_tiles.WG_ROWS, swizzle_bytes=swizzle_v,
            ),
        )  # fmt: skip

    def _values(self) -> dict[str, Any]:
        """The fields of HopperFwdParams that the problem fixes."""
        p = self.problem
        heads_k, heads_v = stored_heads(p)
        out_strides = zip(("batch", "row", "head"), self.problem.out_strides, strict=True)
        values: dict[str, Any] = {
            "k_batch_rows": tensor_maps.batch_rows(p, p.k_strides),
            "v_batch_rows": tensor_maps.batch_rows(p, p.v_strides),
            "lse_batch_stride": 0 if p.varlen_q else p.num_heads_q * p.seqlen_q,
            "lse_head_stride": p.total_q if p.varlen_q else p.seqlen_q,
            "num_heads_q": p.num_heads_q,
            "qhead_per_khead": p.num_heads_q // heads_k,
            "qhead_per_vhead": p.num_heads_q // heads_v,
            "num_tiles": self.num_tiles,
            "tiles_per_unit": self.tiles_per_unit,
            "num_units": self.num_units,
            "units_per_group": self.units_per_group,
            **union.values(p),
            **{f"out_{axis}_stride": stride for axis, stride in out_strides},
        }
        return values


def _work(problem: Problem, query_rows: int, gqa_group: int) -> tuple[int, int]:
    """(tiles_per_unit, num_units) of tile_scheduler.cuh.

    Packed: enough tiles for any split of total_q into sequences.
    """
    units = problem.num_heads_q // gqa_group
    if problem.varlen_q:
        return -(-problem.total_q // query_rows) + problem.batch, units
    return -(-problem.seqlen_q // query_rows), problem.batch * units


def _units_per_group(problem: Problem, num_units: int, gqa_group: int) -> int:
    """Query heads, or groups of heads that share tiles, worked on together.

    Heads of one K or V head always are. Causal tiles differ in length: many heads together let the
    long ones come first, as long as their K and V fit in L2. A ragged last group would cost a
    second tail, 4-6 % (docs/performance/), so groups divide the units where that is possible.
    """
    p = problem
    shared = max(p.num_heads_q // heads for heads in stored_heads(p)) // gqa_group
    if not p.causal:
        return min(shared, num_units) if p.varlen_q else 1
    rows = min(p.seqlen_k, p.total_k)
    bytes_per_unit = rows * (p.head_dim_qk + p.head_dim_v) * fwd_tiles.ELEM_BYTES / shared
    limit = max(shared, min(num_units, int(L2_BUDGET_BYTES / max(bytes_per_unit, 1.0))))
    divisors = [g for g in range(shared, limit + 1, shared) if num_units % g == 0]
    return max(divisors, default=limit)


def _num_sms(target: Target) -> int:
    if target.simulated:
        return SIMULATED_SMS
    if target.device_index < torch.cuda.device_count():
        return int(torch.cuda.get_device_properties(target.device_index).multi_processor_count)
    return DEFAULT_SMS
