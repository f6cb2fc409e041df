"""CachePlan, what a kernel tree makes of a CacheProblem, and the plan of the PyTorch reference.

Made by `kv_dispatch.py` through the backends, which are described in `backends.py`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .._common.ask.kv_problem import CacheProblem
from .._common.ask.out_layout import new_out

CacheResult = tuple[Tensor, Tensor | None]
"""(out, softmax_lse); None if the problem does not ask for it."""


class CachePlan(Protocol):
    """How one CacheProblem is run on one Target. Made once, run often, by one thread."""

    def run(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k_new: Tensor | None,
        v_new: Tensor | None,
        qv: Tensor | None,
        cache_seqlens: Tensor | int | None,
        cache_batch_idx: Tensor | None,
        cache_leftpad: Tensor | None,
        page_table: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k_new: Tensor | None,
        rotary_cos: Tensor | None,
        rotary_sin: Tensor | None,
        rotary_seqlens: Tensor | None,
        alibi_slopes: Tensor | None,
    ) -> CacheResult:
        """Write the new keys and values into the caches, then attend over these.

        All on torch's current stream of the device, without waiting for it. cache_seqlens: an int,
        which fits the cache, if the problem says one_length.
        """

    def describe(self) -> str:
        """What run() does, for people."""


class ReferenceCachePlan:
    """PyTorch operations (`reference/kvcache.py`). Reads lengths and tables to the host."""

    def __init__(self, problem: CacheProblem) -> None:
        self._problem = problem

    def run(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k_new: Tensor | None,
        v_new: Tensor | None,
        qv: Tensor | None,
        cache_seqlens: Tensor | int | None,
        cache_batch_idx: Tensor | None,
        cache_leftpad: Tensor | None,
        page_table: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k_new: Tensor | None,
        rotary_cos: Tensor | None,
        rotary_sin: Tensor | None,
        rotary_seqlens: Tensor | None,
        alibi_slopes: Tensor | None,
    ) -> CacheResult:
        from ..reference.kvcache import cache_reference

        forward = self._problem.forward
        if isinstance(cache_seqlens, int):
            cache_seqlens = q.new_full((forward.batch,), cache_seqlens, dtype=torch.int32)
        out, softmax_lse = cache_reference(
            q,
            k_cache,
            v_cache,
            k_new,
            v_new,
            qv,
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            cache_seqlens=cache_seqlens,
            cache_batch_idx=cache_batch_idx,
            cache_leftpad=cache_leftpad,
            page_table=page_table,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k_new=cu_seqlens_k_new,
            rotary_seqlens=rotary_seqlens,
            softmax_scale=forward.softmax_scale,
            causal=forward.causal,
            window_size=(forward.window_left, forward.window_right),
            attention_chunk=forward.attention_chunk,
            softcap=forward.softcap,
            rotary_interleaved=self._problem.rotary_interleaved,
            rotary_per_row=self._problem.rotary_per_row,
            alibi_slopes=alibi_slopes,
        )
        return out, softmax_lse if forward.return_lse else None

    def describe(self) -> str:
        return (
            "PyTorch operations (flash_attn_interface/reference/kvcache.py), a sequence at a time; "
            "lengths and tables are read to the host"
        )


class EmptyCachePlan:
    """Problems without a query or without a key: answered without a launch, on any device."""

    def __init__(self, problem: CacheProblem) -> None:
        self._problem = problem.forward

    def run(self, q: Tensor, *others: object) -> CacheResult:
        """out = 0 and softmax_lse = -inf, of which there may be no rows."""
        p = self._problem
        out = new_out(q, p.head_dim_v).zero_()
        if not p.return_lse:
            return out, None
        return out, q.new_full(p.lse_shape, float("-inf"), dtype=torch.float32)

    def describe(self) -> str:
        return "no query or no key: zeros without a launch"
