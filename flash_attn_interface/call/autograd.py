"""Where gradients meet dispatch: called by all public functions, each with one `Call`.

Eager calls on plain tensors go straight to `dispatch.py`. Under torch.compile the same autograd
function calls the custom operations of `fa2_ops.py` and `ops.py` instead, which come back to
`dispatch.py` at run time; `watched.py` does likewise for tensors that somebody watches. CPU tensors
that no simulator takes run the reference, which autograd differentiates by itself.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._common.ask.call import Call, Tensors
from .._common.ask.check_tensors import check_sink_kind, check_tensors
from .._common.ask.check_values import with_flags
from . import autocast, cached, dispatch, paged, sinks, traced, watched
from .backends import ForwardResult
from .gradients import Forward, gradients, refuse_alibi_gradient
from .packing import unpacked
from .simulation import simulate, simulated_arch
from .watched import NoSecondBackward
from .watchers import all_plain, has_plain_type, unwatched


def attention(call: Call) -> ForwardResult:
    """(out, softmax_lse, s_dmask) of one call.

    softmax_lse is None unless `return_lse`: then, and without gradients, it is neither allocated
    nor written.
    """
    tensors, sequences, cache, options = call
    if cache is not None:
        return cached.attention(call)
    (
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, alibi_slopes, page_table, _, _,
        s_aux,
    ) = tensors  # fmt: skip
    if s_aux is not None:
        check_tensors(q, q, q)
        check_sink_kind(s_aux, q.device)
    if page_table is not None:
        return paged.attention(call)
    packing = options.packing
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
        options.causal.__class__ is options.return_lse.__class__ is bool
        and options.return_softmax.__class__ is options.deterministic.__class__ is bool
        and (options.pack_gqa is None or options.pack_gqa.__class__ is bool)
    ):  # in spite of the annotations, which nothing enforces
        options = with_flags(options)  # type: ignore[unreachable]
        call = Call(tensors, sequences, None, options)
    if torch.is_autocast_enabled() or not q.is_cuda:
        q, k, v = autocast.cast(q, k, v)
        tensors = Tensors(q, k, v, *tensors[3:])
        call = Call(tensors, sequences, None, options)
    if alibi_slopes is not None and torch.is_grad_enabled():
        refuse_alibi_gradient(alibi_slopes)
    differentiable = torch.is_grad_enabled() and (
        q.requires_grad
        or (k is not None and k.requires_grad)
        or (v is not None and v.requires_grad)
    )
    if s_aux is not None:
        if (
            not direct
            or not all_plain(s_aux)
            or (
                (differentiable or not sinks.takes_no_gradient(s_aux))
                and (q.is_cuda or simulated_arch() is not None)
            )
        ):
            return sinks.composed(call, attention)
        call = sinks.for_kernels(call)
    if not direct or (differentiable and (q.is_cuda or simulated_arch() is not None)):
        if not compiling and not direct:
            return watched.attention(call)
        if differentiable:
            inputs: tuple[Tensor | None, ...] = tensors
            if compiling:
                inputs = traced.distinct(*tensors)
            results = _Attention.apply(*inputs, sequences, options)  # type: ignore[no-untyped-call]
            return _three(results)
    if packing is not None:
        call = unpacked(call)
    run = traced.forward if compiling else dispatch.run
    out, softmax_lse, s_dmask, _ = run(call)
    return out, softmax_lse, s_dmask


class _Attention(torch.autograd.Function):
    """Attention of a call, packed or not. Saves it as it came, out and softmax_lse."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        """out, or (out, softmax_lse), or (out, softmax_lse, s_dmask): what the call asks for.

        inputs: the fields of `Tensors`, sequences, options.
        """
        *given, sequences, options = inputs
        call = Call(Tensors(*given), sequences, None, options)
        run = traced.forward if is_compiling() else dispatch.run
        out, softmax_lse, s_dmask, rng_state = run(unpacked(call), True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given, out, softmax_lse, rng_state)
        ctx.sequences, ctx.options = sequences, options
        if not is_compiling():
            ctx.simulated_arch = simulated_arch()
        if not options.return_lse:
            return out
        if s_dmask is None:
            return out, softmax_lse
        ctx.mark_non_differentiable(s_dmask)
        return out, softmax_lse, s_dmask

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Any = None, unused: Any = None) -> Any:
        *saved, out, softmax_lse, rng_state = ctx.saved_tensors
        call = Call(Tensors(*saved), ctx.sequences, None, ctx.options)
        if dout is None:  # only softmax_lse was used
            dout = torch.zeros_like(out)
        of_forward = Forward(out, softmax_lse, rng_state)
        if is_compiling():
            results = traced.backward(call, of_forward, dout, dlse)
        else:
            arch = ctx.simulated_arch
            run = gradients if _direct_backward(dout, dlse, saved[0]) else traced.backward
            with torch.no_grad(), nullcontext() if arch is None else simulate(arch):
                results = run(call, of_forward, dout, dlse)
            if torch.is_grad_enabled():  # create_graph=True
                results = NoSecondBackward.apply(*results, *saved[:3])  # type: ignore[no-untyped-call]
        return (*results, *([None] * (len(saved) - 1)))


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
