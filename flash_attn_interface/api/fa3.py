"""The public functions with FlashAttention-3's signatures. FlashAttention-2's are in `fa2.py`.

Parameter names, order and defaults are a contract with callers: new parameters go last, with a
default. Each function arranges its arguments and calls `autograd.attention`; errors come from
`common/ask/checks.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._common.ask.call import DENSE, Call, Options, Sequences, Tensors
from .._common.ask.check_tensors import require_tensor
from .._common.ask.check_values import non_negative
from ..call.autograd import attention
from ..call.packing import Packing

WindowSize = Sequence[int] | Tensor
OutAndLse = tuple[Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: WindowSize = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Tensor | OutAndLse:
    """Exact attention, softmax(softmax_scale * q k^T) v, of a batch of sequences of equal length.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim_qk), float16 or bfloat16. Strides are free; a
            last dim that is not contiguous is copied. Under torch.autocast also float32, which is
            cast to autocast's dtype, q, k and v alike.
        k: (batch, seqlen_k, num_heads_k, head_dim_qk); num_heads_q is a multiple of num_heads_k.
        v: (batch, seqlen_k, num_heads_v, head_dim_v); num_heads_q is a multiple of num_heads_v.
            num_heads_v and head_dim_v need not equal k's. Head dims: any from 1 to 576 of q and
            k, and from 1 to 512 of v.
        softmax_scale: None means head_dim_qk ** -0.5. This is the fourth positional parameter here,
            whereas in `flash_attn.flash_attn_func` it is dropout_p.
        causal: query i sees key j when j <= i + seqlen_k - seqlen_q (bottom-right alignment).
        qv, q_descale, k_descale, v_descale: must be None; see Raises.
        window_size: (left, right). Query i sees keys from i + seqlen_k - seqlen_q - left to
            i + seqlen_k - seqlen_q + right, both included; negative = unlimited. `causal` makes
            right 0.
        attention_chunk: C > 0 restricts a query to the keys of its own chunk of C positions:
            floor((i + seqlen_k - seqlen_q) / C) == floor(j / C). 0 is off.
        softcap: c > 0 replaces the scaled scores s by c * tanh(s / c).
        num_splits, pack_gqa, sm_margin: scheduling hints of FlashAttention-3, without influence on
            the result. The Hopper kernels leave sm_margin SMs to others, and put the rows of query
            heads that share K and V into one tile if pack_gqa is True, never if it is False, and
            if few query rows make it pay where it is None. The Ampere kernels use no hint.
        deterministic: make dq bitwise reproducible too. out, dk and dv always are.
        return_attn_probs: also return softmax_lse, which is differentiable. The name is upstream's.
        s_aux: attention sinks, (num_heads_q,), float32, bfloat16 or float16: a logit per query head
            that takes part in the softmax's denominator and has no value, after scale, softcap and
            masks. softmax_lse contains it, and a query that sees no key has softmax_lse s_aux.
            -inf is no sink. It gets a gradient.

    Returns:
        out, (batch, seqlen_q, num_heads_q, head_dim_v) in the dtype of q, with the strides of
        torch.empty_like(q); a query that sees no key gives zeros. With return_attn_probs the pair
        (out, softmax_lse): softmax_lse is float32, (batch, num_heads_q, seqlen_q), the natural
        logarithm of the softmax's denominator, -inf for a query that sees no key.

    Raises:
        TypeError: an argument's type or dtype is wrong.
        ValueError: shapes, devices or values disagree or are out of range.
        NotImplementedError: qv, a descale or an fp8 dtype is given, or the GPU is older than sm_80.
            The message says what to do instead.
    """
    _check_hints(softmax_scale, qv, q_descale, k_descale, v_descale, num_splits, sm_margin)
    options = Options(
        softmax_scale, causal, window_size, attention_chunk, softcap, 0.0, return_attn_probs, False,
        deterministic, None, None, sm_margin, pack_gqa,
    )  # fmt: skip
    out, softmax_lse, _ = attention(Call(Tensors(q, k, v, s_aux=s_aux), DENSE, None, options))
    return _result(out, softmax_lse)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: WindowSize = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Tensor | OutAndLse:
    """Exact attention of sequences of different lengths, packed end to end.

    Sequence b has the queries q[cu_seqlens_q[b]:cu_seqlens_q[b + 1]] and the keys and values
    k, v[cu_seqlens_k[b]:cu_seqlens_k[b + 1]]; masks are aligned within each sequence. Lengths stay
    on the device: nothing synchronises.

    Args:
        q: (total_q, num_heads_q, head_dim_qk), float16 or bfloat16.
        k: (total_k, num_heads_k, head_dim_qk).
        v: (total_k, num_heads_v, head_dim_v).
        cu_seqlens_q: int32 (batch + 1,) on the device of q, contiguous, from 0, never decreasing.
            None: q is (batch, seqlen_q, num_heads_q, head_dim_qk) instead.
        cu_seqlens_k: likewise for k and v.
        max_seqlen_q, max_seqlen_k: longest sequence, or an upper bound. A tensor on the device is
            not read: the total takes its place. Ignored (may be None) without cu_seqlens.
        seqused_q: int32 (batch,): only the first seqused_q[b] rows of sequence b take part; out is
            zero and softmax_lse -inf in the others.
        seqused_k: int32 (batch,): likewise for keys and values.
        softmax_scale, causal, window_size, attention_chunk, softcap, num_splits, pack_gqa,
            deterministic, sm_margin, return_attn_probs, qv, q_descale, k_descale, v_descale: as in
            `flash_attn_func`.
        s_aux: attention sinks, as in `flash_attn_func`.

    Returns:
        out, (total_q, num_heads_q, head_dim_v); rows past cu_seqlens_q[-1] are zero. With
        return_attn_probs the pair (out, softmax_lse), softmax_lse being float32 (num_heads_q,
        total_q).

    Raises:
        TypeError, ValueError, NotImplementedError: as `flash_attn_func`. For CPU tensors the values
            of cu_seqlens and seqused are checked, for CUDA tensors they are trusted.
    """
    _check_hints(softmax_scale, qv, q_descale, k_descale, v_descale, num_splits, sm_margin)
    options = Options(
        softmax_scale, causal, window_size, attention_chunk, softcap, 0.0, return_attn_probs, False,
        deterministic, None, None, sm_margin, pack_gqa,
    )  # fmt: skip
    tensors = Tensors(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, s_aux=s_aux)
    lengths = Sequences(max_seqlen_q, max_seqlen_k)
    out, softmax_lse, _ = attention(Call(tensors, lengths, None, options))
    return _result(out, softmax_lse)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: WindowSize = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Tensor | OutAndLse:
    """`flash_attn_func` on q, k and v in one tensor; they are used as views, nothing is copied.

    Args:
        qkv: (batch, seqlen, 3, num_heads, head_dim), or (batch, seqlen, num_heads_q + 2 *
            num_heads_k, head_dim) with num_heads_q given: first the heads of q, then those of k,
            then v.
        num_heads_q: heads of q in a 4-dimensional qkv; ignored for 5 dimensions.
        softmax_scale, causal, window_size, attention_chunk, softcap, deterministic, sm_margin,
            return_attn_probs, q_descale, k_descale, v_descale: as in `flash_attn_func`.
        s_aux: attention sinks, as in `flash_attn_func`.

    Returns:
        out, (batch, seqlen, num_heads_q, head_dim), or with return_attn_probs (out, softmax_lse).

    Raises:
        TypeError, ValueError, NotImplementedError: as `flash_attn_func`.
    """
    packing = _qkv_packing(qkv, num_heads_q)
    _check_hints(softmax_scale, None, q_descale, k_descale, v_descale, 1, sm_margin)
    options = Options(
        softmax_scale, causal, window_size, attention_chunk, softcap, 0.0, return_attn_probs, False,
        deterministic, packing, None, sm_margin,
    )  # fmt: skip
    out, softmax_lse, _ = attention(
        Call(Tensors(qkv, None, None, s_aux=s_aux), DENSE, None, options)
    )
    return _result(out, softmax_lse)


def _qkv_packing(qkv: Tensor, num_heads_q: int | None) -> Packing:
    if not isinstance(qkv, Tensor) or qkv.layout is not torch.strided or qkv.is_nested:
        require_tensor("qkv", qkv)
    if qkv.ndim == 5 and qkv.shape[2] == 3:
        return Packing(2)
    if qkv.ndim != 4:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}: expected (batch, seqlen, 3, num_heads, head_dim) "
            "or (batch, seqlen, num_heads_q + 2 * num_heads_k, head_dim) with num_heads_q"
        )
    if num_heads_q is None:
        raise ValueError("num_heads_q is None: a 4-dimensional qkv needs it to find k and v")
    heads_q = non_negative("num_heads_q", num_heads_q)
    heads_k, rest = divmod(int(qkv.shape[2]) - heads_q, 2)  # int: of a tensor under jit.trace
    if heads_k < 1 or rest or heads_q < 1 or heads_q % heads_k:
        raise ValueError(
            f"num_heads_q is {heads_q} of {qkv.shape[2]} heads of qkv: the rest must be an even "
            "number, half of it k's and half v's, and num_heads_q a multiple of those of k"
        )
    return Packing(2, (heads_q, heads_k, heads_k))


def _check_hints(
    softmax_scale: Any, qv: Any, q_descale: Any, k_descale: Any, v_descale: Any, num_splits: int,
    sm_margin: int,
) -> None:  # fmt: skip
    """Arguments that only FlashAttention-3 has and that the common path never sees."""
    if qv is not None or q_descale is not None or k_descale is not None or v_descale is not None:
        _refuse_fa3_features(qv, q_descale, k_descale, v_descale)
    if type(num_splits) is not int or num_splits != 1:
        non_negative("num_splits", num_splits)
    if type(sm_margin) is not int or sm_margin != 0:
        non_negative("sm_margin", sm_margin)
    if type(softmax_scale) is float and softmax_scale == 0.0:
        warnings.warn(
            "softmax_scale=0.0 makes every key weigh the same. If it was meant as dropout_p, the "
            "fourth parameter of flash_attn.flash_attn_func: this function has no dropout.",
            stacklevel=3,
        )


def _refuse_fa3_features(qv: Any, q_descale: Any, k_descale: Any, v_descale: Any) -> None:
    if qv is not None:
        raise NotImplementedError(
            "qv is not supported by this function: flash_attn_with_kvcache takes it. Or "
            "concatenate q = cat([q, qv], -1), k = cat([k, v], -1), softmax_scale = (head_dim_qk + "
            "head_dim_v) ** -0.5, which works up to a sum of 576 and has gradients."
        )
    descales = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    given = " and ".join(name for name, value in descales.items() if value is not None)
    raise NotImplementedError(
        f"{given} is not supported: descales belong to fp8 inputs, which the Ampere kernels do not "
        "take. Convert q, k and v to bfloat16, multiplied by their descales, and pass None."
    )


def _result(out: Tensor, softmax_lse: Tensor | None) -> Tensor | OutAndLse:
    return out if softmax_lse is None else (out, softmax_lse)
