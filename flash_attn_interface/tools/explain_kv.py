"""explain_with_kvcache(...): the way a call of flash_attn_with_kvcache would take, without running
it. `explain.py` does the same for the plain forward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._common.ask.check_kv import CacheCall, check_cache, check_cache_tensors, check_dense
from .._common.ask.check_tensors import require_tensor
from .._common.ask.check_values import flag, optional_flag
from ..api.fa3 import _refuse_fa3_features
from ..api.kvcache import WindowSize, _check_scheduler_metadata
from ..call.kv_dispatch import make_cache_plan
from ..call.selection import select_cache
from .explain import TensorOrShape, _device, _stand_in
from .explanation import CacheExplanation

_FLOATING = ("q", "k_cache", "v_cache", "k", "v", "qv", "rotary_cos", "rotary_sin")
_FLOAT32 = ("alibi_slopes",)
_INT32 = (
    "cache_seqlens", "cache_batch_idx", "cache_leftpad", "page_table", "cu_seqlens_q",
    "cu_seqlens_k_new", "rotary_seqlens", "scheduler_metadata",
)  # fmt: skip
_TENSORS = (*_FLOATING, *_FLOAT32, *_INT32)
_VALUES = ("softmax_scale", "causal", "window_size", "attention_chunk", "softcap")
_OTHERS = ("q_descale", "k_descale", "v_descale", "pack_gqa", "scheduler_metadata", "block_table")


def explain_with_kvcache(
    q: TensorOrShape,
    k_cache: TensorOrShape,
    v_cache: TensorOrShape,
    k: TensorOrShape | None = None,
    v: TensorOrShape | None = None,
    qv: TensorOrShape | None = None,
    rotary_cos: TensorOrShape | None = None,
    rotary_sin: TensorOrShape | None = None,
    cache_seqlens: int | TensorOrShape | None = None,
    cache_batch_idx: TensorOrShape | None = None,
    cache_leftpad: TensorOrShape | None = None,
    page_table: TensorOrShape | None = None,
    cu_seqlens_q: TensorOrShape | None = None,
    cu_seqlens_k_new: TensorOrShape | None = None,
    max_seqlen_q: int | Tensor | None = None,
    rotary_seqlens: TensorOrShape | None = None,
    q_descale: TensorOrShape | None = None,
    k_descale: TensorOrShape | None = None,
    v_descale: TensorOrShape | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: TensorOrShape | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    block_table: TensorOrShape | None = None,
    alibi_slopes: TensorOrShape | None = None,
    dtype: torch.dtype = torch.bfloat16,
    arch: str | None = None,
    verbose: bool = False,
) -> CacheExplanation:
    """Which kernels a call would launch, with which splits, and why. Nothing is compiled or run.

        print(explain_with_kvcache((16, 1, 32, 128), (16, 8192, 8, 128), (16, 8192, 8, 128),
        cache_seqlens=(16,), causal=True, arch="sm_80"))

    Args:
        q, k_cache, v_cache, k, v, qv, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx,
            cache_leftpad, page_table, cu_seqlens_q, cu_seqlens_k_new, max_seqlen_q, rotary_seqlens,
            q_descale, k_descale, v_descale, softmax_scale, causal, window_size, attention_chunk,
            softcap, rotary_interleaved, scheduler_metadata, num_splits, pack_gqa, sm_margin,
            return_softmax_lse: as in `flash_attn_with_kvcache`, in its order; tensors on any
            device, or just their shapes, which then stand for contiguous tensors.
        block_table, alibi_slopes: of `flash_attn.flash_attn_with_kvcache`; block_table is its name
            of page_table.
        dtype: of what is given as a shape.
        arch: the architecture to explain for; None means the device of q. The number of splits is
            that of the current GPU, or without one that of the simulator.
        verbose: print everything, in place of at most five lines.

    Returns:
        A CacheExplanation: print it, or read problem, backend, decision, plan; to_dict() has all of
        it for JSON.

    Raises:
        TypeError, ValueError, NotImplementedError: the errors of arguments, as in the call itself.
            That no backend serves the call is not raised: the explanation says so.
    """
    given: dict[str, Any] = dict(locals())
    for name in ("dtype", "arch", "verbose"):
        del given[name]
    verbose = flag("verbose", verbose)
    if block_table is not None:
        if page_table is not None:
            raise ValueError("page_table and block_table are two names of one argument: pass one")
        given["page_table"] = block_table
    if q_descale is not None or k_descale is not None or v_descale is not None:
        _refuse_fa3_features(None, q_descale, k_descale, v_descale)
    optional_flag("pack_gqa", pack_gqa)
    given["return_lse"] = given.pop("return_softmax_lse")
    fields: dict[str, Any] = {}
    for name, value in given.items():
        floating = torch.float32 if name in _FLOAT32 else dtype
        kind = floating if name in _FLOATING + _FLOAT32 else torch.int32
        fields[name] = value if name in _VALUES else _stand_in(value, kind)
    for name, value in fields.items():
        if isinstance(value, Tensor) and name in _TENSORS:
            require_tensor(name, value)
    if any(isinstance(value, Tensor) and value.is_meta for value in fields.values()):
        fields = {
            name: value.to("meta") if isinstance(value, Tensor) and name not in _VALUES else value
            for name, value in fields.items()
        }
    metadata = fields["scheduler_metadata"]
    call = CacheCall(**{name: fields[name] for name in fields if name not in _OTHERS})
    if metadata is not None:
        _check_scheduler_metadata(metadata, call.q, call.cu_seqlens_q)
    check_cache_tensors(call.q, call.k_cache, call.v_cache)
    check_dense(call)
    problem = check_cache(call)
    device = _device(call.q, arch)
    if arch is not None and not torch.cuda.is_available():  # the splits depend on the SMs
        device = replace(device, simulated=True)
    try:
        decision = select_cache(problem, device)
        plan = make_cache_plan(problem, decision)
    except NotImplementedError as error:
        return CacheExplanation(problem, device, None, "", str(error), verbose)
    return CacheExplanation(problem, device, decision, plan.describe(), verbose=verbose)
