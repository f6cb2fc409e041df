"""Attention of tensors that somebody watches (`watchers.py`): through the registered operators.

Called by `autograd.py` in place of its direct way. The operators are those that torch.compile sees
(`traced.py`): torch's dispatcher unwraps tensor subclasses, shows the operators to modes, and
computes shapes alone for fake and meta tensors.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .._common.ask.call import Call, Tensors
from .._common.ask.check_tensors import refuse_layouts
from .._common.ask.check_values import flag, probability, window_pair
from .._common.ask.checks import check_rows
from . import dispatch, traced
from .backends import ForwardResult
from .gradients import Forward
from .packing import unpacked
from .sharding import on_one_mesh
from .simulation import simulate, simulated_arch
from .watchers import a_transform_is, differentiates, refuse_forward_mode, tracing


def attention(call: Call) -> ForwardResult:
    """(out, softmax_lse, s_dmask), with gradients."""
    call = unpacked(call)
    tensors, sequences, _, o = call
    if tensors.q.device.type == "cpu" and simulated_arch() is None and differentiates(*tensors):
        out, softmax_lse, s_dmask, _ = dispatch.run(call)
        return out, softmax_lse, s_dmask
    refuse_forward_mode(*tensors)
    refuse_layouts(**tensors._asdict())
    check_rows("q", tensors.q, tensors.cu_seqlens_q, "cu_seqlens_q")
    o = o._replace(
        causal=flag("causal", o.causal),
        window_size=window_pair(o.window_size),
        dropout_p=probability("dropout_p", o.dropout_p),
        deterministic=flag("deterministic", o.deterministic),
        packing=None,
    )
    if o.dropout_p > 0.0 and a_transform_is("Vmap"):
        raise NotImplementedError(
            "dropout_p > 0 under torch.vmap: its randomness argument does not reach the kernels. "
            "Put the mapped dimension into the batch, or pass dropout_p=0.0."
        )
    tensors = Tensors(*on_one_mesh(tensors, o.dropout_p))
    differentiable = a_transform_is("Grad") or (
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors[:3])
    )
    if differentiable and not tracing():
        results = _Attention.apply(*tensors, sequences, o)  # type: ignore[no-untyped-call]
    else:  # a trace records operators, which know their own gradients
        results = traced.operators(Call(tensors, sequences, None, o))
    out, softmax_lse, s_dmask, _ = results
    return (
        out,
        softmax_lse if o.return_lse else None,
        s_dmask if o.return_softmax and o.dropout_p > 0.0 else None,
    )


class _Attention(torch.autograd.Function):
    """As `autograd._Attention`, in the form that the transforms of torch.func take apart."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        """(out, softmax_lse, s_dmask, rng_state) of the tensors, sequences and options."""
        *tensors, sequences, options = inputs
        return traced.operators(Call(Tensors(*tensors), sequences, None, options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, sequences, options = inputs
        out, softmax_lse, s_dmask, rng_state = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(s_dmask, rng_state)
        ctx.save_for_backward(*tensors, out, softmax_lse, rng_state)
        ctx.sequences, ctx.options = sequences, options
        ctx.simulated_arch = simulated_arch()

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *unused: Any) -> Any:
        *tensors, out, softmax_lse, rng_state = ctx.saved_tensors
        call = Call(Tensors(*tensors), ctx.sequences, None, ctx.options)
        of_forward = Forward(out, softmax_lse, rng_state if ctx.options.dropout_p > 0.0 else None)
        arch = ctx.simulated_arch
        with torch.no_grad(), nullcontext() if arch is None else simulate(arch):
            results: tuple[Any, ...] = traced.backward(
                call, of_forward, torch.zeros_like(out) if dout is None else dout, dlse
            )
        if torch.is_grad_enabled():  # create_graph=True
            results = NoSecondBackward.apply(*results, *tensors[:3])  # type: ignore[no-untyped-call]
        return (*results, *([None] * (len(tensors) - 1)))


class NoSecondBackward(torch.autograd.Function):
    """Passes the gradients on; differentiating them is an error that says so."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        dq: Tensor, dk: Tensor | None, dv: Tensor | None, *inputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        """inputs: what the gradients are of, so that these require gradients too."""
        return dq, dk, dv

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        raise RuntimeError(
            "flash_attn_interface: the gradient of attention was differentiated once more, which "
            "the kernels cannot do. For second derivatives use torch.autograd on CPU tensors, "
            "whose reference is differentiable any number of times, or "
            "scaled_dot_product_attention of torch.nn.functional under "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
        )
