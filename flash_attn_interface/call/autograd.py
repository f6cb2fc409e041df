"""Where gradients meet dispatch: called by the public functions of `fa3.py` and `fa2.py`.

Eager calls on plain tensors go straight to `dispatch.py`. Under torch.compile the same autograd
function calls the custom operations of `fa2_ops.py` and `ops.py` instead, which come back to
`dispatch.py` at run time; `watched.py` does likewise for tensors that somebody watches. CPU tensors
that no simulator takes run the reference, which autograd differentiates by itself.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._common.ask.check_tensors import check_tensors
from .._common.ask.check_values import attention_flags
from . import autocast, traced, watched
from .backends import ForwardResult
from .dispatch import forward
from .gradients import gradients, refuse_alibi_gradient
from .packing import Packing, unpack
from .simulation import simulate, simulated_arch
from .watched import NoSecondBackward
from .watchers import all_plain, has_plain_type, unwatched


def attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    attention_chunk: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    return_lse: bool,
    return_softmax: bool,
    deterministic: bool = False,
    packing: Packing | None = None,
    backward_backend: str | None = None,
    sm_margin: int = 0,
    pack_gqa: bool | None = None,
) -> ForwardResult:
    """(out, softmax_lse, s_dmask) of one call, any layout. Arguments as in `checks.ForwardCall`.

    k, v: None where an earlier tensor holds them as `packing` says.
    return_lse: somebody will see softmax_lse; otherwise, and without gradients, it is neither
        allocated nor written.
    backward_backend: the kernel tree that has to serve the backward; None to choose.
    """
    compiling = is_compiling()
    direct = (
        not compiling
        and (unwatched(q, k, v) if packing is None else unwatched(q, q if k is None else k, q))
        and (cu_seqlens_q is None or has_plain_type(cu_seqlens_q))
        and (cu_seqlens_k is None or has_plain_type(cu_seqlens_k))
        and (seqused_q is None or has_plain_type(seqused_q))
        and (seqused_k is None or has_plain_type(seqused_k))
        and (alibi_slopes is None or all_plain(alibi_slopes))
        and (q.is_cuda or not q.is_meta)
    )
    if not direct:
        check_tensors(*((q, k, v) if packing is None else (q, q, q)))
    if not (
        causal.__class__ is return_lse.__class__ is bool
        and return_softmax.__class__ is deterministic.__class__ is bool
        and (pack_gqa is None or pack_gqa.__class__ is bool)
    ):  # in spite of the annotations, which nobody enforces
        causal, return_lse, return_softmax, deterministic, pack_gqa = (  # type: ignore[unreachable]
            attention_flags(causal, return_lse, return_softmax, deterministic, pack_gqa)
        )
    if torch.is_autocast_enabled() or not q.is_cuda:
        q, k, v = autocast.cast(q, k, v)
    if alibi_slopes is not None and torch.is_grad_enabled():
        refuse_alibi_gradient(alibi_slopes)
    differentiable = torch.is_grad_enabled() and (
        q.requires_grad
        or (k is not None and k.requires_grad)
        or (v is not None and v.requires_grad)
    )
    if not direct or (differentiable and (q.is_cuda or simulated_arch() is not None)):
        options = Options(
            max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, attention_chunk,
            softcap, dropout_p, return_lse, return_softmax, deterministic, packing,
            backward_backend, sm_margin, pack_gqa,
        )  # fmt: skip
        tensors: tuple[Tensor | None, ...] = (
            q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, alibi_slopes,
        )  # fmt: skip
        if not compiling and not direct:
            return watched.attention(tensors, options)
        if differentiable:
            if compiling:
                tensors = traced.distinct(*tensors)
            return _three(_Attention.apply(*tensors, options))  # type: ignore[no-untyped-call]
    if packing is not None:
        q, k, v = unpack(q, k, v, packing)
    run: Any = traced.forward if compiling else forward
    out, softmax_lse, s_dmask, _ = run(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k,
        softmax_scale, causal, window_size, attention_chunk, softcap, alibi_slopes, dropout_p,
        return_lse, return_softmax, sm_margin=sm_margin, pack_gqa=pack_gqa,
    )  # fmt: skip
    return out, softmax_lse, s_dmask


class Options(NamedTuple):
    """What a differentiable call has besides tensors."""

    max_seqlen_q: int | Tensor | None
    max_seqlen_k: int | Tensor | None
    softmax_scale: float | None
    causal: bool
    window_size: Any
    attention_chunk: int
    softcap: float
    dropout_p: float
    return_lse: bool
    return_softmax: bool
    deterministic: bool
    packing: Packing | None
    backward_backend: str | None
    sm_margin: int
    pack_gqa: bool | None


class _Attention(torch.autograd.Function):
    """Attention of q, k and v, packed or not. Saves them as they came, out and softmax_lse."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        seqused_q: Tensor | None,
        seqused_k: Tensor | None,
        alibi_slopes: Tensor | None,
        options: Options,
    ) -> Any:
        """out, or (out, softmax_lse), or (out, softmax_lse, s_dmask): what the call asks for."""
        o = options
        run = traced.forward if is_compiling() else forward
        out, softmax_lse, s_dmask, rng_state = run(
            *unpack(q, k, v, o.packing), cu_seqlens_q, cu_seqlens_k, o.max_seqlen_q,
            o.max_seqlen_k, seqused_q, seqused_k, o.softmax_scale, o.causal, o.window_size,
            o.attention_chunk, o.softcap, alibi_slopes, o.dropout_p, True, o.return_softmax,
            sm_margin=o.sm_margin, pack_gqa=o.pack_gqa,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            q, k, v, out, softmax_lse, rng_state, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
            alibi_slopes,
        )  # fmt: skip
        ctx.options = options
        if not is_compiling():
            ctx.simulated_arch = simulated_arch()
        if not o.return_lse:
            return out
        if s_dmask is None:
            return out, softmax_lse
        ctx.mark_non_differentiable(s_dmask)
        return out, softmax_lse, s_dmask

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Any = None, unused: Any = None) -> Any:
        q, k, v, out, *others = ctx.saved_tensors
        o = ctx.options
        numbers: tuple[Any, ...] = (
            o.max_seqlen_q, o.max_seqlen_k, o.softmax_scale, o.causal, o.window_size,
            o.attention_chunk, o.softcap, o.dropout_p, o.deterministic, o.backward_backend,
        )  # fmt: skip
        if dout is None:  # only softmax_lse was used
            dout = torch.zeros_like(out)
        if is_compiling():
            results = traced.backward(dout, dlse, q, k, v, o.packing, out, *others, *numbers)
        else:
            arch = ctx.simulated_arch
            run = gradients if _direct_backward(dout, dlse, q) else traced.backward
            with torch.no_grad(), nullcontext() if arch is None else simulate(arch):
                results = run(dout, dlse, q, k, v, o.packing, out, *others, *numbers)
            if torch.is_grad_enabled():  # create_graph=True
                results = NoSecondBackward.apply(*results, q, k, v)  # type: ignore[no-untyped-call]
        return (*results, None, None, None, None, None, None)


def _direct_backward(dout: Tensor, dlse: Tensor | None, q: Tensor) -> bool:
    """Whether the gradients that arrive are plain tensors with memory, and nobody watches the
    backward. The forward was direct, but a gradient may come from a collective, or be zero."""
    other = dout if dlse is None else dlse
    return unwatched(dout, q, other) and dout.data_ptr() != 0 and other.data_ptr() != 0


def _three(results: Any) -> ForwardResult:
    """A tensor or up to three, as (out, softmax_lse, s_dmask)."""
    if isinstance(results, Tensor):
        return results, None, None
    out, softmax_lse, s_dmask = (*results, None, None)[:3]
    return out, softmax_lse, s_dmask
