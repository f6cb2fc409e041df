"""Launches flash2_append (append.cu): what precedes attention over a cache.

Called by `kv.py` where a call has new keys or rotary tables.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd
from typing import Any

import torch
from torch import Tensor

from .._common.ask.call import Cache, Tensors
from .._common.ask.kv_problem import Append
from .._common.ask.problem import Problem, Target
from .._common.features import kv
from .._common.launch import kernels
from . import fwd_tiles
from .append_tiles import NUM_THREADS, append_spec

MAX_ITEMS = 2**31 - NUM_THREADS

# Tensor arguments that few problems have: fields of AppendParams.
_RARE = ("cache_batch_idx", "cu_seqlens_q", "cu_seqlens_k_new", "rotary_seqlens")


def attention_after_append(p: Problem) -> Problem:
    """The attention over the cache on what `AppendPlan.run` returns: rotated queries are dense."""
    if p.append is None or not p.append.rotary:
        return p
    head, row = p.head_dim_qk, p.num_heads_q * p.head_dim_qk
    return replace(
        p,
        q_strides=(0 if p.varlen_q else p.seqlen_q * row, row, head),
        vector_bytes=gcd(p.vector_bytes, head * fwd_tiles.ELEM_BYTES),
    )


class AppendPlan:
    """One problem on one target. Not shared between threads."""

    def __init__(self, problem: Problem, target: Target) -> None:
        p = self.problem = problem
        self.target = target
        new = self.new = problem.append or Append()
        self._new_rows = 0
        if new.appends:
            self._new_rows = new.total_new if new.varlen_new else p.batch * new.seqlen_new
        self._q_rows = p.total_q if new.rotary else 0
        heads = max(p.num_heads_q, p.num_heads_k, p.num_heads_v)
        if max(self._new_rows, self._q_rows) * heads >= MAX_ITEMS:
            raise NotImplementedError(
                f"{max(self._new_rows, self._q_rows)} rows of {heads} heads exceed {MAX_ITEMS}, "
                "what one launch appends: split the batch"
            )
        self.spec = append_spec(problem, target.arch, self._vector_bytes())
        self.device = (
            torch.device("cpu") if target.simulated else torch.device("cuda", target.device_index)
        )
        self._has_rare = p.cache_batch_idx or p.varlen_q or new.varlen_new or new.has_rotary_seqlens
        self.rotated_bytes = 0  # of the queries, contiguous
        if new.rotary:
            self.rotated_bytes = p.total_q * p.num_heads_q * p.head_dim_qk * fwd_tiles.ELEM_BYTES
        self._launches: dict[int, _Launch] = {}  # by the alignment of the rotary tables

    def run(self, tensors: Tensors, cache: Cache) -> tuple[Tensor, Tensor]:
        """(q or its rotated copy, seqused_k): seqused_k is int32 (batch,), keys after the append.

        Writes cache.k, rotated, and cache.v into the caches at positions cache.seqlens and up. Rows
        whose position, slot or page lies outside of the cache are dropped. Positions are absolute:
        no left padding is known here.
        """
        q = tensors.q
        seqused_k = torch.empty(self.problem.batch, dtype=torch.int32, device=self.device)
        rotated = torch.empty(q.shape, dtype=q.dtype, device=q.device) if self.rotated_bytes else q
        results = (rotated, seqused_k)
        self.launch(rotated.data_ptr(), seqused_k.data_ptr(), results, tensors, cache)
        return results

    def launch(
        self,
        q_rotated: int,
        seqused_k: int,
        results: tuple[Tensor, ...],
        tensors: Tensors,
        cache: Cache,
    ) -> None:
        """As `run`, with results at addresses, which lie in the tensors `results`."""
        q, k_cache, v_cache = tensors[:3]
        page_table, cache_batch_idx = tensors.page_table, tensors.cache_batch_idx
        k_new, v_new, _, rotary_cos, rotary_sin, cache_seqlens, *others = cache
        alignment = 0
        if rotary_cos is not None and rotary_sin is not None:
            cos, sin = rotary_cos.data_ptr(), rotary_sin.data_ptr()
            alignment = (cos | sin) & 15
            launch = self._launches.get(alignment) or self._prepare(alignment)
            launch.rotary_cos.value, launch.rotary_sin.value = cos, sin
            launch.q.value, launch.q_rotated.value = q.data_ptr(), q_rotated
        else:
            launch = self._launches.get(0) or self._prepare(0)
        launch.seqused_k.value = seqused_k
        launch.k_cache.value, launch.v_cache.value = k_cache.data_ptr(), v_cache.data_ptr()
        if k_new is not None and v_new is not None:
            launch.k_new.value, launch.v_new.value = k_new.data_ptr(), v_new.data_ptr()
        lengths = None
        if isinstance(cache_seqlens, Tensor):
            lengths = cache_seqlens
            launch.cache_seqlens.value = lengths.data_ptr()
        elif cache_seqlens is not None:
            launch.cached_keys.value = cache_seqlens
        if page_table is not None:
            launch.page_table.value = page_table.data_ptr()
            launch.page_table_stride.value = page_table.stride()[0]
            launch.last_table_row.value = page_table.shape[0] - 1
        rare = (cache_batch_idx, tensors.cu_seqlens_q, *others)
        if self._has_rare:
            for slot, tensor in zip(launch.rare, rare, strict=True):
                if tensor is not None:
                    slot.value = tensor.data_ptr()
        launch.kernel.launch(
            launch.grid,
            launch.block,
            (
                q, k_cache, v_cache, k_new, v_new, lengths, page_table, rotary_cos, rotary_sin,
                *rare, *results,
            ),
        )  # fmt: skip

    def describe(self) -> str:
        """One line for people."""
        return self.spec.describe()

    def _vector_bytes(self, table_alignment: int = 0) -> int:
        """The largest piece that every row consists of and is aligned to.

        table_alignment: low bits of the rotary tables' addresses.
        """
        p = self.problem
        size = gcd(
            p.vector_bytes,
            p.head_dim_qk * fwd_tiles.ELEM_BYTES,
            p.head_dim_v * fwd_tiles.ELEM_BYTES,
        )
        if self.new.appends:
            size = gcd(size, self.new.new_vector_bytes)
        if self.new.rotary:  # a row of the tables has rotary_dim bytes
            if self.new.rotary_interleaved:  # pieces of tables are half as long
                size = gcd(size, 2 * gcd(self.new.rotary_dim, table_alignment))
            else:
                size = gcd(size, self.new.rotary_dim, table_alignment)
        return size

    def _prepare(self, table_alignment: int) -> _Launch:
        spec = append_spec(self.problem, self.target.arch, self._vector_bytes(table_alignment))
        rows_per_cta = NUM_THREADS // int(spec["threads_per_row"])
        p = self.problem
        k_ctas = -(-self._new_rows * p.num_heads_k // rows_per_cta)
        v_ctas = -(-self._new_rows * p.num_heads_v // rows_per_cta)
        q_ctas = -(-self._q_rows * p.num_heads_q // rows_per_cta)
        grid = max(k_ctas + v_ctas + q_ctas, -(-p.batch // NUM_THREADS))
        launch = _Launch(kernels.load(spec, self.target), grid)
        for name, value in {**self._values(), "k_ctas": k_ctas, "v_ctas": v_ctas}.items():
            launch.block.set(name, value)
        self._launches[table_alignment] = launch
        return launch

    def _values(self) -> dict[str, Any]:
        """The fields of AppendParams that the problem fixes."""
        p, new = self.problem, self.new
        values: dict[str, Any] = {
            "new_rows": self._new_rows,
            "num_heads_k": p.num_heads_k,
            "num_heads_v": p.num_heads_v,
            "head_dim_qk": p.head_dim_qk,
            "head_dim_v": p.head_dim_v,
            "seqlen_q": p.seqlen_q,
            "q_rows": self._q_rows,
            "num_heads_q": p.num_heads_q,
            "batch": p.batch,
            "seqlen_k": p.seqlen_k,
            **kv.values(p),
            **kv.append_values(p),
        }
        for name, strides in (
            ("q", p.q_strides),
            ("k", p.k_strides),
            ("v", p.v_strides),
            ("k_new", new.k_new_strides),
            ("v_new", new.v_new_strides),
        ):
            for axis, stride in zip(("batch", "row", "head"), strides, strict=True):
                values[f"{name}_{axis}_stride"] = stride
        return values


class _Launch:
    """A loaded kernel with its parameter block."""

    def __init__(self, kernel: kernels.Kernel, grid: int) -> None:
        self.kernel, self.grid = kernel, grid
        self.block = kernel.layout.block()
        slot = self.block.pointer_slot
        self.q, self.q_rotated = slot("q"), slot("q_rotated")
        self.k_new, self.v_new = slot("k_new"), slot("v_new")
        self.k_cache, self.v_cache = slot("k_cache"), slot("v_cache")
        self.rotary_cos, self.rotary_sin = slot("rotary_cos"), slot("rotary_sin")
        self.cache_seqlens, self.seqused_k = slot("cache_seqlens"), slot("seqused_k")
        self.cached_keys = self.block.scalar_slot("cached_keys")
        self.page_table = slot("page_table")
        self.page_table_stride = self.block.scalar_slot("page_table_stride")
        self.last_table_row = self.block.scalar_slot("last_table_row")
        self.rare = tuple(slot(name) for name in _RARE)
