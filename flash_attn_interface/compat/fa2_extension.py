"""The functions of FlashAttention-2's C++ extension, which the module `flash_attn_2_cuda`
re-exports.

xformers and others call them as `flash_attn.flash_attn_interface.flash_attn_gpu.fwd`, by position;
the order is that of flash-attn 2.8.3, with its successor's num_splits at the end of varlen_fwd.
They know no autograd. As in the original, head dims are multiples of 8; that k's and v's may differ
is ours. Arguments of these names mean what they mean in `fa2_ops.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._common.ask import call as ask
from .._common.ask.check_backward import check_gradients
from .._common.ask.check_kv import check_cache_tensors
from .._common.ask.check_overlap import check_outputs
from .._common.ask.check_tensors import require_tensor
from .._common.ask.check_values import flag, probability, window_sides
from ..api.fa2_kvcache import flash_attn_with_kvcache
from ..call.fa2_ops import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
)
from ..call.gradients import empty_gradient
from ..call.out_argument import check_attention_out
from ..call.watchers import all_plain, unwatched

Forward = list[Tensor]
"""[out, softmax_lse, S_dmask, rng_state]"""

Backward = list[Tensor]
"""[dq, dk, dv, softmax_d]"""


@torch.no_grad()
def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    generator: None,
    /,
) -> Forward:
    """Attention of sequences of equal length.

    Args:
        out: receives the result and is returned; None to allocate it.
        return_softmax: also S_dmask, which needs dropout_p > 0.
        generator: must be None: random numbers come from torch's default generator of the device.
    """
    _check(q, k, v, out, generator, return_softmax, dropout_p)
    run = _way(_flash_attn_forward, q, k, v, alibi_slopes)
    result, *others = run(
        q, k, v, dropout_p, softmax_scale, flag("causal", causal),
        *window_sides(window_size_left, window_size_right), softcap, alibi_slopes,
        flag("return_softmax", return_softmax),
    )  # fmt: skip
    return [_returned(out, result), *others]


@torch.no_grad()
def varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    zero_tensors: bool,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    generator: None,
    num_splits: int = 0,
    /,
) -> Forward:
    """Attention of packed sequences. Arguments as in `fwd` and `_flash_attn_varlen_forward`."""
    _check(q, k, v, out, generator, return_softmax, dropout_p)
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table)
    run = _way(_flash_attn_varlen_forward, q, k, v, alibi_slopes, *lengths)
    result, *others = run(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        flag("causal", causal), window_size_left, window_size_right, softcap, alibi_slopes,
        flag("return_softmax", return_softmax), block_table, leftpad_k, seqused_k,
        flag("zero_tensors", zero_tensors), num_splits,
    )  # fmt: skip
    return [_returned(out, result), *others]


@torch.no_grad()
def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    generator: None,
    rng_state: Tensor | None,
    /,
) -> Backward:
    """Gradients of `fwd`. dq, dk, dv: written and returned, any strides; None to allocate."""
    return _backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, None, None, None, None, alibi_slopes,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
        deterministic, generator, rng_state,
    )  # fmt: skip


@torch.no_grad()
def varlen_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    zero_tensors: bool,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    generator: None,
    rng_state: Tensor | None,
    /,
) -> Backward:
    """Gradients of `varlen_fwd`. Rows that belong to no sequence become zero in any case."""
    flag("zero_tensors", zero_tensors)
    return _backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, alibi_slopes, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, deterministic, generator, rng_state,
    )  # fmt: skip


@torch.no_grad()
def fwd_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    out: Tensor | None,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    rotary_interleaved: bool,
    num_splits: int,
    /,
) -> list[Tensor]:
    """[out, softmax_lse] of `flash_attn_with_kvcache`, which see for the arguments."""
    check_cache_tensors(q, k_cache, v_cache)
    if out is not None:
        if 0 in (q.ndim, v_cache.ndim):
            raise ValueError("q and v_cache: expected 4 dims, of which the last is head_dim")
        check_attention_out("out", out, q, v_cache)
        if k is not None:
            check_outputs({"out": out, "k_cache": k_cache, "v_cache": v_cache}, {})
    result, softmax_lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx,
        cache_leftpad, block_table, softmax_scale, causal,
        window_sides(window_size_left, window_size_right), softcap, rotary_interleaved,
        alibi_slopes, num_splits, return_softmax_lse=True,
    )  # fmt: skip
    return [_returned(out, result), softmax_lse]


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    generator: None,
    rng_state: Tensor | None,
) -> Backward:
    _check(q, k, v, None, generator)
    causal, deterministic = flag("causal", causal), flag("deterministic", deterministic)
    dropout_p = probability("dropout_p", dropout_p)
    dq = empty_gradient(q) if dq is None else dq
    dk = empty_gradient(k) if dk is None else dk
    dv = empty_gradient(v) if dv is None else dv
    given = ask.Backward(dout, out, softmax_lse, dq, dk, dv)
    check_gradients(ask.Call(ask.Tensors(q, k, v)), given)
    others = (dout, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, alibi_slopes)
    left, right = window_sides(window_size_left, window_size_right)
    if cu_seqlens_q is None and cu_seqlens_k is None:
        softmax_d = _way(_flash_attn_backward, q, k, v, *others)(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, left,
            right, softcap, alibi_slopes, deterministic, rng_state,
        )  # fmt: skip
    else:
        softmax_d = _way(_flash_attn_varlen_backward, q, k, v, *others)(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
            max_seqlen_k, dropout_p, softmax_scale, causal, left, right, softcap, alibi_slopes,
            deterministic, rng_state,
        )  # fmt: skip
    return [dq, dk, dv, softmax_d]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    generator: object,
    return_softmax: bool = False,
    dropout_p: float = 0.0,
) -> None:
    """What the original's public functions see to before they call the extension. out: of a
    forward, to be written."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, tensor)
        if tensor.ndim == 0 or tensor.shape[-1] % 8:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: the functions of flash_attn_2_cuda take "
                "head dims, the last, in multiples of 8 only; flash_attn.flash_attn_func takes any"
            )
    if generator is not None:
        raise NotImplementedError(
            "generator must be None: dropout follows the device's default generator "
            "(torch.manual_seed)"
        )
    if flag("return_softmax", return_softmax) and probability("dropout_p", dropout_p) == 0.0:
        raise ValueError(f"return_softmax needs dropout: dropout_p is {dropout_p}, expected > 0")
    check_attention_out("out", out, q, v)


def _way(operation: Any, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Any:
    """The operation, or, where nobody watches (`watchers.py`), just what it computes."""
    direct = unwatched(q, k, v) and all_plain(*others) and not q.is_meta
    return operation._init_fn if direct else operation


def _returned(out: Tensor | None, result: Tensor) -> Tensor:
    return result if out is None else out.copy_(result)
