"""Where gradients meet dispatch: called by the public functions of `functions.py` and `fa2.py`.

Today: forward only on GPUs; CPU tensors run the reference, which autograd differentiates by
itself. The backward will be a torch.autograd.Function in place of the refusal below; what it has
to save is what `dispatch.forward` returns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common.checks import check_tensors
from .backends import ForwardResult
from .dispatch import forward
from .simulation import simulated_arch


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
) -> ForwardResult:
    """(out, softmax_lse, s_dmask) of one call, any layout. Arguments as in `checks.ForwardCall`.

    return_lse: somebody will see softmax_lse; otherwise it is neither allocated nor written.
    """
    check_tensors(q, k, v)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        _refuse_gradients_of_kernels(q)
    out, softmax_lse, s_dmask, _ = forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k,
        softmax_scale, causal, window_size, attention_chunk, softcap, alibi_slopes, dropout_p,
        return_lse, return_softmax,
    )  # fmt: skip
    return out, softmax_lse, s_dmask


def _refuse_gradients_of_kernels(q: Tensor) -> None:
    if q.device.type == "cpu" and simulated_arch() is None:
        return
    raise NotImplementedError(
        "q, k or v requires a gradient, but the kernels have no backward yet. Call it under "
        "torch.no_grad() or torch.inference_mode(), or use CPU tensors, whose reference is "
        "differentiable."
    )
