"""Gradients of q, k and v, also where they share a tensor. Called by `autograd.py` and `ops.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .packing import Packing, unpack

Gradients = tuple[Tensor, Tensor | None, Tensor | None]
"""Of (q, k, v), or (q, kv, None), or (qkv, None, None)."""


def gradients(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    packing: Packing | None,
    *others: Any,
) -> Gradients:
    """New tensors, into whose views the kernels write.

    packing: where k, or k and v, are. others: arguments of `dispatch.backward`, see `_run`.
    """
    dq = empty_gradient(q)
    dk = None if k is None else empty_gradient(k)
    dv = None if v is None else empty_gradient(v)
    _run(dout, dlse, unpack(q, k, v, packing), unpack(dq, dk, dv, packing), *others)
    return dq, dk, dv


def _run(
    dout: Tensor,
    dlse: Tensor | None,
    inputs: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    softmax_lse: Tensor,
    rng_state: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    alibi_slopes: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    attention_chunk: int,
    softcap: float,
    dropout_p: float,
    deterministic: bool,
    backend: str | None,
) -> None:
    dispatch.backward(
        dout, *inputs, out, softmax_lse, *results, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, seqused_q, seqused_k, softmax_scale, causal, window_size, attention_chunk,
        softcap, alibi_slopes, dropout_p, rng_state, deterministic, dlse, backend,
    )  # fmt: skip


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
