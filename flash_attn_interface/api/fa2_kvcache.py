"""Decoding: attention over a key and value cache, with FlashAttention-2's signature.

Re-exported by `fa2.py` and the package `flash_attn`. FlashAttention-3's is in `kvcache.py`, which
describes the arguments in full; docs/decoding.md is the guide for users.
"""

from __future__ import annotations

from torch import Tensor

from .._common.ask.call import DENSE, Cache, Call, Options, Tensors
from ..call.autograd import attention
from .kvcache import WindowSize


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append new keys and values to a cache, in place, and attend over what it then holds.

    For inference: there are no gradients. Nothing waits for the GPU, so that calls can be captured
    in CUDA graphs and replayed with other lengths and block tables. cache_seqlens is read, never
    written: add the number of new rows before the next call.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim_qk), float16 or bfloat16.
        k_cache: (batch, capacity, num_heads_k, head_dim_qk), or more sequences than the batch; with
            block_table (num_blocks, block_size, num_heads_k, head_dim_qk), any block_size >= 1.
        v_cache: likewise with num_heads_v and head_dim_v, which need not equal k_cache's.
        k, v: new rows, (batch, seqlen_new, num_heads, head_dim). Written behind the first
            cache_seqlens rows.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), dtype of q, at least as many positions
            as a sequence has room for. New row t of k is rotated, before it is stored, by position
            cache_seqlens + t. Row t of q by the same if the call is causal or windowed, else each
            row by cache_seqlens. Only with k and v.
        cache_seqlens: int32 (batch,), the valid rows before the append, or one int for all. None:
            all of the capacity.
        cache_batch_idx: int32 (batch,): the cache's sequence, or row of block_table, for each of q.
        cache_leftpad: int32 (batch,): keys before this row are not seen; masks count from there.
        block_table: int32 (batch, blocks of a sequence). Row r of sequence b is row r % block_size
            of block block_table[b, r // block_size]. Entries past the valid rows may be anything.
        softmax_scale: None means head_dim_qk ** -0.5.
        causal, window_size, softcap, alibi_slopes: as in `flash_attn_func`, seqlen_k being the
            valid rows after the append less cache_leftpad.
        rotary_interleaved: pairs of lanes are (0, 1), (2, 3)...; else (t, t + rotary_dim / 2).
        num_splits: parts of the keys that are attended to separately and then merged, up to 256.
            0: chosen from the shapes and the GPU, never from the lengths. 1: results do not depend
            on what else is in the batch; they are bitwise those of the Ampere tree's
            `flash_attn_func` over the same keys.
        return_softmax_lse: also return softmax_lse.
        s_aux: attention sinks, (num_heads_q,), float32, bfloat16 or float16: a logit per query head
            that takes part in the softmax's denominator and has no value, after scale, softcap and
            masks. softmax_lse contains it, and a query that sees no key has softmax_lse s_aux.
            -inf is no sink. There is no gradient.

    Returns:
        out, (batch, seqlen_q, num_heads_q, head_dim_v); a query that sees no key gives zeros. With
        return_softmax_lse (out, softmax_lse), softmax_lse being float32 (batch, num_heads_q,
        seqlen_q), -inf for a query that sees no key.

    Raises:
        TypeError, ValueError, NotImplementedError: as `flash_attn_func`. Values of lengths, indices
            and tables are checked for CPU tensors; on a GPU they are clamped, or, with
            FLASH_ATTN_INTERFACE_CHECK_CACHE=1, checked as well.
    """
    tables = (alibi_slopes, block_table, cache_batch_idx, cache_leftpad)
    out, softmax_lse, _ = attention(
        Call(
            Tensors(q, k_cache, v_cache, None, None, None, None, *tables, s_aux=s_aux),
            DENSE,
            Cache(k, v, None, rotary_cos, rotary_sin, cache_seqlens),
            Options(
                softmax_scale, causal, window_size, 0, softcap, 0.0, return_softmax_lse, False,
                False, None, None, 0, None, num_splits, rotary_interleaved,
            ),
        )
    )  # fmt: skip
    return out if softmax_lse is None else (out, softmax_lse)
