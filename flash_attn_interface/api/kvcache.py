"""Decoding: attention over a key and value cache, with FlashAttention-3's signatures.

FlashAttention-2's is in `fa2_kvcache.py`. Parameter names, order and defaults are a contract with
callers. Errors come from `common/ask/check_kv.py`; docs/decoding.md is the guide for users.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._common.ask.call import DENSE, Cache, Call, Options, Sequences, Tensors
from .._common.ask.check_tensors import check_int32_vector, require_tensor
from .._common.ask.check_values import flag, non_negative, optional_flag
from ..call.autograd import attention
from .fa3 import _refuse_fa3_features

WindowSize = Sequence[int] | Tensor


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
    """Append new keys and values to a cache, in place, and attend over what it then holds.

    For inference: there are no gradients. Nothing waits for the GPU, so that calls can be captured
    in CUDA graphs and replayed with other lengths and page tables. cache_seqlens is read, never
    written: add the number of new rows before the next call. Values that point outside the cache
    are clamped on a GPU, an error on the CPU, and an error everywhere with
    FLASH_ATTN_INTERFACE_CHECK_CACHE=1.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim_qk), float16 or bfloat16; with cu_seqlens_q
            (total_q, num_heads_q, head_dim_qk).
        k_cache: (batch, capacity, num_heads_k, head_dim_qk), or more sequences than the batch; with
            page_table (num_pages, page_size, num_heads_k, head_dim_qk), any page_size >= 1.
        v_cache: likewise with num_heads_v and head_dim_v, which need not equal k_cache's.
        k, v: new rows, (batch, seqlen_new, num_heads, head_dim) or, with cu_seqlens_k_new,
            (total_new, num_heads, head_dim). Written behind the first cache_seqlens rows.
        qv: (batch, seqlen_q, num_heads_q, head_dim_v): a second query, which is multiplied with v:
            scores are softmax_scale * (q k^T + qv v^T), as in absorbed multi-head latent attention,
            where q and k hold what is rotated. Ragged as q. Never rotated.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), dtype of q, at least as many positions
            as a sequence has room for. New row t of k is rotated, before it is stored, by position
            cache_seqlens + t. Row t of q by the same if the call is causal, windowed or chunked,
            else each row by cache_seqlens. Only with k and v.
        cache_seqlens: int32 (batch,), the valid rows before the append, or one int for all. None:
            all of the capacity.
        cache_batch_idx: int32 (batch,): the cache's sequence, or row of page_table, for each of q.
        cache_leftpad: int32 (batch,): keys before this row are not seen; masks count from there.
        page_table: int32 (batch, pages of a sequence). Row r of sequence b is row r % page_size of
            page page_table[b, r // page_size]. Entries past the valid rows may be anything.
        cu_seqlens_q: int32 (batch + 1,): q is ragged, and max_seqlen_q its longest sequence.
        cu_seqlens_k_new: int32 (batch + 1,): k and v are ragged.
        max_seqlen_q: needed with cu_seqlens_q.
        rotary_seqlens: int32 (batch,): positions to rotate from, in place of cache_seqlens. Ignored
            without rotary_cos.
        q_descale, k_descale, v_descale: must be None, there is no fp8 yet.
        softmax_scale: None means head_dim_qk ** -0.5, with qv (head_dim_qk + head_dim_v) ** -0.5.
        causal, window_size, attention_chunk, softcap: as in `flash_attn_func`, seqlen_k being the
            valid rows after the append less cache_leftpad.
        rotary_interleaved: pairs of lanes are (0, 1), (2, 3)...; else (t, t + rotary_dim / 2).
        scheduler_metadata: from `get_scheduler_metadata`; only its shape is looked at.
        num_splits: parts of the keys that are attended to separately and then merged, up to 256.
            0: chosen from the shapes and the GPU, never from the lengths. 1: results do not depend
            on what else is in the batch; they are bitwise those of the Ampere tree's
            `flash_attn_func` over the same keys, where it has head_dim_v and no qv is given.
        pack_gqa: accepted and ignored.
        sm_margin: SMs to leave to others when the number of splits is chosen.
        return_softmax_lse: also return softmax_lse and FlashAttention-3's two accumulators.
        s_aux: attention sinks, (num_heads_q,), float32, bfloat16 or float16: a logit per query head
            that takes part in the softmax's denominator and has no value, after scale, softcap and
            masks. softmax_lse contains it, and a query that sees no key has softmax_lse s_aux.
            -inf is no sink. There is no gradient.

    Returns:
        out, (batch, seqlen_q, num_heads_q, head_dim_v) or (total_q, num_heads_q, head_dim_v). With
        return_softmax_lse (out, softmax_lse, out_accum, softmax_lse_accum): softmax_lse is float32
        (batch, num_heads_q, seqlen_q) or (num_heads_q, total_q); the accumulators of the splits are
        empty tensors, since they are merged before the call returns.

    Raises:
        TypeError, ValueError, NotImplementedError: as `flash_attn_func`.
    """
    if q_descale is not None or k_descale is not None or v_descale is not None:
        _refuse_fa3_features(None, q_descale, k_descale, v_descale)
    if pack_gqa is not None:
        optional_flag("pack_gqa", pack_gqa)
    if scheduler_metadata is not None:
        _check_scheduler_metadata(scheduler_metadata, q, cu_seqlens_q)
    cache = Cache(
        k, v, qv, rotary_cos, rotary_sin, cache_seqlens, cu_seqlens_k_new, rotary_seqlens
    )  # fmt: skip
    out, softmax_lse, _ = attention(
        Call(
            Tensors(
                q, k_cache, v_cache, cu_seqlens_q, None, None, None, None, page_table,
                cache_batch_idx, cache_leftpad, s_aux,
            ),
            DENSE if max_seqlen_q is None else Sequences(max_seqlen_q),
            cache,
            Options(
                softmax_scale, causal, window_size, attention_chunk, softcap, 0.0,
                return_softmax_lse, False, False, None, None, sm_margin, None, num_splits,
                rotary_interleaved,
            ),
        )
    )  # fmt: skip
    if softmax_lse is None:
        return out
    return out, softmax_lse, softmax_lse.new_empty(0), softmax_lse.new_empty(0)


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """A tensor to pass as scheduler_metadata, for programs written for FlashAttention-3.

    Our kernels need none: the number of splits follows from shapes and the GPU alone, and work is
    divided on the device. So the contents are zeros, which no kernel reads, and every argument but
    batch_size and cache_seqlens is ignored, once flags have been seen to be flags.

    Args:
        batch_size: sequences of the calls it is for.
        cache_seqlens: int32 (batch_size,); gives the device.
        Others: as in FlashAttention-3.

    Returns:
        int32 (batch_size + 1,), on the device of cache_seqlens.

    Raises:
        TypeError, ValueError: for batch_size, cache_seqlens and flags.
    """
    batch = non_negative("batch_size", batch_size)
    for name, given in (("causal", causal), ("has_softcap", has_softcap)):
        flag(name, given)
    optional_flag("pack_gqa", pack_gqa)
    require_tensor("cache_seqlens", cache_seqlens, "an int32 torch.Tensor")
    check_int32_vector(
        "cache_seqlens", cache_seqlens, batch, cache_seqlens.device, why=", by batch_size"
    )
    return torch.zeros(batch + 1, dtype=torch.int32, device=cache_seqlens.device)


def _check_scheduler_metadata(metadata: Any, q: Any, cu_seqlens_q: Any) -> None:
    require_tensor("scheduler_metadata", metadata, "what get_scheduler_metadata returns")
    given, name = (q, "q") if cu_seqlens_q is None else (cu_seqlens_q, "cu_seqlens_q")
    for each in (q, given):
        require_tensor(name if each is given else "q", each)
    if given.ndim == 0:
        raise ValueError(f"{name} is a scalar: expected one row for each sequence")
    batch = given.shape[0] - (cu_seqlens_q is not None)
    check_int32_vector("scheduler_metadata", metadata, batch + 1, q.device)
