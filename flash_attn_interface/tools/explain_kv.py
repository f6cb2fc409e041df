"""explain_with_kvcache(...): the way a call of flash_attn_with_kvcache would take, without running
it. It asks the same way as `explain.py`, which says what happens there."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .._common.ask.call import Cache, Call, Options, Sequences, Tensors, cache_names
from .._common.ask.check import check
from .._common.ask.check_kv import check_cache_tensors
from .._common.ask.check_tensors import require_tensor
from .._common.ask.check_values import flag, optional_flag
from ..api.fa3 import _refuse_fa3_features
from ..api.kvcache import WindowSize, _check_scheduler_metadata
from .explain import TensorOrShape, device_for, on_one_device, planned, stand_in
from .explanation import CacheExplanation


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
    s_aux: TensorOrShape | None = None,
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
            return_softmax_lse, s_aux: as in `flash_attn_with_kvcache`, in its order; tensors on any
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
    verbose = flag("verbose", verbose)
    if block_table is not None:
        if page_table is not None:
            raise ValueError("page_table and block_table are two names of one argument: pass one")
        page_table = block_table
    if q_descale is not None or k_descale is not None or v_descale is not None:
        _refuse_fa3_features(None, q_descale, k_descale, v_descale)
    optional_flag("pack_gqa", pack_gqa)
    int32 = partial(stand_in, dtype=torch.int32)
    tensors = Tensors(
        stand_in(q, dtype),
        stand_in(k_cache, dtype),
        stand_in(v_cache, dtype),
        cu_seqlens_q=int32(cu_seqlens_q),
        alibi_slopes=stand_in(alibi_slopes, torch.float32),
        page_table=int32(page_table),
        cache_batch_idx=int32(cache_batch_idx),
        leftpad_k=int32(cache_leftpad),
        s_aux=stand_in(s_aux, torch.float32),
    )
    cache = Cache(
        stand_in(k, dtype),
        stand_in(v, dtype),
        stand_in(qv, dtype),
        stand_in(rotary_cos, dtype),
        stand_in(rotary_sin, dtype),
        int32(cache_seqlens),
        int32(cu_seqlens_k_new),
        int32(rotary_seqlens),
    )
    metadata = int32(scheduler_metadata)
    options = Options(
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        return_lse=return_softmax_lse,
        sm_margin=sm_margin,
        num_splits=num_splits,
        rotary_interleaved=rotary_interleaved,
    )
    for name, value in cache_names(Call(tensors, cache=cache)).items():
        if isinstance(value, Tensor):
            require_tensor(name, value)
    tensors, cache = on_one_device(tensors, *cache), on_one_device(cache, *tensors)
    call = Call(tensors, Sequences(max_seqlen_q), cache, options)
    if metadata is not None:
        if tensors.q.is_meta and isinstance(metadata, Tensor):
            metadata = metadata.to("meta")
        _check_scheduler_metadata(metadata, tensors.q, tensors.cu_seqlens_q)
    check_cache_tensors(*tensors[:3])
    problem = check(call)
    device = device_for(tensors.q, arch)
    if arch is not None and not torch.cuda.is_available():  # the splits depend on the SMs
        device = replace(device, simulated=True)
    decision, plan, refusal = planned(problem, device)
    description = "" if plan is None else plan.describe()
    return CacheExplanation(problem, device, decision, description, refusal, verbose=verbose)
