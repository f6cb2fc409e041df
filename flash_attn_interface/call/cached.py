"""Attention over a key and value cache: which way a call of flash_attn_with_kvcache takes.

Called by `autograd.py`. There are no gradients. Plain tensors go straight to `dispatch.py`, others
through the operators of `kv_ops.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._common.ask.call import Cache, Call, Tensors, cache_names
from .._common.ask.check_kv import check_cache_tensors, check_dense
from .._common.ask.check_tensors import check_sink_kind, refuse_layouts, require_tensor
from .._common.ask.check_values import with_cache_flags
from . import autocast, dispatch, sinks
from .backends import ForwardResult
from .inference_only import inference_only
from .kv_ops import CacheResult, traced
from .sharding import on_one_mesh, refuse_to_move_caches
from .watchers import (
    a_transform_is,
    all_plain,
    has_plain_type,
    refuse_forward_mode,
    unwatched,
)

_NO_BACKWARD = (
    "flash_attn_with_kvcache has no backward, it is for inference: train with flash_attn_func or "
    "flash_attn_varlen_func, or detach the output"
)


def attention(call: Call) -> ForwardResult:
    """(out, softmax_lse or None, None)."""
    if call.tensors.s_aux is not None:
        return _with_sinks(call)
    return _attention(call)


def _with_sinks(call: Call) -> ForwardResult:
    q, s_aux = call.tensors.q, call.tensors.s_aux
    require_tensor("q", q)
    check_sink_kind(s_aux, q.device)
    assert s_aux is not None
    without = call._replace(tensors=call.tensors._replace(s_aux=None))
    if _way(without) is _direct and sinks.takes_no_gradient(s_aux):
        return _attention(sinks.for_kernels(call))
    if torch.is_grad_enabled() and s_aux.requires_grad:
        raise NotImplementedError(
            "s_aux requires a gradient, but flash_attn_with_kvcache has no backward: pass "
            "s_aux.detach(), or train with flash_attn_func or flash_attn_varlen_func"
        )
    return sinks.composed(call, _attention)


def _attention(call: Call) -> ForwardResult:
    if torch.is_autocast_enabled() or not getattr(call.tensors.q, "is_cuda", False):
        call = _cast(call)
    try:
        out, softmax_lse = _way(call)(call)
    except RuntimeError:
        check_dense(call)
        raise
    return out, softmax_lse, None


def _cast(call: Call) -> Call:
    tensors, sequences, cache, options = call
    assert cache is not None
    q, k, v, qv, cos, sin = autocast.cast(tensors.q, *cache[:5], like=tensors.k)
    cache = Cache(k, v, qv, cos, sin, *cache[5:])
    return Call(Tensors(q, *tensors[1:]), sequences, cache, options)


def _way(call: Call) -> Callable[[Call], CacheResult]:
    """`_direct`, unless a compiler traces, the tensors are watched (`watchers.py`) or gradients are
    asked for."""
    if is_compiling():
        return _traced
    tensors, _, cache, _ = call
    assert cache is not None
    (
        q, k_cache, v_cache, cu_seqlens_q, _, _, _, alibi_slopes, page_table, cache_batch_idx,
        cache_leftpad, _,
    ) = tensors  # fmt: skip
    k, v, qv, rotary_cos, rotary_sin, cache_seqlens, cu_seqlens_k_new, rotary_seqlens = cache
    if not (
        unwatched(q, k_cache, v_cache)
        and (q.is_cuda or not q.is_meta)
        and (cache_seqlens is None or has_plain_type(cache_seqlens))
        and (page_table is None or has_plain_type(page_table))
        and (cache_batch_idx is None or has_plain_type(cache_batch_idx))
        and (cache_leftpad is None or has_plain_type(cache_leftpad))
        and (cu_seqlens_q is None or has_plain_type(cu_seqlens_q))
        and (k is None or all_plain(k, v))
        and (rotary_cos is None or all_plain(rotary_cos, rotary_sin))
        and (cu_seqlens_k_new is None or has_plain_type(cu_seqlens_k_new))
        and (rotary_seqlens is None or has_plain_type(rotary_seqlens))
        and (qv is None or all_plain(qv))
        and (alibi_slopes is None or all_plain(alibi_slopes))
    ):
        return _watched
    if torch.is_grad_enabled():
        for x in (q, k_cache, v_cache, k, v, qv, alibi_slopes, rotary_cos, rotary_sin):
            if x is not None and getattr(x, "requires_grad", False):
                return _without_gradients
    return _direct


def _direct(call: Call) -> CacheResult:
    options = call.options
    if not (
        options.causal.__class__ is options.rotary_interleaved.__class__ is bool
        and options.return_lse.__class__ is bool
    ):  # in spite of the annotations, which nothing enforces
        call = call._replace(options=with_cache_flags(options))  # type: ignore[unreachable]
    out, softmax_lse, _, _ = dispatch.run(call)
    return out, softmax_lse


def _traced(call: Call) -> CacheResult:
    check_cache_tensors(*call.tensors[:3])
    return traced(call)  # has no derivative, and says so


def _watched(call: Call) -> CacheResult:
    check_cache_tensors(*call.tensors[:3])
    named = cache_names(call)
    refuse_layouts(**named)
    tensors = [x for x in named.values() if isinstance(x, Tensor)]
    refuse_forward_mode(*tensors)
    if a_transform_is("Grad"):
        raise NotImplementedError(_NO_BACKWARD)
    assert call.cache is not None
    if call.cache.k is not None:
        _refuse_to_append(*call.tensors[1:3])
    given = on_one_mesh((*call.tensors, *call.cache))
    count = len(call.tensors)
    call = Call(Tensors(*given[:count]), call.sequences, Cache(*given[count:]), call.options)
    refuse_to_move_caches(*given[:3], *given[count : count + 2])
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        run = partial(_detached, call)
        results: CacheResult = inference_only(run, _NO_BACKWARD, *tensors)
        return results
    return traced(call)


def _refuse_to_append(k_cache: Tensor, v_cache: Tensor) -> None:
    """NotImplementedError where torch cannot write through to the caches."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.is_neg():
            raise NotImplementedError(
                f"{name} is a view with a pending negation, to which nothing can be appended: "
                f"pass {name}.resolve_neg()"
            )
    if a_transform_is("Vmap"):
        raise NotImplementedError(
            "new keys and values under torch.vmap: a cache is written in place, which vmap cannot "
            "do. Put the mapped dimension into the batch, or append beforehand."
        )


def _detached(call: Call) -> CacheResult:
    """In-place operators refuse leaves that require gradients; inside an autograd function, which
    has nothing to record, they need not."""

    def detached(x: Any) -> Any:
        return x.detach() if isinstance(x, Tensor) else x

    assert call.cache is not None
    tensors, cache = Tensors(*map(detached, call.tensors)), Cache(*map(detached, call.cache))
    return traced(Call(tensors, call.sequences, cache, call.options))


def _without_gradients(call: Call) -> CacheResult:
    """Lets a model run with gradients on, as upstream does, but none pass through unnoticed."""
    tensors = (x for x in cache_names(call).values() if isinstance(x, Tensor))
    results: CacheResult = inference_only(partial(_direct, call), _NO_BACKWARD, *tensors)
    return results
