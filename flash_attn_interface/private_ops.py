"""FlashAttention-2's private operations, `flash_attn::_flash_attn_forward` and its like.

Ring attention, TransformerEngine and others call them as `flash_attn.flash_attn_interface.
_flash_attn_forward`, by position or keyword; names, order and defaults are those of flash-attn
2.8.3 and its successor. They work on GPUs, on CPU tensors (reference) and in the simulator. Under
torch.compile our own functions call the forwards too (`traced.py`).

An out and a softmax_lse that were merged over several key blocks give the backwards' partial
gradients. softmax_lse is -inf where a row sees no key; the backwards take +inf for the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dispatch
from ._common.check_backward import check_gradients
from ._common.check_cache import check_num_splits
from .custom_op import custom_op
from .gradients import empty_gradient, refuse_alibi_gradient
from .ops import attention_backward, complete, fake_results
from .paged import no_backward
from .watchers import refuse_forward_mode


@custom_op(
    "flash_attn::_flash_attn_forward",
    "(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, "
    "SymInt window_size_left, SymInt window_size_right, float softcap, "
    "Tensor? alibi_slopes, bool return_softmax) -> (Tensor, Tensor, Tensor, Tensor)",
    random=True,
)
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state) of `flash_attn_func`'s arguments.

    S_dmask is (0,) unless return_softmax and dropout_p > 0. rng_state: int64 (2,), for the
    backward; zero without dropout.
    """
    refuse_forward_mode(q, k, v)
    return complete(
        dispatch.forward(
            q, k, v, None, None, None, None, None, None, softmax_scale, causal,
            (window_size_left, window_size_right), 0, softcap, alibi_slopes, dropout_p, True,
            return_softmax,
        )
    )  # fmt: skip


@_flash_attn_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake_results(q, k, v, None, None, 0, 0, return_softmax and dropout_p > 0.0)


@custom_op(
    "flash_attn::_flash_attn_varlen_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, float softmax_scale, "
    "bool causal, SymInt window_size_left=-1, SymInt window_size_right=-1, "
    "float softcap=0.0, Tensor? alibi_slopes=None, bool return_softmax=False, "
    "Tensor? block_table=None, Tensor? leftpad_k=None, Tensor? seqused_k=None, "
    "bool zero_tensors=False, SymInt num_splits=0) -> (Tensor, Tensor, Tensor, Tensor)",
    random=True,
)
def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_flash_attn_forward`, with `flash_attn_varlen_func`'s arguments.

    seqused_k: int32 (batch,), keys of each sequence that take part. leftpad_k: int32 (batch,),
    first key of each sequence; masks count from there. zero_tensors: rows that belong to no
    sequence are zero (softmax_lse: -inf) in any case. num_splits: a hint without influence; with
    block_table at most 1, as in FlashAttention-2.
    """
    refuse_forward_mode(q, k, v)
    if check_num_splits(num_splits) > 1 and block_table is not None:
        raise NotImplementedError(
            f"num_splits is {num_splits}, which this operation does not take together with "
            "block_table: pass 0 or 1, or call flash_attn_with_kvcache, which splits paged keys"
        )
    return complete(
        dispatch.forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, seqused_k,
            softmax_scale, causal, (window_size_left, window_size_right), 0, softcap, alibi_slopes,
            dropout_p, True, return_softmax, page_table=block_table, leftpad_k=leftpad_k,
        )
    )  # fmt: skip


@_flash_attn_varlen_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake_results(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        return_softmax and dropout_p > 0.0,
    )  # fmt: skip


@custom_op(
    "flash_attn::_flash_attn_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(a6!)? dq, Tensor(a7!)? dk, Tensor(a8!)? dv, float dropout_p, "
    "float softmax_scale, bool causal, SymInt window_size_left, "
    "SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool deterministic, "
    "Tensor? rng_state=None) -> Tensor",
)
def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes dq, dk and dv, which may have any strides; one that is None is computed and dropped.

    Returns softmax_d = rowsum(dout * out), float32 (batch, num_heads_q, seqlen_q rounded up to
    128).
    """
    return _backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, None, None, None, None, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        deterministic, rng_state,
    )  # fmt: skip


@_flash_attn_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    *others: object,
) -> Tensor:
    batch, seqlen_q, num_heads_q, _ = q.shape
    rows = (seqlen_q + 127) // 128 * 128
    return q.new_empty((batch, num_heads_q, rows), dtype=torch.float32)


@custom_op(
    "flash_attn::_flash_attn_varlen_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(a6!)? dq, Tensor(a7!)? dk, Tensor(a8!)? dv, Tensor cu_seqlens_q, "
    "Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, "
    "float softmax_scale, bool causal, SymInt window_size_left, "
    "SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool deterministic, "
    "Tensor? rng_state=None, bool zero_tensors=False) -> Tensor",
)
def _flash_attn_varlen_backward(
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
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """As `_flash_attn_backward`; softmax_d is (num_heads_q, total_q + 128 * batch).

    zero_tensors: rows of dq, dk and dv that belong to no sequence become zero in any case.
    """
    return _backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state,
    )  # fmt: skip


@_flash_attn_varlen_backward.register_fake
def _(
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
    *others: object,
) -> Tensor:
    total_q, num_heads_q, _ = q.shape
    rows = total_q + 128 * (cu_seqlens_q.shape[0] - 1)
    return q.new_empty((num_heads_q, rows), dtype=torch.float32)


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
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None,
) -> Tensor:
    dq = empty_gradient(q) if dq is None else dq
    dk = empty_gradient(k) if dk is None else dk
    dv = empty_gradient(v) if dv is None else dv
    check_gradients(q, k, v, dout, out, softmax_lse, dq, dk, dv)
    return dispatch.backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, None, None, softmax_scale, causal, (window_size_left, window_size_right), 0,
        softcap, alibi_slopes, dropout_p, rng_state if dropout_p > 0.0 else None, deterministic,
    )  # fmt: skip


# ---- Differentiating the forwards --------------------------------------------------------------


def _save_dense(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, *shared, _ = inputs
    _save(ctx, (q, k, v, None, None, None), (0, 0), shared, output)
    ctx.num_inputs = len(inputs)
    ctx.no_backward = ""


def _save_varlen(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *others = inputs
    shared, (_, block_table, leftpad_k, seqused_k, *_) = others[:7], others[7:]
    ctx.no_backward = no_backward(block_table, leftpad_k)
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k)
    _save(ctx, tensors, (max_seqlen_q, max_seqlen_k), shared, output)
    ctx.num_inputs = len(inputs)


def _save(
    ctx: Any,
    tensors: tuple[Tensor | None, ...],
    max_seqlens: tuple[int, int],
    shared: list[Any],
    output: tuple[Tensor, ...],
) -> None:
    """shared: the inputs dropout_p to alibi_slopes, which both forwards have in this order."""
    out, softmax_lse, s_dmask, rng_state = output
    *numbers, alibi_slopes = shared
    refuse_alibi_gradient(alibi_slopes)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(s_dmask, rng_state)
    ctx.save_for_backward(*tensors, alibi_slopes, out, softmax_lse, rng_state)
    ctx.options = (max_seqlens, *numbers)


def _differentiate(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, *unused: object
) -> tuple[Tensor | None, ...]:
    if ctx.no_backward:
        raise NotImplementedError(ctx.no_backward)
    q, k, v, cu_q, cu_k, seqused_k, alibi_slopes, out, softmax_lse, rng_state = ctx.saved_tensors
    max_seqlens, dropout_p, softmax_scale, causal, left, right, softcap = ctx.options
    dq, dk, dv = attention_backward(
        torch.zeros_like(out) if dout is None else dout, dlse, q, k, v, 0, [], out, softmax_lse,
        rng_state if dropout_p > 0.0 else None, cu_q, cu_k, None, seqused_k, alibi_slopes,
        *max_seqlens, softmax_scale, causal, left, right, 0, softcap, dropout_p,
        torch.are_deterministic_algorithms_enabled(), None,
    )  # fmt: skip
    return (dq, dk, dv, *([None] * (ctx.num_inputs - 3)))


_flash_attn_forward.register_autograd(_differentiate, setup_context=_save_dense)
_flash_attn_varlen_forward.register_autograd(_differentiate, setup_context=_save_varlen)

# The operations as torch knows them, under the names that diffusers imports.
_wrapped_flash_attn_forward = torch.ops.flash_attn._flash_attn_forward
_wrapped_flash_attn_backward = torch.ops.flash_attn._flash_attn_backward
_wrapped_flash_attn_varlen_forward = torch.ops.flash_attn._flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = torch.ops.flash_attn._flash_attn_varlen_backward
