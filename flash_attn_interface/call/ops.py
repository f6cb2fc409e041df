"""The whole of attention as two custom operations, for torch.compile and torch.export.

`traced.py` calls them where FlashAttention-2's operations (`fa2_ops.py`) lack an argument, and
for every backward. Both are functional, that is, they write only tensors that they make: what
mutates views of one buffer is at the mercy of the compiler's functionalisation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._common.ask.call import Call, Options, Sequences, Tensors
from .._common.ask.out_layout import new_out
from . import dispatch
from .custom_op import custom_op
from .gradients import Forward, empty_gradient, gradients
from .packing import Packing
from .watchers import refuse_forward_mode

Results = tuple[Tensor, Tensor, Tensor, Tensor]
"""(out, softmax_lse, s_dmask, rng_state). s_dmask is (0,) and rng_state zero if not asked for."""


@custom_op(
    "flash_attn_interface::attention_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? seqused_q, Tensor? seqused_k, "
    "float softmax_scale, bool causal, SymInt window_size_left, "
    "SymInt window_size_right, SymInt attention_chunk, float softcap, "
    'Tensor? alibi_slopes, float dropout_p, bool return_softmax, str extra="") -> (Tensor, Tensor, '
    "Tensor, Tensor)",
    random=True,
)
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    attention_chunk: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    return_softmax: bool,
    extra: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`dispatch.run`, all of whose results are tensors. Its autograd is `autograd.py`."""
    refuse_forward_mode(q, k, v)
    options = Options(
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=(window_size_left, window_size_right),
        attention_chunk=attention_chunk,
        softcap=softcap,
        dropout_p=dropout_p,
        return_lse=True,
        return_softmax=return_softmax,
        extra=extra,
    )
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    tensors = Tensors(q, k, v, *lengths, alibi_slopes)
    return complete(
        dispatch.run(Call(tensors, Sequences(max_seqlen_q, max_seqlen_k), None, options))
    )


@attention_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    attention_chunk: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    return_softmax: bool,
    extra: str = "",
) -> Results:
    return fake_results(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        return_softmax and dropout_p > 0.0,
    )  # fmt: skip


@custom_op(
    "flash_attn_interface::attention_backward",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor? k, Tensor? v, SymInt packing_axis, "
    "SymInt[] packing_heads, Tensor out, Tensor softmax_lse, Tensor? rng_state, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, "
    "Tensor? alibi_slopes, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "float? softmax_scale, bool causal, SymInt window_size_left, "
    "SymInt window_size_right, SymInt attention_chunk, float softcap, float dropout_p, "
    'bool deterministic, str? backend, str extra="") -> (Tensor, Tensor, Tensor)',
)
def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    packing_axis: int,
    packing_heads: list[int],
    out: Tensor,
    softmax_lse: Tensor,
    rng_state: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    attention_chunk: int,
    softcap: float,
    dropout_p: float,
    deterministic: bool,
    backend: str | None,
    extra: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; (0,) for k or v that is None. See `gradients.py`."""
    options = Options(
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=(window_size_left, window_size_right),
        attention_chunk=attention_chunk,
        softcap=softcap,
        dropout_p=dropout_p,
        deterministic=deterministic,
        packing=Packing(packing_axis, tuple(packing_heads)),
        backward_backend=backend,
        extra=extra,
    )
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    tensors = Tensors(q, k, v, *lengths, alibi_slopes)
    call = Call(tensors, Sequences(max_seqlen_q, max_seqlen_k), None, options)
    results = gradients(call, Forward(out, softmax_lse, rng_state), dout, dlse)
    dq, dk, dv = results
    return dq, dq.new_empty(0) if dk is None else dk, dq.new_empty(0) if dv is None else dv


@attention_backward.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    *others: object,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        empty_gradient(q),
        q.new_empty(0) if k is None else empty_gradient(k),
        q.new_empty(0) if v is None else empty_gradient(v),
    )


def complete(state: dispatch.ForwardState) -> Results:
    """The results of an operation: all tensors, laid out as `fake_results` says."""
    out, softmax_lse, s_dmask, rng_state = state
    assert softmax_lse is not None
    return (
        out,
        softmax_lse.contiguous(),
        out.new_empty(0) if s_dmask is None else s_dmask,
        out.new_zeros(2, dtype=torch.int64) if rng_state is None else rng_state,
    )


def fake_results(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    return_softmax: bool,
) -> Results:
    """Shapes of the results, whatever the backend."""
    *rows, num_heads_q, _ = q.shape
    lse_shape = (rows[0], num_heads_q, rows[1]) if cu_seqlens_q is None else (num_heads_q, rows[0])
    s_dmask = q.new_empty(0)
    if return_softmax:
        batch = rows[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        seqlen_q = rows[1] if cu_seqlens_q is None else max_seqlen_q
        seqlen_k = k.shape[1] if cu_seqlens_k is None else max_seqlen_k
        lengths = ((length + 127) // 128 * 128 for length in (seqlen_q, seqlen_k))
        s_dmask = q.new_empty((batch, num_heads_q, *lengths))
    return (
        new_out(q, v.shape[-1]),
        q.new_empty(lse_shape, dtype=torch.float32),
        s_dmask,
        q.new_empty(2, dtype=torch.int64),
    )
