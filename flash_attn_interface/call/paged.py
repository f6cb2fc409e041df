"""Attention of packed queries over paged keys, `flash_attn_varlen_func(block_table=...)`.

Has no backward: called by `autograd.py`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._common.ask.call import Call, Tensors
from .._common.ask.check_tensors import check_tensors, refuse_layouts
from .._common.ask.check_values import default_softmax_scale, window_pair, with_flags
from .._common.ask.checks import check_rows
from . import autocast, dispatch, sinks
from .backends import ForwardResult
from .gradients import refuse_alibi_gradient
from .inference_only import inference_only
from .sharding import on_one_mesh
from .watchers import all_plain, refuse_forward_mode, unwatched


def attention(call: Call) -> ForwardResult:
    """(out, softmax_lse, s_dmask) of a call with a page table."""
    tensors, sequences, _, options = call
    q, k, v = tensors[:3]
    check_tensors(q, k, v)
    options = with_flags(options)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        if getattr(tensors, name) is None:
            raise TypeError(f"{name} is None: expected an int32 tensor of shape (batch + 1,)")
    if torch.is_grad_enabled():
        refuse_alibi_gradient(tensors.alibi_slopes)
    q, k, v = autocast.cast(q, k, v)
    tensors = Tensors(q, k, v, *tensors[3:])
    call = Call(tensors, sequences, None, options)
    direct = not is_compiling() and _direct(tensors)
    if tensors.s_aux is not None:
        if not direct or not sinks.takes_no_gradient(tensors.s_aux):
            return sinks.composed(call, attention)
        call = sinks.for_kernels(call)
    if direct:
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            run = partial(dispatch.run, call)
            state = inference_only(run, no_backward(tensors.page_table), q, k, v)
        else:
            state = dispatch.run(call)
        out, softmax_lse, s_dmask, _ = state
        return out, softmax_lse, s_dmask
    if not is_compiling():
        given = tensors._asdict()
        given["block_table"] = given.pop("page_table")
        refuse_layouts(**given)
        check_rows("q", q, tensors.cu_seqlens_q, "cu_seqlens_q")
        refuse_forward_mode(q, k, v)
        tensors = Tensors(*on_one_mesh(tensors, options.dropout_p))
    out, softmax_lse, s_dmask, _ = _operator(Call(tensors, sequences, None, options))
    if not options.return_lse:
        return out, None, None
    return out, softmax_lse, s_dmask if options.dropout_p > 0.0 else None


def _operator(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operation that takes a block_table."""
    from .fa2_ops import _flash_attn_varlen_forward

    q, k, v, cu_seqlens_q, cu_seqlens_k, *_ = call.tensors
    tensors, options = call.tensors, call.options
    longest = [
        rows.shape[0] if isinstance(given, Tensor) else given  # reading it would break the graph
        for given, rows in zip(call.sequences, (q, k), strict=True)
    ]
    scale = options.softmax_scale
    results: tuple[Tensor, Tensor, Tensor, Tensor] = _flash_attn_varlen_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        *longest,
        options.dropout_p,
        default_softmax_scale(q.shape[-1]) if scale is None else scale,
        options.causal,
        *window_pair(options.window_size),
        options.softcap,
        tensors.alibi_slopes,
        options.return_softmax and options.dropout_p > 0.0,
        tensors.page_table,
    )
    return results


def _direct(tensors: Tensors) -> bool:
    q, k, v, *others = tensors
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
