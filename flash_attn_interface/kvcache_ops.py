"""Attention over a key and value cache as custom operations, for torch.compile and torch.export.

`kvcache.py` calls `traced` in place of `kvcache_dispatch.attend`, with the same arguments. There
are two operations, because a compiler copies whatever it cannot prove safe to mutate: the one
without new keys and values leaves the caches alone, and says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common.check_cache import check_cache_length
from ._common.check_values import cache_flags, non_negative, window_pair
from ._common.out_layout import new_out
from .cache_plans import CacheResult
from .custom_op import custom_op
from .kvcache_dispatch import attend

_REST = (
    "Tensor? cache_seqlens, Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? page_table, "
    "Tensor? cu_seqlens_q, SymInt max_seqlen_q, float? softmax_scale, bool causal, "
    "SymInt window_size_left, SymInt window_size_right, SymInt attention_chunk, float softcap, "
    "Tensor? alibi_slopes, SymInt num_splits, SymInt sm_margin) -> (Tensor, Tensor)"
)


@custom_op(
    "flash_attn_interface::append_and_attend",
    "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor? qv, "
    "Tensor? rotary_cos, Tensor? rotary_sin, Tensor? rotary_seqlens, bool rotary_interleaved, "
    f"Tensor? cu_seqlens_k_new, {_REST}",
)
def append_and_attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_seqlens: Tensor | None,
    rotary_interleaved: bool,
    cu_seqlens_k_new: Tensor | None,
    cache_seqlens: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    page_table: Tensor | None,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    attention_chunk: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    num_splits: int,
    sm_margin: int,
) -> tuple[Tensor, Tensor]:
    """`kvcache_dispatch.attend` with new keys and values; writes them into the caches."""
    return _complete(
        attend(
            q, k_cache, v_cache, k, v, qv, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx,
            cache_leftpad, page_table, cu_seqlens_q, cu_seqlens_k_new, max_seqlen_q,
            rotary_seqlens, softmax_scale, causal, (window_size_left, window_size_right),
            attention_chunk, softcap, rotary_interleaved, alibi_slopes, num_splits, sm_margin,
            True,
        )
    )  # fmt: skip


@append_and_attend.register_fake
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor]:
    return _fake_results(q, v_cache)


@custom_op(
    "flash_attn_interface::attend_over_cache",
    f"(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? qv, {_REST}",
)
def attend_over_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    qv: Tensor | None,
    cache_seqlens: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    page_table: Tensor | None,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    attention_chunk: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    num_splits: int,
    sm_margin: int,
) -> tuple[Tensor, Tensor]:
    """`kvcache_dispatch.attend` without new keys and values, hence without rotation."""
    return _complete(
        attend(
            q, k_cache, v_cache, None, None, qv, None, None, cache_seqlens, cache_batch_idx,
            cache_leftpad, page_table, cu_seqlens_q, None, max_seqlen_q, None, softmax_scale,
            causal, (window_size_left, window_size_right), attention_chunk, softcap, True,
            alibi_slopes, num_splits, sm_margin, True,
        )
    )  # fmt: skip


@attend_over_cache.register_fake
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor]:
    return _fake_results(q, v_cache)


def traced(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    qv: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    page_table: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k_new: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    rotary_seqlens: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    attention_chunk: int,
    softcap: float,
    rotary_interleaved: bool,
    alibi_slopes: Tensor | None,
    num_splits: int,
    sm_margin: int,
    return_lse: bool,
) -> CacheResult:
    """`kvcache_dispatch.attend` while a compiler traces: nothing here looks at data or plans."""
    left, right = window_pair(window_size)
    causal, rotary_interleaved, return_lse = cache_flags(causal, rotary_interleaved, return_lse)
    if cache_seqlens is not None and not isinstance(cache_seqlens, Tensor):
        batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        room = _room(k_cache, k, page_table)
        if not 0 <= non_negative("cache_seqlens", cache_seqlens) <= room:
            check_cache_length(int(cache_seqlens), int(room))  # the error, of plain numbers
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    if max_seqlen_q is None or cu_seqlens_q is None:
        longest = 0  # not ragged, it is not read; or an error that the operation raises
    else:  # reading a tensor would break the graph; the rows of q bound it as well
        longest = q.shape[0] if isinstance(max_seqlen_q, Tensor) else max_seqlen_q
    common = (
        cache_seqlens, cache_batch_idx, cache_leftpad, page_table, cu_seqlens_q, longest,
        softmax_scale, causal, left, right, attention_chunk, softcap, alibi_slopes, num_splits,
        sm_margin,
    )  # fmt: skip
    if k is not None or v is not None:
        if k is None or v is None:
            raise ValueError("k and v are new rows of both caches: give both or none")
        out, softmax_lse = append_and_attend(
            q, k_cache, v_cache, k, v, qv, rotary_cos, rotary_sin, rotary_seqlens,
            rotary_interleaved, cu_seqlens_k_new, *common,
        )  # fmt: skip
    else:
        if rotary_cos is not None or rotary_sin is not None:
            raise ValueError("rotary_cos and rotary_sin are given without k and v")
        out, softmax_lse = attend_over_cache(q, k_cache, v_cache, qv, *common)
    return out, softmax_lse if return_lse else None


def _room(k_cache: Tensor, k: Tensor | None, page_table: Tensor | None) -> int:
    """Rows of a sequence's cache beside the new ones, as far as shapes tell."""
    rows = k_cache.shape[1] * (1 if page_table is None else page_table.shape[-1])
    return rows - (k.shape[1] if k is not None and k.ndim == 4 else 0)


def _complete(result: CacheResult) -> tuple[Tensor, Tensor]:
    out, softmax_lse = result
    assert softmax_lse is not None
    return out, softmax_lse.contiguous()


def _fake_results(q: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes of the results, whatever the backend."""
    *rows, num_heads_q, _ = q.shape
    lse_shape = (num_heads_q, *rows) if len(rows) == 1 else (rows[0], num_heads_q, rows[1])
    return (
        new_out(q, v_cache.shape[-1]),
        q.new_empty(lse_shape, dtype=torch.float32),
    )
