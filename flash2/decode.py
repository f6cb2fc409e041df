"""Launches flash2_decode (decode.cu), and flash2_combine where a merge of splits is too large for
it: parameters are filled once per problem, pointers patched per call.

Called by `kv.py`. Tiles: `decode_tiles.py`, splits: `decode_splits.py`. The large merge:
`combine.py`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .._common.ask.call import Cache, Tensors
from .._common.ask.problem import Problem, Target
from .._common.features import union
from .._common.launch import kernels, launch_counters
from .._common.launch.plan_values import out_template, template
from . import decode_merge, decode_splits, decode_tiles, fwd_tiles
from .combine import CombinePlan, CombineProblem, device_of

# What split choices assume when simulated: an A100.
SIMULATED_SMS = 108

# launch_counters has 32-bit ones, decode_output.cuh uses 64 bits.
COUNTERS_PER_TILE = 2

# Tensor arguments that few problems have: fields of DecodeParams.
_RARE = ("qv", "cache_batch_idx", "leftpad_k", "cu_seqlens_q", "alibi_slopes", "s_aux")


@cache
def num_sms(target: Target) -> int:
    """Streaming multiprocessors of the target."""
    if target.simulated:
        return SIMULATED_SMS
    return int(torch.cuda.get_device_properties(target.device_index).multi_processor_count)


def chosen_num_splits(
    problem: Problem, target: Target, tile: decode_tiles.DecodeTile | None = None
) -> int:
    """The number of splits that the problem asks for, or the best one."""
    if problem.num_splits:
        return problem.num_splits
    tile = tile or decode_tiles.chosen_tile(problem, target)
    sms = max(1, num_sms(target) - problem.sm_margin)
    return decode_splits.choose_num_splits(problem, tile, sms)


def _chosen_tile(p: Problem, target: Target) -> decode_tiles.DecodeTile:
    if p.num_splits == 1 and p.varlen_q:
        # The promise of one split: the longest of the other sequences changes nothing.
        p = replace(p, seqlen_q=1)
    return decode_tiles.chosen_tile(p, target)


class DecodePlan:
    """Attention of a problem's query rows over a cache: one launch, two for large merges.

    Not shared between threads. Making one compiles nothing. `run` loads the kernels at its first
    call, allocates outputs and workspace, patches the pointers and launches on torch's current
    stream.
    """

    def __init__(
        self,
        problem: Problem,
        target: Target,
        tile: decode_tiles.DecodeTile | None = None,
        reserved_bytes: int = 0,
    ) -> None:
        """reserved_bytes: to have at the end of the scratch memory, see `scratch`."""
        p = self.problem = problem
        self.target = target
        self.tile = tile or _chosen_tile(problem, target)
        self.num_splits = chosen_num_splits(problem, target, self.tile)
        self.heads_per_unit = decode_tiles.heads_per_unit(p)
        self.num_tiles = decode_tiles.num_tiles(p, self.tile.block_m)
        self.grid = self.num_tiles * (p.num_heads_q // self.heads_per_unit) * self.num_splits
        packed_rows = max(p.total_q, p.seqlen_q) * self.heads_per_unit
        if max(self.grid, packed_rows) >= 2**31:
            raise NotImplementedError(
                f"{self.grid} CTAs for {packed_rows} packed query rows: at most 2**31 - 1 of each "
                "are possible, split the batch"
            )
        # Results are (batch, rows, heads, head_dim_v); packed sequences are one of total_q rows.
        self.batch, self.rows = (1, p.total_q) if p.varlen_q else (p.batch, p.seqlen_q)
        self.spec = decode_tiles.decode_spec(p, target.arch, self.num_splits > 1, self.tile)
        self.device = device_of(target)
        self.num_counters = (
            COUNTERS_PER_TILE * self.num_tiles * (p.num_heads_q // self.heads_per_unit)
        )
        facts = (p, self.tile, self.num_splits, num_sms(target))
        self.num_mergers = decode_merge.num_mergers(*facts)
        self.merges_in_place = (
            self.num_splits > 1
            and self.num_counters <= launch_counters.MAX_COUNTERS
            and decode_merge.merges_in_place(*facts)
        )
        merged_later = self.num_splits > 1 and not self.merges_in_place
        self.combine = self._combine_plan() if merged_later else None
        self._reserved_bytes = reserved_bytes
        self._has_rare = p.qv or p.cache_batch_idx or p.leftpad_k or p.varlen_q or p.alibi or p.sink
        self._kernel: kernels.Kernel | None = None  # loaded, maybe compiled, by the first run

    def _combine_plan(self) -> CombinePlan:
        p = self.problem
        split, batch, row, head = self._partial_strides()
        return CombinePlan(
            CombineProblem(
                self.num_splits,
                self.batch,
                self.rows,
                p.num_heads_q,
                p.head_dim_v,
                p.dtype,
                partial_strides=(split, batch, row, head),
                lse_partial_strides=self._lse_strides(),
                out_strides=p.out_strides,
                wide_loads=True,
                wide_stores=p.head_dim_v % 4 == 0,
                return_lse=p.return_lse,
                sink=p.sink,
            ),
            self.target,
        )

    def _partial_strides(self) -> tuple[int, int, int, int]:
        """(split, batch, row, head) of the splits' O: (num_splits, batch, heads, rows, columns)."""
        columns = decode_tiles.partial_columns(self.problem.head_dim_v)
        head = self.rows * columns
        batch = self.problem.num_heads_q * head
        return self.batch * batch, batch, columns, head

    def _lse_strides(self) -> tuple[int, int, int]:
        """(split, batch, head) of (num_splits, batch, heads, rows)."""
        batch = self.problem.num_heads_q * self.rows
        return self.batch * batch, batch, self.rows

    def _prepare(self) -> kernels.Kernel:
        """Loads the kernel and makes all that runs share."""
        p = self.problem
        kernel = kernels.load(self.spec, self.target)
        if self.combine is not None:
            self.combine.prepare()
        self._own_counters: Tensor | None = None
        if self.merges_in_place and self.target.simulated:
            self._own_counters = torch.zeros(self.num_counters, dtype=torch.int32)
        elif self.merges_in_place:
            launch_counters.prepare(self.target.device_index)
        out_numel = lse_numel = 0
        if self.num_splits > 1:
            out_numel = self.num_splits * self._partial_strides()[0]
            lse_numel = -(-self.num_splits * self._lse_strides()[0] // 4) * 4
        self._lse_offset_bytes = 4 * out_numel
        self.reserved_offset_bytes = 4 * (out_numel + lse_numel)
        scratch_numel = out_numel + lse_numel + -(-self._reserved_bytes // 4)
        self._scratch_like = template((scratch_numel,), torch.float32, self.device)
        self._out_like, self._out_axes = out_template(p, self.device)
        self._lse_like = template(p.lse_shape, torch.float32, self.device)
        self._block = kernel.layout.block()
        for name, value in self._values().items():
            self._block.set(name, value)
        slot = self._block.pointer_slot
        self._q, self._k, self._v = slot("q"), slot("k"), slot("v")
        self._out, self._lse = slot("out"), slot("softmax_lse")
        self._merged_out, self._merged_lse = slot("merged_out"), slot("merged_lse")
        self._counters = slot("split_counters")
        self._seqused_k, self._page_table = slot("seqused_k"), slot("page_table")
        self._seqlen_k = self._block.scalar_slot("seqlen_k")
        self._rare = tuple(slot(name) for name in _RARE)
        self._page_table_stride = self._block.scalar_slot("page_table_stride")
        self._last_table_row = self._block.scalar_slot("last_table_row")
        self._kernel = kernel
        return kernel

    def run(self, tensors: Tensors, cache: Cache | None = None) -> tuple[Tensor, Tensor | None]:
        """(out, softmax_lse or None) of tensors that fit the problem.

        cache.seqlens: None where all of the capacity is valid; an int, for all sequences, where the
        problem says one_length. page_table: (batch, or more with cache_batch_idx; pages of a
        sequence).
        """
        scratch = self.scratch() if self.num_splits > 1 else None
        q, cache = tensors.q, cache or Cache()
        seqused_k = cache.seqlens
        lengths, address = None, 0
        if isinstance(seqused_k, Tensor):
            lengths, address = seqused_k, seqused_k.data_ptr()
        elif seqused_k is not None:
            if self._kernel is None:
                self._prepare()
            self._seqlen_k.value = seqused_k
        return self.launch(q.data_ptr(), address, (q, lengths), scratch, tensors, cache.qv)

    def scratch(self) -> Tensor:
        """Memory for one `launch`: the partial results of splits, and behind
        `reserved_offset_bytes`, which is a multiple of 16, what the caller asked for."""
        if self._kernel is None:
            self._prepare()
        return torch.empty_like(self._scratch_like)

    def launch(
        self,
        q: int,
        seqused_k: int,
        memory: tuple[Tensor | None, ...],
        scratch: Tensor | None,
        tensors: Tensors,
        qv: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `run`, with q and seqused_k at addresses, which lie in the tensors `memory`.

        scratch: from `scratch()`; not needed without splits.
        """
        kernel = self._kernel or self._prepare()
        _, k_cache, v_cache, cu_seqlens_q, _, _, _, alibi_slopes, *of_cache = tensors
        page_table, cache_batch_idx, leftpad_k, s_aux = of_cache
        self._q.value, self._seqused_k.value = q, seqused_k
        self._k.value, self._v.value = k_cache.data_ptr(), v_cache.data_ptr()
        if page_table is not None:
            self._page_table.value = page_table.data_ptr()
            self._page_table_stride.value = page_table.stride()[0]
            self._last_table_row.value = page_table.shape[0] - 1
        rare = (qv, cache_batch_idx, leftpad_k, cu_seqlens_q, alibi_slopes, s_aux)
        if self._has_rare:
            for slot, tensor in zip(self._rare, rare, strict=True):
                if tensor is not None:
                    slot.value = tensor.data_ptr()
        inputs = (*memory, k_cache, v_cache, page_table, *rare)
        out = torch.empty_like(self._out_like, memory_format=torch.contiguous_format)
        if self._out_axes is not None:
            out = out.permute(self._out_axes)
        lse = None
        if self.problem.return_lse and self.combine is None:
            lse = torch.empty_like(self._lse_like, memory_format=torch.contiguous_format)
        if self.num_splits == 1:
            self._out.value = out.data_ptr()
            if lse is not None:
                self._lse.value = lse.data_ptr()
            kernel.launch(self.grid, self._block, (*inputs, out, lse))
            return out, lse
        assert scratch is not None
        partial = scratch.data_ptr()
        lse_partial = partial + self._lse_offset_bytes
        self._out.value, self._lse.value = partial, lse_partial
        if self.combine is not None:
            kernel.launch(self.grid, self._block, (*inputs, scratch))
            lse = self.combine.launch(partial, lse_partial, (scratch,), out, s_aux)
            return out, lse[0] if lse is not None and self.problem.varlen_q else lse
        self._merged_out.value = out.data_ptr()
        if lse is not None:
            self._merged_lse.value = lse.data_ptr()
        counters = self._own_counters
        if counters is None:
            address = launch_counters.address(self.target.device_index, self.num_counters)
            if address == 0:
                counters = torch.zeros(self.num_counters, dtype=torch.int32, device=self.device)
        self._counters.value = address if counters is None else counters.data_ptr()
        try:
            kernel.launch(self.grid, self._block, (*inputs, out, lse, scratch, counters))
        except BaseException:  # a simulated launch may have stopped anywhere
            if self._own_counters is not None:
                self._own_counters.zero_()
            raise
        return out, lse

    def describe(self) -> str:
        """Several lines for people: kernels, grids and splits."""
        p = self.problem
        lines = [
            self.spec.describe(),
            f"grid: {self.grid} CTAs of {self.spec['num_threads']} threads, "
            f"{self.spec['smem_bytes']} bytes of shared memory; keys in {self.num_splits} "
            f"splits, {self.num_tiles} tiles of {self.tile.block_m} packed query rows, "
            f"{p.num_heads_q // self.heads_per_unit} units of {self.heads_per_unit} query heads",
        ]
        if self.merges_in_place:
            lines.append(f"splits: merged by the last {self.num_mergers} CTAs of each tile")
        if self.combine is not None:
            lines.append(self.combine.describe())
        return "\n".join(lines)

    def _values(self) -> dict[str, Any]:
        """The fields of DecodeParams that the problem fixes."""
        p = self.problem
        merged_batch, merged_row, merged_head = p.out_strides
        out_split, out_batch, out_row, out_head = 0, merged_batch, merged_row, merged_head
        if self.num_splits > 1:
            out_split, out_batch, out_row, out_head = self._partial_strides()
        lse_split, lse_batch, lse_head = self._lse_strides()
        if p.varlen_q:
            out_batch = lse_batch = merged_batch = 0
        values: dict[str, Any] = {
            "out_split_stride": out_split,
            "out_batch_stride": out_batch,
            "out_row_stride": out_row,
            "out_head_stride": out_head,
            "merged_batch_stride": merged_batch,
            "merged_row_stride": merged_row,
            "merged_head_stride": merged_head,
            "lse_split_stride": lse_split,
            "lse_batch_stride": lse_batch,
            "lse_head_stride": lse_head,
            "num_units": p.num_heads_q // self.heads_per_unit,
            "heads_per_unit": self.heads_per_unit,
            "num_tiles": self.num_tiles,
            "tiles_per_sequence": max(1, self.num_tiles // p.batch),
            "num_splits": self.num_splits,
            "num_mergers": self.num_mergers,
            "refill_first": int(self.grid <= num_sms(self.target)),
            **union.values(p),
            "by_units": fwd_tiles.division(p.num_heads_q // self.heads_per_unit),
            "by_heads_per_unit": fwd_tiles.division(self.heads_per_unit),
            "by_tiles": fwd_tiles.division(max(1, self.num_tiles)),
            "by_tiles_per_sequence": fwd_tiles.division(max(1, self.num_tiles // p.batch)),
            "by_splits": fwd_tiles.division(self.num_splits),
            "by_khead": fwd_tiles.division(p.qhead_per_khead),
            "by_vhead": fwd_tiles.division(p.qhead_per_vhead),
        }
        by_name = {"q": p.q_strides, "k": p.k_strides, "v": p.v_strides, "qv": p.qv_strides}
        for name, strides in by_name.items():
            for axis, stride in zip(("batch", "row", "head"), strides, strict=True):
                values[f"{name}_{axis}_stride"] = stride
        return values
