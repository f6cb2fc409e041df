"""The public functions with FlashAttention-2's signatures, re-exported by the package `flash_attn`.

FlashAttention-3's are in `fa3.py`. Parameter names, order and defaults are those of
flash-attn 2.8.3; clients also read them by `inspect.signature`. Packed q, k and v are used as
views, never copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._common.ask.call import DENSE, Call, Options, Sequences, Tensors
from .._common.ask.check_tensors import require_tensor
from ..call.autograd import attention
from ..call.packing import Packing

WindowSize = Sequence[int] | Tensor
OutLseSoftmax = tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Tensor | OutLseSoftmax:
    """Exact attention, dropout(softmax(softmax_scale * q k^T)) v, of sequences of equal length.

    Scores are scaled, soft-capped, biased by ALiBi, then masked.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim_qk), float16 or bfloat16. Strides are free; a
            last dim that is not contiguous is copied. Under torch.autocast also float32, which is
            cast to autocast's dtype, q, k and v alike.
        k: (batch, seqlen_k, num_heads_k, head_dim_qk); num_heads_q is a multiple of num_heads_k.
        v: (batch, seqlen_k, num_heads_v, head_dim_v); num_heads_q is a multiple of num_heads_v.
            num_heads_v and head_dim_v need not equal k's. Head dims: any from 1 to 576 of q and
            k, and from 1 to 512 of v.
        dropout_p: probability in [0, 1) of dropping a softmax value; survivors are scaled by
            1 / (1 - dropout_p). Rounded to steps of 1/256. Pass 0.0 in evaluation. The mask follows
            torch's default generator of the device (torch.manual_seed).
        softmax_scale: None means head_dim_qk ** -0.5.
        causal: query i sees key j when j <= i + seqlen_k - seqlen_q (bottom-right alignment).
        window_size: (left, right). Query i sees keys from i + seqlen_k - seqlen_q - left to
            i + seqlen_k - seqlen_q + right, both included; negative = unlimited. `causal` makes
            right 0.
        softcap: c > 0 replaces the scaled scores s by c * tanh(s / c). May go with dropout.
        alibi_slopes: float32, (num_heads_q,) or (batch, num_heads_q): adds
            -slope * |i + seqlen_k - seqlen_q - j| to the scores. They have no gradient.
        deterministic: make dq bitwise reproducible too. out, dk and dv always are.
        return_attn_probs: also return softmax_lse, which is differentiable, and S_dmask, which is
            not.
        s_aux: attention sinks, (num_heads_q,), float32, bfloat16 or float16: a logit per query head
            that takes part in the softmax's denominator and has no value, after scale, softcap and
            masks. softmax_lse contains it, and a query that sees no key has softmax_lse s_aux.
            -inf is no sink. It gets a gradient.

    Returns:
        out, (batch, seqlen_q, num_heads_q, head_dim_v) in the dtype of q, with the strides of
        torch.empty_like(q); a query that sees no key gives zeros. With return_attn_probs the triple
        (out, softmax_lse, S_dmask).
        softmax_lse: float32 (batch, num_heads_q, seqlen_q), the natural logarithm of the softmax's
        denominator, of scores exactly as defined above; -inf for a query that sees no key.
        S_dmask: empty, (0,), without dropout. With dropout (batch, num_heads_q, seqlen_q,
            seqlen_k), lengths rounded up to 128, dtype of q: the sign is negative where dropped;
            the magnitude is exp(score - reference), where the reference of a row may change from
            one tile of keys to the next and lies at most 8 ln 2 below the row's maximum so far.

    Raises:
        TypeError: an argument's type or dtype is wrong.
        ValueError: shapes, devices or values disagree or are out of range.
        NotImplementedError: the GPU is older than sm_80, or alibi_slopes require a gradient.
    """
    options = Options(
        softmax_scale, causal, window_size, 0, softcap, dropout_p, return_attn_probs,
        return_attn_probs, deterministic,
    )  # fmt: skip
    tensors = Tensors(q, k, v, alibi_slopes=alibi_slopes, s_aux=s_aux)
    return _result(*attention(Call(tensors, DENSE, None, options)))


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Tensor | OutLseSoftmax:
    """`flash_attn_func` on k and v in one tensor, used as views.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim).
        kv: (batch, seqlen_k, 2, num_heads_k, head_dim); index 0 is k, 1 is v.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs: as in `flash_attn_func`.
        s_aux: attention sinks, as in `flash_attn_func`.

    Returns:
        As `flash_attn_func`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `flash_attn_func`.
    """
    options = Options(
        softmax_scale, causal, window_size, 0, softcap, dropout_p, return_attn_probs,
        return_attn_probs, deterministic, _packing("kv", kv, 2, 1),
    )  # fmt: skip
    tensors = Tensors(q, kv, None, alibi_slopes=alibi_slopes, s_aux=s_aux)
    return _result(*attention(Call(tensors, DENSE, None, options)))


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Tensor | OutLseSoftmax:
    """`flash_attn_func` on q, k and v in one tensor, used as views.

    Args:
        qkv: (batch, seqlen, 3, num_heads, head_dim).
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs: as in `flash_attn_func`.
        s_aux: attention sinks, as in `flash_attn_func`.

    Returns:
        As `flash_attn_func`, out being (batch, seqlen, num_heads, head_dim).

    Raises:
        TypeError, ValueError, NotImplementedError: as `flash_attn_func`.
    """
    options = Options(
        softmax_scale, causal, window_size, 0, softcap, dropout_p, return_attn_probs,
        return_attn_probs, deterministic, _packing("qkv", qkv, 3, 1),
    )  # fmt: skip
    tensors = Tensors(qkv, None, None, alibi_slopes=alibi_slopes, s_aux=s_aux)
    return _result(*attention(Call(tensors, DENSE, None, options)))


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    s_aux: Tensor | None = None,
) -> Tensor | OutLseSoftmax:
    """Exact attention of sequences of different lengths, packed end to end.

    Sequence b has the queries q[cu_seqlens_q[b]:cu_seqlens_q[b + 1]] and the keys and values
    k, v[cu_seqlens_k[b]:cu_seqlens_k[b + 1]]; masks are aligned within each sequence. Lengths stay
    on the device: nothing synchronises.

    Args:
        q: (total_q, num_heads_q, head_dim_qk), float16 or bfloat16.
        k: (total_k, num_heads_k, head_dim_qk).
        v: (total_k, num_heads_v, head_dim_v).
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,) on the device of q, contiguous, from 0, never
            decreasing.
        max_seqlen_q, max_seqlen_k: longest sequence, or an upper bound. A tensor on the device is
            not read: the total takes its place.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs: as in `flash_attn_func`.
        block_table: int32 (batch, max_pages), last dim contiguous. k and v are then pages,
            (num_pages, page_size, num_heads, head_dim) with any page_size >= 1, and key j of
            sequence b is row j % page_size of page block_table[b, j // page_size]. cu_seqlens_k
            gives the lengths by its differences; entries of pages that no key lies in may be
            anything. There is no backward; with return_attn_probs no dropout.
        s_aux: attention sinks, as in `flash_attn_func`.

    Returns:
        out, (total_q, num_heads_q, head_dim_v); rows past cu_seqlens_q[-1] are zero. With
        return_attn_probs (out, softmax_lse, S_dmask): softmax_lse is float32 (num_heads_q,
        total_q), S_dmask has the sizes max_seqlen_q and max_seqlen_k, rounded up to 128.

    Raises:
        TypeError, ValueError, NotImplementedError: as `flash_attn_func`; the backward through a
            call with block_table is a NotImplementedError. For CPU tensors the values of cu_seqlens
            and block_table are checked. For CUDA tensors cu_seqlens are trusted; pages out of range
            are clamped, so that nothing outside of k and v is read.
    """
    options = Options(
        softmax_scale, causal, window_size, 0, softcap, dropout_p, return_attn_probs,
        return_attn_probs, deterministic,
    )  # fmt: skip
    tensors = Tensors(
        q,
        k,
        v,
        *_ragged(cu_seqlens_q, cu_seqlens_k),
        None,
        None,
        alibi_slopes,
        block_table,
        s_aux=s_aux,
    )
    lengths = Sequences(max_seqlen_q, max_seqlen_k)
    return _result(*attention(Call(tensors, lengths, None, options)))


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Tensor | OutLseSoftmax:
    """`flash_attn_varlen_func` on k and v in one tensor, used as views.

    Args:
        q: (total_q, num_heads_q, head_dim).
        kv: (total_k, 2, num_heads_k, head_dim); index 0 is k, 1 is v.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: as in `flash_attn_varlen_func`.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs: as in `flash_attn_func`.
        s_aux: attention sinks, as in `flash_attn_func`.

    Returns:
        As `flash_attn_varlen_func`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `flash_attn_varlen_func`.
    """
    options = Options(
        softmax_scale, causal, window_size, 0, softcap, dropout_p, return_attn_probs,
        return_attn_probs, deterministic, _packing("kv", kv, 2, 0),
    )  # fmt: skip
    tensors = Tensors(
        q, kv, None, *_ragged(cu_seqlens_q, cu_seqlens_k), None, None, alibi_slopes, s_aux=s_aux
    )
    lengths = Sequences(max_seqlen_q, max_seqlen_k)
    return _result(*attention(Call(tensors, lengths, None, options)))


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Tensor | OutLseSoftmax:
    """`flash_attn_varlen_func` on q, k and v in one tensor, used as views.

    Args:
        qkv: (total, 3, num_heads, head_dim).
        cu_seqlens: int32 (batch + 1,), as cu_seqlens_q of `flash_attn_varlen_func`.
        max_seqlen: longest sequence, or an upper bound.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs: as in `flash_attn_func`.
        s_aux: attention sinks, as in `flash_attn_func`.

    Returns:
        As `flash_attn_varlen_func`, out being (total, num_heads, head_dim).

    Raises:
        TypeError, ValueError, NotImplementedError: as `flash_attn_varlen_func`.
    """
    options = Options(
        softmax_scale, causal, window_size, 0, softcap, dropout_p, return_attn_probs,
        return_attn_probs, deterministic, _packing("qkv", qkv, 3, 0),
    )  # fmt: skip
    tensors = Tensors(
        qkv, None, None, *_ragged(cu_seqlens, cu_seqlens), None, None, alibi_slopes, s_aux=s_aux
    )
    lengths = Sequences(max_seqlen, max_seqlen)
    return _result(*attention(Call(tensors, lengths, None, options)))


def _ragged(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both, which must be given."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        name = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise TypeError(f"{name} is None: expected an int32 tensor of shape (batch + 1,)")
    return cu_seqlens_q, cu_seqlens_k


def _packing(name: str, packed: Tensor, count: int, tokens: int) -> Packing:
    """Of `count` tensors stacked behind the token axis `tokens` (0 ragged, 1 dense)."""
    if not isinstance(packed, Tensor) or packed.layout is not torch.strided or packed.is_nested:
        require_tensor(name, packed)
    if packed.ndim != tokens + 4 or packed.shape[tokens + 1] != count:
        rows = "total" if tokens == 0 else "batch, seqlen"
        raise ValueError(
            f"{name} has shape {tuple(packed.shape)}: expected "
            f"({rows}, {count}, num_heads, head_dim)"
        )
    return Packing(tokens + 1)


def _result(
    out: Tensor, softmax_lse: Tensor | None, s_dmask: Tensor | None
) -> Tensor | OutLseSoftmax:
    if softmax_lse is None:
        return out
    return out, softmax_lse, out.new_empty(0) if s_dmask is None else s_dmask
