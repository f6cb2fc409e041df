"""Every user error of flash_attn_with_kvcache is raised here; what passes becomes a Problem.

Called by `flash_attn_interface/call/dispatch.py` once per new combination of shapes, layouts and
options. As in `checks.py`, nothing in `check_cache` reads device memory: values in device tensors
are trusted (the kernels clamp them), unless `check_cache_values` is asked to read them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import check_values
from .call import Cache, Call, Tensors, cache_names
from .check_overlap import check_output
from .check_paged import MAX_TABLE_ELEMENTS
from .check_tensors import (
    DTYPE_NAMES,
    check_alibi_slopes,
    check_int32_vector,
    check_kinds,
    check_sinks,
    require_device,
    require_tensor,
)
from .checks import (
    Heads,
    check_heads,
    check_row_counts,
    common_vector_bytes,
    seqlen_bound,
    strides_of,
)
from .kv_problem import Append
from .problem import Problem, normalise_window

MAX_SPLITS = 256
ROTARY_DIM_MULTIPLE = 16


def check_cache(call: Call) -> Problem:
    """The Problem that `call` states; q, k, v and qv have contiguous last dims."""
    tensors, sequences, options, cache = call.tensors, call.sequences, call.options, call.cache
    assert cache is not None
    q, k_cache, v_cache = tensors[:3]
    heads = _check_queries_and_caches(tensors, cache)
    batch = _batch_of_queries(tensors)
    if batch == 0 or heads.num_heads_q == 0:
        raise ValueError(
            f"q has {batch} sequences and {heads.num_heads_q} heads: each must be >= 1"
        )
    rows = _check_slots(tensors, batch)
    seqlen_new, total_new = _check_new(q, cache, heads, batch, rows)
    _check_cache_seqlens(cache.seqlens, batch, rows - seqlen_new, q)
    rotary_dim, rotary_rows = _check_rotary(q, cache, heads.head_dim_qk, batch, rows)
    check_int32_vector("cache_leftpad", tensors.leftpad_k, batch, q.device)
    alibi_strides = check_alibi_slopes(tensors.alibi_slopes, batch, heads.num_heads_q, q.device)

    check_sinks(tensors.s_aux, heads.num_heads_q, q.device)
    varlen_q = tensors.cu_seqlens_q is not None
    seqlen_q = seqlen_bound("q", sequences.max_seqlen_q, q) if varlen_q else q.shape[1]
    total_q = q.shape[0] if varlen_q else batch * seqlen_q
    total_k = k_cache.shape[0] * k_cache.shape[1]
    check_row_counts({"q": max(total_q, seqlen_q), "k_cache": max(total_k, rows)})
    left, right = check_values.window_pair(options.window_size)
    causal, left, right = normalise_window(
        check_values.flag("causal", options.causal), left, right, total_q if varlen_q else seqlen_q,
        rows,
    )  # fmt: skip
    chunk = check_values.attention_chunk(options.attention_chunk, rows)
    q_strides = strides_of(q, varlen_q)
    k_strides, v_strides = strides_of(k_cache, False), strides_of(v_cache, False)
    scale_dim = heads.head_dim_qk + (0 if cache.qv is None else heads.head_dim_v)
    scale = check_values.softmax_scale(options.softmax_scale, scale_dim)
    read, strides = [q, k_cache, v_cache], [q_strides, k_strides, v_strides]
    if cache.qv is not None:
        read.append(cache.qv)
        strides.append(strides_of(cache.qv, varlen_q))
    problem = Problem(
        dtype=DTYPE_NAMES[q.dtype],
        head_dim_qk=heads.head_dim_qk,
        head_dim_v=heads.head_dim_v,
        num_heads_q=heads.num_heads_q,
        num_heads_k=heads.num_heads_k,
        num_heads_v=heads.num_heads_v,
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=rows,
        total_q=total_q,
        total_k=total_k,
        softmax_scale=scale,
        varlen_q=varlen_q,
        has_seqused_k=True,
        causal=causal,
        window_left=left,
        window_right=right,
        attention_chunk=chunk,
        softcap=check_values.softcap(options.softcap, scale),
        alibi=tensors.alibi_slopes is not None,
        alibi_strides=alibi_strides,
        sink=tensors.s_aux is not None,
        return_lse=check_values.flag("return_softmax_lse", options.return_lse),
        q_strides=q_strides,
        k_strides=k_strides,
        v_strides=v_strides,
        vector_bytes=common_vector_bytes(read, strides),
        page_size=0 if tensors.page_table is None else k_cache.shape[1],
        cache_batch_idx=tensors.cache_batch_idx is not None,
        leftpad_k=tensors.leftpad_k is not None,
        cache_slots=k_cache.shape[0],
        qv=cache.qv is not None,
        qv_strides=(0, 0, 0) if cache.qv is None else strides[-1],
        num_splits=check_num_splits(options.num_splits),
        extra=options.extra,
        sm_margin=check_values.non_negative("sm_margin", options.sm_margin),
    )
    append = Append(
        rotary_dim=rotary_dim,
        rotary_rows=rotary_rows,
        rotary_interleaved=check_values.flag("rotary_interleaved", options.rotary_interleaved),
        rotary_per_row=causal or problem.local or chunk > 0,
        has_rotary_seqlens=rotary_dim > 0 and cache.rotary_seqlens is not None,
        has_cache_seqlens=cache.seqlens is not None,
        one_length=not isinstance(cache.seqlens, Tensor | None),
    )
    if cache.k is None or cache.v is None or seqlen_new == 0:
        return replace(problem, append=append)
    for name, written in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_output(name, written)
    varlen_new = cache.cu_seqlens_k_new is not None
    k_new_strides, v_new_strides = strides_of(cache.k, varlen_new), strides_of(cache.v, varlen_new)
    append = replace(
        append,
        seqlen_new=seqlen_new,
        total_new=total_new,
        varlen_new=varlen_new,
        k_new_strides=k_new_strides,
        v_new_strides=v_new_strides,
        new_vector_bytes=common_vector_bytes((cache.k, cache.v), (k_new_strides, v_new_strides)),
    )
    return replace(problem, append=append)


def check_cache_tensors(q: Any, k_cache: Any, v_cache: Any) -> None:
    """That they are tensors at all; cheap, since every call starts with it."""
    if isinstance(q, Tensor) and isinstance(k_cache, Tensor) and isinstance(v_cache, Tensor):
        return
    for name, value in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        require_tensor(name, value)


def check_dense(call: Call) -> None:
    """TypeError for a tensor without strides among the arguments of a call over a cache, on which
    torch's own errors do not say much."""
    for name, value in cache_names(call).items():
        if isinstance(value, Tensor):
            require_tensor(name, value)


def _check_queries_and_caches(tensors: Tensors, cache: Cache) -> Heads:
    q, k_cache, v_cache = tensors.q, tensors.k, tensors.v
    given = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": cache.k, "v": cache.v}
    known = {name: x for name, x in (given | {"qv": cache.qv}).items() if x is not None}
    check_kinds(known)
    if q.ndim != (4 if tensors.cu_seqlens_q is None else 3):
        wanted = (
            "(batch, seqlen_q, num_heads_q, head_dim_qk); ragged queries need cu_seqlens_q"
            if tensors.cu_seqlens_q is None
            else "(total_q, num_heads_q, head_dim_qk) because cu_seqlens_q is given"
        )
        raise ValueError(f"q has shape {tuple(q.shape)}: expected {wanted}")
    paged = tensors.page_table is not None
    layout = "num_pages, page_size" if paged else "batch, capacity"
    for name, kept in (("k_cache", k_cache), ("v_cache", v_cache)):
        if kept.ndim != 4:
            raise ValueError(
                f"{name} has shape {tuple(kept.shape)}: expected ({layout}, num_heads, head_dim)"
            )
        if kept.stride(-1) != 1 and kept.shape[-1] > 1:
            raise ValueError(
                f"{name} has stride {kept.stride()}: the last must be 1; caches are updated in "
                "place, so they are never copied"
            )
    heads = check_heads(q, k_cache, v_cache, "k_cache", "v_cache")
    if cache.qv is not None and cache.qv.shape != (*q.shape[:-1], heads.head_dim_v):
        raise ValueError(
            f"qv has shape {tuple(cache.qv.shape)}: expected {(*q.shape[:-1], heads.head_dim_v)}, "
            "the shape of q with the head_dim of v_cache"
        )
    return heads


def _batch_of_queries(tensors: Tensors) -> int:
    if tensors.cu_seqlens_q is None:
        return tensors.q.shape[0]
    require_tensor("cu_seqlens_q", tensors.cu_seqlens_q)
    if tensors.cu_seqlens_q.ndim != 1 or tensors.cu_seqlens_q.shape[0] < 1:
        raise ValueError(
            f"cu_seqlens_q has shape {tuple(tensors.cu_seqlens_q.shape)}: expected (batch + 1,)"
        )
    batch = tensors.cu_seqlens_q.shape[0] - 1
    check_int32_vector("cu_seqlens_q", tensors.cu_seqlens_q, batch + 1, tensors.q.device)
    return batch


def _check_slots(tensors: Tensors, batch: int) -> int:
    """Rows that a sequence has room for in the cache."""
    k_cache, table = tensors.k, tensors.page_table
    check_int32_vector("cache_batch_idx", tensors.cache_batch_idx, batch, tensors.q.device)
    if table is None:
        if tensors.cache_batch_idx is None and k_cache.shape[0] < batch:
            raise ValueError(
                f"k_cache holds {k_cache.shape[0]} sequences but q has {batch}: they must be as "
                "many, or cache_batch_idx must name the one for each query sequence"
            )
        if k_cache.shape[0] == 0:
            raise ValueError("k_cache holds no sequences: expected at least 1")
        return int(k_cache.shape[1])
    name = "page_table (block_table)"
    require_tensor(name, table)
    check_int32_matrix(name, table, "(batch, pages of a sequence)")
    require_device(name, table, tensors.q.device)
    if table.shape[0] != batch and tensors.cache_batch_idx is None:
        raise ValueError(
            f"{name} has {table.shape[0]} rows but q has {batch} sequences: they must be as many, "
            "or cache_batch_idx must name the row for each"
        )
    if table.shape[0] * table.stride(0) >= MAX_TABLE_ELEMENTS:
        raise ValueError(
            f"{name} has {table.shape[0]} rows with a stride of {table.stride(0)}: it must span "
            f"less than {MAX_TABLE_ELEMENTS} elements"
        )
    if 0 in table.shape or 0 in k_cache.shape[:2]:
        raise ValueError(
            f"{name} has shape {tuple(table.shape)} and k_cache {tuple(k_cache.shape)}: expected "
            "at least one page of at least one row"
        )
    return table.shape[1] * int(k_cache.shape[1])


def check_int32_matrix(name: str, tensor: Tensor, shape: str) -> None:
    """Two dims, the last one contiguous."""
    if tensor.dtype != torch.int32:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}: expected torch.int32, use .to(torch.int32)"
        )
    if tensor.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected {shape}")
    if tensor.stride(1) != 1 and tensor.shape[1] > 1:
        raise ValueError(
            f"{name} has stride {tensor.stride()}: the last must be 1, use .contiguous()"
        )


def _check_new(q: Tensor, cache: Cache, heads: Heads, batch: int, rows: int) -> tuple[int, int]:
    """(new rows of a sequence, or a bound of them; new rows in all)."""
    k, v, cu_seqlens = cache.k, cache.v, cache.cu_seqlens_k_new
    if k is None or v is None:
        for name, value, other in (("k", k, "v"), ("v", v, "k")):
            if value is not None:
                raise ValueError(f"{name} is given without {other}: a new row needs both")
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens_k_new is given without k and v, the rows it delimits")
        return 0, 0
    if cache.seqlens is None:
        raise ValueError(
            "k and v are given without cache_seqlens: it says behind which row to write them"
        )
    check_int32_vector("cu_seqlens_k_new", cu_seqlens, batch + 1, q.device)
    if k.ndim != (4 if cu_seqlens is None else 3):
        wanted = (
            "(batch, seqlen_new, num_heads_k, head_dim_qk); ragged rows need cu_seqlens_k_new"
            if cu_seqlens is None
            else "(total_new, num_heads_k, head_dim_qk) because cu_seqlens_k_new is given"
        )
        raise ValueError(f"k has shape {tuple(k.shape)}: expected {wanted}")
    leading: tuple[int, ...] = (batch, k.shape[1]) if cu_seqlens is None else (k.shape[0],)
    wanted_k = (*leading, heads.num_heads_k, heads.head_dim_qk)
    wanted_v = (*leading, heads.num_heads_v, heads.head_dim_v)
    if k.shape != wanted_k or v.shape != wanted_v:
        given = "" if cu_seqlens is None else " because cu_seqlens_k_new is given"
        raise ValueError(
            f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}: expected {wanted_k} and "
            f"{wanted_v}, the sequences of q and the heads of k_cache and v_cache{given}"
        )
    if cu_seqlens is not None:
        return min(k.shape[0], rows), k.shape[0]
    if leading[1] > rows:
        raise ValueError(
            f"k has {leading[1]} new rows for each sequence but the cache has room for {rows}"
        )
    return leading[1], batch * leading[1]


def _check_cache_seqlens(value: Any, batch: int, largest: int, q: Tensor) -> None:
    if isinstance(value, Tensor):
        check_int32_vector("cache_seqlens", value, batch, q.device)
    elif value is not None:
        check_cache_length(value, largest)


def check_cache_length(cache_seqlens: Any, largest: int) -> int:
    """Of an int that stands for all sequences; returned as a plain one."""
    number = check_values.non_negative("cache_seqlens", cache_seqlens)
    if number > largest:
        raise ValueError(
            f"cache_seqlens is {number}: at most {largest} rows fit the cache, new ones not counted"
        )
    return number


def _check_rotary(
    q: Tensor, cache: Cache, head_dim_qk: int, batch: int, rows: int
) -> tuple[int, int]:
    """(rotary_dim, rows of the tables)."""
    cos, sin = cache.rotary_cos, cache.rotary_sin
    if cos is None or sin is None:
        for name, value in (("rotary_cos", cos), ("rotary_sin", sin)):
            if value is not None:
                raise ValueError(f"{name} is given alone: rotary_cos and rotary_sin go together")
        return 0, 0  # rotary_seqlens without them is ignored, as in FlashAttention-3
    if cache.k is None:
        raise ValueError(
            "rotary_cos and rotary_sin are given without k and v: the cached keys are rotated "
            "already; rotate q with flash_attn.layers.rotary.apply_rotary_emb"
        )
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        require_tensor(name, table)
        if table.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {table.dtype} but q has {q.dtype}")
        require_device(name, table, q.device)
        if not table.is_contiguous():
            raise ValueError(f"{name} has stride {table.stride()}: must be contiguous")
    if cos.ndim != 2 or cos.shape != sin.shape:
        raise ValueError(
            f"rotary_cos has shape {tuple(cos.shape)} and rotary_sin {tuple(sin.shape)}: expected "
            "(positions, rotary_dim / 2) for both"
        )
    rotary_dim = 2 * cos.shape[1]
    if rotary_dim > head_dim_qk or rotary_dim % ROTARY_DIM_MULTIPLE:
        raise ValueError(
            f"rotary_cos and rotary_sin have {cos.shape[1]} columns, so rotary_dim is {rotary_dim}:"
            f" expected a multiple of {ROTARY_DIM_MULTIPLE} up to the head_dim of q, {head_dim_qk}"
        )
    if cos.shape[0] < rows:
        raise ValueError(
            f"rotary_cos and rotary_sin have {cos.shape[0]} positions but a sequence has room for "
            f"{rows} keys in k_cache by its shape or page_table (block_table): expected at least "
            "as many"
        )
    check_int32_vector("rotary_seqlens", cache.rotary_seqlens, batch, q.device)
    return rotary_dim, cos.shape[0]


def check_num_splits(value: Any) -> int:
    """0 to choose, or up to 256 parts of the keys."""
    num_splits = check_values.non_negative("num_splits", value)
    if num_splits > MAX_SPLITS:
        raise ValueError(f"num_splits is {num_splits}: at most {MAX_SPLITS}, 0 to choose")
    return num_splits
