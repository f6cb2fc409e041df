"""The custom operations that express a call, while torch.compile or torch.export traces and for
tensors that are watched.

Called by `autograd.py` and `watched.py` in place of `dispatch.run` and `gradients.gradients`, with
the same arguments. Nothing here looks at data, devices or plans: the operations do when the program
runs.
"""

from __future__ import annotations

from torch import Tensor

from .._common.ask.call import Call, Options
from .._common.ask.check_values import default_softmax_scale, window_pair
from .dispatch import ForwardState
from .fa2_ops import _flash_attn_forward, _flash_attn_varlen_forward
from .gradients import Forward, Gradients
from .ops import Results, attention_backward, attention_forward


def forward(call: Call, keep_lse: bool = False) -> ForwardState:
    """The results that the call asks for; the others are None."""
    out, softmax_lse, s_dmask, rng_state = operators(call)
    options = call.options
    dropout = options.dropout_p > 0.0
    return (
        out,
        softmax_lse if options.return_lse or keep_lse else None,
        s_dmask if options.return_softmax and dropout else None,
        rng_state if dropout else None,
    )


def operators(call: Call) -> Results:
    """FlashAttention-2's operations wherever they do, since checkpointing policies list them.

    All results are tensors. sm_margin, pack_gqa: hints, which the operations do not take.
    """
    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, alibi_slopes, *_ = call.tensors
    options = call.options
    left, right = window_pair(options.window_size)
    dropout_p, scale = options.dropout_p, _scale(options, q)
    return_softmax = options.return_softmax and dropout_p > 0.0
    common = (options.causal, left, right, options.softcap, alibi_slopes, return_softmax)
    longest = _longest(call)
    lacking = options.attention_chunk != 0 or seqused_q is not None or options.extra != ""
    if not lacking and cu_seqlens_q is None and cu_seqlens_k is None and seqused_k is None:
        results: Results = _flash_attn_forward(q, k, v, dropout_p, scale, *common)
    elif not lacking and cu_seqlens_q is not None and cu_seqlens_k is not None:
        lengths = (cu_seqlens_q, cu_seqlens_k, *longest)
        results = _flash_attn_varlen_forward(
            q, k, v, *lengths, dropout_p, scale, *common, seqused_k=seqused_k
        )
    else:
        all_lengths = (cu_seqlens_q, cu_seqlens_k, *longest, seqused_q, seqused_k)
        mask = (options.causal, left, right, options.attention_chunk)
        score = (options.softcap, alibi_slopes, dropout_p, return_softmax, options.extra)
        results = attention_forward(q, k, v, *all_lengths, scale, *mask, *score)
    return results


def backward(call: Call, forward: Forward, dout: Tensor, dlse: Tensor | None) -> Gradients:
    """The gradients of the tensors that there are, in their places."""
    q, k, v, *lengths = call.tensors[:8]
    options = call.options
    axis, heads = (0, ()) if options.packing is None else options.packing
    mask = (options.causal, *window_pair(options.window_size), options.attention_chunk)
    score = (options.softcap, options.dropout_p)
    rest = (options.deterministic, options.backward_backend, options.extra)
    inputs = (dout, dlse, q, k, v, axis, list(heads), *forward, *lengths)
    numbers = (*_longest(call), options.softmax_scale, *mask, *score, *rest)
    found = attention_backward(*inputs, *numbers)
    return found[0], None if k is None else found[1], None if v is None else found[2]


def distinct(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Views in place of repetitions, say of cu_seqlens: Dynamo wants different tensors."""
    found: list[Tensor | None] = []
    for tensor in tensors:
        repeated = tensor is not None and any(tensor is other for other in found)
        found.append(tensor.view(tensor.shape) if tensor is not None and repeated else tensor)
    return tuple(found)


def _scale(options: Options, q: Tensor) -> float:
    scale = options.softmax_scale
    return default_softmax_scale(q.shape[-1]) if scale is None else scale


def _longest(call: Call) -> tuple[int, int]:
    q, k, _ = call.tensors[:3]
    sequences = call.sequences
    return (
        _bound(sequences.max_seqlen_q, q),
        _bound(sequences.max_seqlen_k, q if k is None else k),
    )


def _bound(max_seqlen: int | Tensor | None, packed: Tensor) -> int:
    """Reading a tensor would break the graph; the rows of the packed tensor bound it as well."""
    if isinstance(max_seqlen, Tensor):
        return packed.shape[0]
    return 0 if max_seqlen is None else max_seqlen  # None: not ragged, and without meaning
