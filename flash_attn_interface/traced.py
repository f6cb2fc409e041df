"""The custom operations that express a call, while torch.compile or torch.export traces and for
tensors that somebody watches.

Called by `autograd.py` and `watched.py` in place of `dispatch.forward` and `gradients.gradients`,
with the same arguments. Nothing here looks at data, devices or plans: the operations do when the
program runs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._common.check_values import default_softmax_scale, window_pair
from .dispatch import ForwardState
from .gradients import Gradients
from .ops import Results, attention_backward, attention_forward
from .packing import Packing
from .private_ops import _flash_attn_forward, _flash_attn_varlen_forward


def forward(
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
    sm_margin: int = 0,
    pack_gqa: bool | None = None,
) -> ForwardState:
    """The results that the call asks for; the others are None."""
    out, softmax_lse, s_dmask, rng_state = operators(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k,
        softmax_scale, causal, window_size, attention_chunk, softcap, alibi_slopes, dropout_p,
        return_lse, return_softmax, sm_margin, pack_gqa,
    )  # fmt: skip
    return (
        out,
        softmax_lse if return_lse else None,
        s_dmask if return_softmax and dropout_p > 0.0 else None,
        rng_state if dropout_p > 0.0 else None,
    )


def operators(
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
    sm_margin: int = 0,
    pack_gqa: bool | None = None,
) -> Results:
    """FlashAttention-2's operations wherever they do, since checkpointing policies list them.

    All results are tensors. sm_margin, pack_gqa: hints, which the operations do not take.
    """
    left, right = window_pair(window_size)
    return_softmax = return_softmax and dropout_p > 0.0
    common = (causal, left, right, softcap, alibi_slopes, return_softmax)
    scale = default_softmax_scale(q.shape[-1]) if softmax_scale is None else softmax_scale
    longest = (_bound(max_seqlen_q, q), _bound(max_seqlen_k, k))
    lacking = attention_chunk != 0 or seqused_q is not None
    if not lacking and cu_seqlens_q is None and cu_seqlens_k is None and seqused_k is None:
        results: Results = _flash_attn_forward(q, k, v, dropout_p, scale, *common)
    elif not lacking and cu_seqlens_q is not None and cu_seqlens_k is not None:
        results = _flash_attn_varlen_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, dropout_p, scale, *common,
            seqused_k=seqused_k,
        )  # fmt: skip
    else:
        results = attention_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, seqused_q, seqused_k, scale, causal,
            left, right, attention_chunk, softcap, alibi_slopes, dropout_p, return_softmax,
        )  # fmt: skip
    return results


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    packing: Packing | None,
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
) -> Gradients:
    """The gradients of the tensors that there are, in their places."""
    left, right = window_pair(window_size)
    axis, heads = (0, ()) if packing is None else packing
    found = attention_backward(
        dout, dlse, q, k, v, axis, list(heads), out, softmax_lse, rng_state, cu_seqlens_q,
        cu_seqlens_k, seqused_q, seqused_k, alibi_slopes, _bound(max_seqlen_q, q),
        _bound(max_seqlen_k, q if k is None else k), softmax_scale, causal, left, right,
        attention_chunk, softcap, dropout_p, deterministic, backend,
    )  # fmt: skip
    return found[0], None if k is None else found[1], None if v is None else found[2]


def distinct(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Views in place of repetitions, say of cu_seqlens: Dynamo wants different tensors."""
    found: list[Tensor | None] = []
    for tensor in tensors:
        repeated = tensor is not None and any(tensor is other for other in found)
        found.append(tensor.view(tensor.shape) if tensor is not None and repeated else tensor)
    return tuple(found)


def _bound(max_seqlen: int | Tensor | None, packed: Tensor) -> int:
    """Reading a tensor would break the graph; the rows of the packed tensor bound it as well."""
    if isinstance(max_seqlen, Tensor):
        return packed.shape[0]
    return 0 if max_seqlen is None else max_seqlen  # None: not ragged, it is not read
