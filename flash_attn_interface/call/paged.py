"""Attention of packed queries over paged keys, `flash_attn_varlen_func(block_table=...)`.

Has no backward: called by `fa2.py` in place of `autograd.attention`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._common.ask.check_tensors import check_tensors, refuse_layouts
from .._common.ask.check_values import default_softmax_scale, flag, window_pair
from .._common.ask.checks import check_rows
from . import autocast, dispatch
from .backends import ForwardResult
from .gradients import refuse_alibi_gradient
from .inference_only import inference_only
from .sharding import on_one_mesh
from .watchers import all_plain, refuse_forward_mode, unwatched


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    softcap: float,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    return_attn_probs: bool,
    block_table: Tensor,
) -> ForwardResult:
    """(out, softmax_lse, s_dmask). Arguments as in `flash_attn_varlen_func`."""
    check_tensors(q, k, v)
    causal, return_attn_probs = flag("causal", causal), flag("return_attn_probs", return_attn_probs)
    for name, given in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if given is None:
            raise TypeError(f"{name} is None: expected an int32 tensor of shape (batch + 1,)")
    if torch.is_grad_enabled():
        refuse_alibi_gradient(alibi_slopes)
    q, k, v = autocast.cast(q, k, v)
    tables = (cu_seqlens_q, cu_seqlens_k, block_table, alibi_slopes)
    if not is_compiling() and _direct(q, k, v, tables):
        run = partial(
            dispatch.forward, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None,
            None, softmax_scale, causal, window_size, 0, softcap, alibi_slopes, dropout_p,
            return_attn_probs, return_attn_probs, page_table=block_table,
        )  # fmt: skip
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            out, softmax_lse, s_dmask, _ = inference_only(run, no_backward(block_table), q, k, v)
        else:
            out, softmax_lse, s_dmask, _ = run()
        return out, softmax_lse, s_dmask
    from .fa2_ops import _flash_attn_varlen_forward

    if not is_compiling():
        refuse_layouts(
            q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            block_table=block_table, alibi_slopes=alibi_slopes,
        )  # fmt: skip
        check_rows("q", q, cu_seqlens_q, "cu_seqlens_q")
        refuse_forward_mode(q, k, v)
        q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, alibi_slopes = on_one_mesh(
            (q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, alibi_slopes), dropout_p
        )
    longest = [
        rows.shape[0] if isinstance(given, Tensor) else given  # reading it would break the graph
        for given, rows in ((max_seqlen_q, q), (max_seqlen_k, k))
    ]
    out, softmax_lse, s_dmask, _ = _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, dropout_p,
        default_softmax_scale(q.shape[-1]) if softmax_scale is None else softmax_scale, causal,
        *window_pair(window_size), softcap, alibi_slopes, return_attn_probs and dropout_p > 0.0,
        block_table,
    )  # fmt: skip
    if not return_attn_probs:
        return out, None, None
    return out, softmax_lse, s_dmask if dropout_p > 0.0 else None


def _direct(q: Tensor, k: Tensor, v: Tensor, others: tuple[Any, ...]) -> bool:
    return unwatched(q, k, v) and all_plain(*others) and (q.is_cuda or not q.is_meta)


def no_backward(block_table: Tensor | None, leftpad_k: Tensor | None = None) -> str:
    """Why there is no backward if either is given; empty if there is one."""
    for name, given, what in (
        ("block_table", block_table, "pages"),
        ("leftpad_k", leftpad_k, "keys behind left padding"),
    ):
        if given is not None:
            return (
                f"{name} with q, k or v that require gradients has no backward, which would read "
                f"contiguous keys only. Call it under torch.no_grad(), or gather the {what} into "
                "packed k and v with index_select, which is differentiable."
            )
    return ""
