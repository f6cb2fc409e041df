"""Gradients of q, k and v, also where they share a tensor. Called by `autograd.py` and `ops.py`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._common.ask.call import Backward, Call
from . import dispatch
from .packing import unpack, unpacked

Gradients = tuple[Tensor, Tensor | None, Tensor | None]
"""Of (q, k, v), or (q, kv, None), or (qkv, None, None)."""


class Forward(NamedTuple):
    """What a backward needs of the forward besides its call."""

    out: Tensor
    softmax_lse: Tensor
    rng_state: Tensor | None = None


def gradients(call: Call, forward: Forward, dout: Tensor, dlse: Tensor | None) -> Gradients:
    """New tensors, into whose views the kernels write. call: that of the forward, maybe packed."""
    q, k, v = call.tensors[:3]
    dq = empty_gradient(q)
    dk = None if k is None else empty_gradient(k)
    dv = None if v is None else empty_gradient(v)
    results = unpack(dq, dk, dv, call.options.packing)
    out, softmax_lse, rng_state = forward
    backward = Backward(dout, out, softmax_lse, *results, rng_state, dlse)
    dispatch.backward(unpacked(call), backward)
    return dq, dk, dv


def empty_gradient(tensor: Tensor) -> Tensor:
    """Laid out like `tensor` if that has no gaps; the last dim is contiguous in any case."""
    if tensor.stride()[-1:] == (1,):
        return torch.empty_like(tensor)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def refuse_alibi_gradient(alibi_slopes: Any) -> None:
    """NotImplementedError if autograd expects a gradient of alibi_slopes."""
    if getattr(alibi_slopes, "requires_grad", False):
        raise NotImplementedError(
            "alibi_slopes requires a gradient, which no kernel computes: pass "
            "alibi_slopes.detach(). To learn the slopes, give the biases to "
            "scaled_dot_product_attention of torch.nn.functional as attn_mask."
        )
