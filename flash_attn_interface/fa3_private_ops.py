"""FlashAttention-3's private operations, `flash_attn_3::_flash_attn_forward` and its like.

TransformerEngine, Megatron and others call them as `flash_attn_interface._flash_attn_forward` or
from `flash_attn_3.flash_attn_interface`, by position or keyword; names, order and defaults are
those of FlashAttention-3 3.0.0. FlashAttention-2's are in `private_ops.py`. `fa3_library.py` offers
the same under the names of FlashAttention-3's C++ library.

An out and a softmax_lse that were merged over several key blocks give the backward's partial
gradients. softmax_lse is -inf where a row sees no key; the backward takes +inf for the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dispatch
from ._common.check_backward import check_gradients
from ._common.check_overlap import check_outputs
from ._common.check_tensors import require_tensor
from .custom_op import custom_op
from .functions import _check_hints
from .gradients import empty_gradient
from .kvcache import flash_attn_with_kvcache
from .ops import Results, attention_backward, complete, fake_results
from .out_argument import check_attention_out
from .watchers import refuse_forward_mode


@custom_op(
    "flash_attn_3::_flash_attn_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, Tensor? qv=None, "
    "Tensor? out_=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? seqused_k=None, "
    "SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, Tensor? page_table=None, "
    "Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, "
    "Tensor? k_descale=None, Tensor? v_descale=None, float? softmax_scale=None, "
    "bool causal=False, SymInt window_size_left=-1, SymInt window_size_right=-1, "
    "SymInt attention_chunk=0, float softcap=0.0, bool rotary_interleaved=True, "
    "Tensor? scheduler_metadata=None, SymInt num_splits=1, bool? pack_gqa=None, "
    "SymInt sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    qv: Tensor | None = None,
    out_: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    kv_batch_idx: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    seqlens_rotary: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Results:
    """(out, softmax_lse, out_accum, softmax_lse_accum); the last two are always empty.

    With any of k_new, page_table, kv_batch_idx, leftpad_k, rotary_cos and their kin, and with qv, k
    and v are the cache of `flash_attn_with_kvcache`, seqused_k its cache_seqlens, and k_new and
    v_new are appended in place. As in FlashAttention-3 the schema does not say so, and
    torch.compile must not see such a call, nor one with out_.

    out_: also receives out; any strides. Other arguments as in `flash_attn_varlen_func` and
    `flash_attn_with_kvcache`. Differentiable in q, k and v where there is no cache.
    """
    refuse_forward_mode(q, k, v)
    if out_ is not None:
        check_forward_out("out_", out_, q, k, v, k_new)
    window_size = (window_size_left, window_size_right)
    given = _first_cache_argument(
        k_new=k_new, v_new=v_new, cu_seqlens_k_new=cu_seqlens_k_new, page_table=page_table,
        kv_batch_idx=kv_batch_idx, leftpad_k=leftpad_k, rotary_cos=rotary_cos,
        rotary_sin=rotary_sin, seqlens_rotary=seqlens_rotary, qv=qv,
    )  # fmt: skip
    # A cache in all but name, whose keys may be split among CTAs.
    decoding = seqused_k is not None and seqused_q is None and cu_seqlens_k is None
    if given is not None or (decoding and num_splits != 1):
        _check_cache_call(given, cu_seqlens_k, seqused_q)
        out, softmax_lse, *_ = flash_attn_with_kvcache(
            q, k, v, k_new, v_new, qv, rotary_cos, rotary_sin, seqused_k, kv_batch_idx, leftpad_k,
            page_table, cu_seqlens_q, cu_seqlens_k_new, max_seqlen_q, seqlens_rotary, q_descale,
            k_descale, v_descale, softmax_scale, causal, window_size, attention_chunk, softcap,
            rotary_interleaved, scheduler_metadata, num_splits, pack_gqa, sm_margin,
            return_softmax_lse=True,
        )  # fmt: skip
        softmax_lse = softmax_lse.contiguous()
    else:
        _check_hints(softmax_scale, qv, q_descale, k_descale, v_descale, num_splits, sm_margin)
        out, softmax_lse, *_ = complete(
            dispatch.forward(
                q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q,
                seqused_k, softmax_scale, causal, window_size, attention_chunk, softcap, None, 0.0,
                True, False, sm_margin=sm_margin, pack_gqa=pack_gqa,
            )
        )  # fmt: skip
    if out_ is not None:
        out_.copy_(out)
    return out, softmax_lse, *no_accumulators(q)


def _first_cache_argument(**arguments: Tensor | None) -> str | None:
    return next((name for name, value in arguments.items() if value is not None), None)


def check_forward_out(name: str, destination: Any, q: Any, k: Any, v: Any, k_new: Any) -> None:
    """That the result can be written there, also beside k and v, which are where k_new is given."""
    for of, tensor in (("q", q), ("k", k), ("v", v)):
        require_tensor(of, tensor)
        if tensor.ndim == 0:
            raise ValueError(f"{of} is a scalar: expected (..., num_heads, head_dim)")
    check_attention_out(name, destination, q, v)
    if k_new is not None:
        check_outputs({name: destination, "k": k, "v": v}, {})


def _check_cache_call(given: str | None, cu_seqlens_k: Any, seqused_q: Any) -> None:
    if cu_seqlens_k is not None:
        raise ValueError(
            f"cu_seqlens_k is given together with {given}: k and v are either packed sequences or "
            "a cache, whose lengths are seqused_k"
        )
    if seqused_q is not None:
        raise NotImplementedError(
            f"seqused_q is not supported together with {given}: pack the queries and pass "
            "cu_seqlens_q"
        )


def no_accumulators(q: Tensor) -> tuple[Tensor, Tensor]:
    """Results of parts of the keys: they never leave the kernels' workspace."""
    return q.new_empty(0, dtype=torch.float32), q.new_empty(0, dtype=torch.float32)


@_flash_attn_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    qv: Tensor | None = None,
    out_: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    *others: object,
    **keywords: object,
) -> Results:
    for name, value in (("k_new", k_new), ("out_", out_)):
        if value is not None:
            raise NotImplementedError(
                f"{name} under torch.compile: flash_attn_3::_flash_attn_forward writes to an "
                "argument that its schema, FlashAttention-3's, calls read-only. Call "
                "flash_attn_interface.flash_attn_with_kvcache, or copy the result yourself."
            )
    return fake_forward(q, v, cu_seqlens_q)


def fake_forward(q: Tensor, v: Tensor, cu_seqlens_q: Tensor | None) -> Results:
    """Shapes of the results. v may be a cache, even a paged one."""
    out, softmax_lse, *_ = fake_results(q, v, v, cu_seqlens_q, None, 0, 0, False)
    return out, softmax_lse, *no_accumulators(q)


@custom_op(
    "flash_attn_3::_flash_attn_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? sequed_q=None, "
    "Tensor? sequed_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, "
    "Tensor(a12!)? dq=None, Tensor(a13!)? dk=None, Tensor(a14!)? dv=None, "
    "float? softmax_scale=None, bool is_causal=False, SymInt window_size_left=-1, "
    "SymInt window_size_right=-1, float softcap=0.0, bool deterministic=False, "
    "SymInt sm_margin=0) -> Tensor",
)
def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sequed_q: Tensor | None = None,
    sequed_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> Tensor:
    """Writes dq, dk and dv, which may have any strides; one that is None is computed and dropped.

    Returns softmax_d = rowsum(dout * out), float32 (batch, num_heads_q, seqlen_q rounded up to
    128), or (num_heads_q, total_q + 128 * batch) with cu_seqlens_q.

    sequed_q, sequed_k: seqused_q and seqused_k of the forward; the spelling is upstream's.
    """
    softmax_d, *_ = backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, sequed_q,
        sequed_k, max_seqlen_q, max_seqlen_k, softmax_scale, is_causal, window_size_left,
        window_size_right, softcap, deterministic,
    )  # fmt: skip
    return softmax_d


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(softmax_d, dq, dk, dv), the gradients being those given, if any."""
    dq = empty_gradient(q) if dq is None else dq
    dk = empty_gradient(k) if dk is None else dk
    dv = empty_gradient(v) if dv is None else dv
    check_gradients(q, k, v, dout, out, softmax_lse, dq, dk, dv)
    if cu_seqlens_q is not None and softmax_lse.ndim == 3 and softmax_lse.shape[0] == 1:
        softmax_lse = softmax_lse[0]  # xformers keeps it so; FlashAttention-3 takes either
    softmax_d = dispatch.backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, seqused_q, seqused_k, softmax_scale, causal,
        (window_size_left, window_size_right), 0, softcap, None, 0.0, None, deterministic,
    )  # fmt: skip
    return softmax_d, dq, dk, dv


@_flash_attn_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    *others: object,
    **keywords: object,
) -> Tensor:
    return fake_softmax_d(q, cu_seqlens_q)


def fake_softmax_d(q: Tensor, cu_seqlens_q: Tensor | None) -> Tensor:
    """Shape of softmax_d."""
    *rows, num_heads_q, _ = q.shape
    if cu_seqlens_q is None:
        dense = (rows[0], num_heads_q, (rows[1] + 127) // 128 * 128)
        return q.new_empty(dense, dtype=torch.float32)
    packed = (num_heads_q, rows[0] + 128 * (cu_seqlens_q.shape[0] - 1))
    return q.new_empty(packed, dtype=torch.float32)


# ---- Differentiating the forward ---------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    (
        q, k, v, k_new, v_new, qv, _, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q,
        seqused_k, max_seqlen_q, max_seqlen_k, *cache, _, _, _, softmax_scale, causal, left, right,
        attention_chunk, softcap, _, _, num_splits, _, _,
    ) = inputs  # fmt: skip
    out, softmax_lse, out_accum, softmax_lse_accum = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(out_accum, softmax_lse_accum)
    ctx.save_for_backward(
        q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k
    )
    ctx.options = (
        max_seqlen_q or 0, max_seqlen_k or 0, softmax_scale, causal, left, right, attention_chunk,
        softcap, 0.0,
    )  # fmt: skip
    ctx.is_cache = any(x is not None for x in (k_new, v_new, cu_seqlens_k_new, *cache))
    ctx.has_qv = qv is not None
    ctx.num_inputs = len(inputs)


def _differentiate(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, *unused: object
) -> tuple[Tensor | None, ...]:
    if ctx.has_qv:
        raise NotImplementedError(
            "flash_attn_3::_flash_attn_forward has no gradient with qv; call it under "
            "torch.no_grad(), or concatenate q = cat([q, qv], -1), k = cat([k, v], -1) with "
            "softmax_scale = (head_dim_qk + head_dim_v) ** -0.5"
        )
    if ctx.is_cache:
        raise NotImplementedError(
            "flash_attn_3::_flash_attn_forward has no gradient with a key and value cache; call it "
            "under torch.no_grad(), or on k and v without page_table and its like"
        )
    q, k, v, out, softmax_lse, cu_q, cu_k, seqused_q, seqused_k = ctx.saved_tensors
    dq, dk, dv = attention_backward(
        torch.zeros_like(out) if dout is None else dout, dlse, q, k, v, 0, [], out, softmax_lse,
        None, cu_q, cu_k, seqused_q, seqused_k, None, *ctx.options,
        torch.are_deterministic_algorithms_enabled(), None,
    )  # fmt: skip
    return (dq, dk, dv, *([None] * (ctx.num_inputs - 3)))


_flash_attn_forward.register_autograd(_differentiate, setup_context=_save)
