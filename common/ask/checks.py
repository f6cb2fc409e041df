"""Every user error of an attention call is raised here, and what passes becomes a Problem.

Called by `flash_attn_interface/call/dispatch.py` once per new combination of shapes, layouts and
options (the answer is memoised), and by `explain`. Nothing here reads device memory, so nothing
synchronises; values in device tensors (cu_seqlens, seqused) are trusted, those in CPU tensors are
read by `check_lengths`.

A message names the argument, what was given, what is allowed and, unless obvious, a way out.
TypeError: wrong type or dtype. ValueError: wrong shape, layout, device or value.
NotImplementedError: meaningful, but not served.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from . import check_paged, check_values
from .call import Call, Tensors
from .check_tensors import (
    DTYPE_NAMES,
    check_alibi_slopes,
    check_int32_vector,
    check_qkv_kind,
    check_sinks,
    require_tensor,
)
from .check_tensors import last_dim_contiguous as last_dim_contiguous
from .problem import Problem, Strides, normalise_window

_MAX_INT32 = 2**31 - 1
_MAX_VECTOR_BYTES = 16


def check_forward(call: Call) -> Problem:
    """The Problem that `call` states; q, k and v must have gone through `last_dim_contiguous`."""
    tensors, sequences, options = call.tensors, call.sequences, call.options
    q, k, v = tensors[:3]
    check_qkv_kind(q, k, v)
    heads = _check_qkv_shapes(tensors)
    batch = _check_batch(tensors)
    if batch == 0 or heads.num_heads_q == 0:
        raise ValueError(
            f"q has {batch} sequences and {heads.num_heads_q} heads: each must be >= 1"
        )
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        check_int32_vector(name, getattr(tensors, name), batch + 1, q.device)
    for name in ("seqused_q", "seqused_k", "leftpad_k"):
        check_int32_vector(name, getattr(tensors, name), batch, q.device)
    check_sinks(call.tensors.s_aux, heads.num_heads_q, q.device)
    alibi_strides = check_alibi_slopes(tensors.alibi_slopes, batch, heads.num_heads_q, q.device)

    varlen_q, varlen_k = tensors.cu_seqlens_q is not None, tensors.cu_seqlens_k is not None
    seqlen_q = seqlen_bound("q", sequences.max_seqlen_q, q) if varlen_q else q.shape[1]
    paged = tensors.page_table is not None
    if paged:
        seqlen_k = check_paged.check_page_table(tensors.page_table, k, batch)
    else:
        seqlen_k = seqlen_bound("k", sequences.max_seqlen_k, k) if varlen_k else k.shape[1]
    total_q = q.shape[0] if varlen_q else batch * seqlen_q
    total_k = k.shape[0] if varlen_k and not paged else batch * seqlen_k
    check_row_counts({"q": max(total_q, seqlen_q), "k": max(total_k, seqlen_k)})

    left, right = check_values.window_pair(options.window_size)
    causal, left, right = normalise_window(
        check_values.flag("causal", options.causal),
        left,
        right,
        total_q if varlen_q else seqlen_q,  # max_seqlen may claim too little
        total_k if varlen_k else seqlen_k,
    )
    dropout_p = check_values.probability("dropout_p", options.dropout_p)
    scale = check_values.softmax_scale(options.softmax_scale, heads.head_dim_qk)
    q_strides, k_strides, v_strides = (
        strides_of(q, varlen_q),
        strides_of(k, varlen_k and not paged),
        strides_of(v, varlen_k and not paged),
    )
    return Problem(
        dtype=DTYPE_NAMES[q.dtype],
        head_dim_qk=heads.head_dim_qk,
        head_dim_v=heads.head_dim_v,
        num_heads_q=heads.num_heads_q,
        num_heads_k=heads.num_heads_k,
        num_heads_v=heads.num_heads_v,
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        total_q=total_q,
        total_k=total_k,
        softmax_scale=scale,
        varlen_q=varlen_q,
        varlen_k=varlen_k,
        has_seqused_q=tensors.seqused_q is not None,
        has_seqused_k=tensors.seqused_k is not None,
        causal=causal,
        window_left=left,
        window_right=right,
        attention_chunk=check_values.attention_chunk(
            options.attention_chunk, total_k if varlen_k else seqlen_k
        ),
        softcap=check_values.softcap(options.softcap, scale),
        alibi=tensors.alibi_slopes is not None,
        alibi_strides=alibi_strides,
        sink=call.tensors.s_aux is not None,
        dropout_p=dropout_p,
        return_lse=check_values.flag("return_attn_probs", options.return_lse),
        return_softmax=(
            check_values.flag("return_softmax", options.return_softmax) and dropout_p > 0.0
        ),
        q_strides=q_strides,
        k_strides=k_strides,
        v_strides=v_strides,
        vector_bytes=common_vector_bytes((q, k, v), (q_strides, k_strides, v_strides)),
        page_size=k.shape[1] if paged else 0,
        leftpad_k=tensors.leftpad_k is not None,
        cache_slots=k.shape[0] if paged else 0,
        sm_margin=check_values.non_negative("sm_margin", options.sm_margin),
        pack_gqa=check_values.optional_flag("pack_gqa", options.pack_gqa),
        extra=options.extra,
    )


_PAGES = " and block_table is not"


class Heads(NamedTuple):
    """Head counts and head dims of one call."""

    num_heads_q: int
    num_heads_k: int
    num_heads_v: int
    head_dim_qk: int
    head_dim_v: int


def _check_qkv_shapes(call: Tensors) -> Heads:
    q, k, v = call.q, call.k, call.v
    layouts = (
        ("q", q, call.cu_seqlens_q, "cu_seqlens_q"),
        ("k", k, call.cu_seqlens_k, "cu_seqlens_k"),
        ("v", v, call.cu_seqlens_k, "cu_seqlens_k"),
    )
    for name, tensor, cu_seqlens, cu_name in layouts:
        if call.page_table is not None and name != "q":
            check_paged.check_pages(name, tensor, cu_seqlens)
        else:
            check_rows(name, tensor, cu_seqlens, cu_name)
    return check_heads(q, k, v, "k", "v")


def check_rows(name: str, tensor: Tensor, cu_seqlens: Tensor | None, cu_name: str) -> None:
    """That rows are dense, or packed where there is `cu_seqlens`, an argument called `cu_name`."""
    if cu_seqlens is None and tensor.ndim != 4:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}: expected "
            "(batch, seqlen, num_heads, head_dim); packed sequences need "
            f"{cu_name}, an argument of flash_attn_varlen_func"
        )
    if cu_seqlens is not None and tensor.ndim != 3:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}: expected (total, num_heads, head_dim) "
            f"because {cu_name} is given{_PAGES if tensor.ndim == 4 and name != 'q' else ''}"
        )


def check_heads(q: Tensor, k: Tensor, v: Tensor, name_k: str, name_v: str) -> Heads:
    """Of tensors (..., num_heads, head_dim) whose number of dims is right."""
    if v.shape[:-2] != k.shape[:-2]:
        raise ValueError(
            f"{name_v} has shape {tuple(v.shape)} and {name_k} {tuple(k.shape)}: all but the last "
            f"two sizes (num_heads, head_dim) must agree{_layout_hint(q, k, v)}"
        )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"{name_k} has head_dim {k.shape[-1]} but q has {q.shape[-1]}: they must agree "
            f"({name_v}'s is free)"
        )
    heads = Heads(q.shape[-2], k.shape[-2], v.shape[-2], q.shape[-1], v.shape[-1])
    for name, count in ((name_k, heads.num_heads_k), (name_v, heads.num_heads_v)):
        if count == 0 or heads.num_heads_q % count:
            raise ValueError(
                f"{name} has {count} heads and q has {heads.num_heads_q}: "
                f"the heads of q must be a multiple of those of {name}{_layout_hint(q, k, v)}"
            )
    check_values.head_dim(f"q and {name_k}", heads.head_dim_qk)
    check_values.head_dim(name_v, heads.head_dim_v, check_values.MAX_HEAD_DIM_V)
    return heads


def _layout_hint(q: Tensor, k: Tensor, v: Tensor) -> str:
    """For tensors whose sizes fit once the axes 1 and 2, or those of q alone, are swapped."""
    if not q.ndim == k.ndim == v.ndim == 4 or 0 in k.shape or 0 in v.shape:
        return ""

    def fits(heads: int, axis: int) -> bool:
        lengths_agree = k.shape[3 - axis] == v.shape[3 - axis]
        return heads % k.shape[axis] == 0 == heads % v.shape[axis] and lengths_agree

    which = "all three" if fits(q.shape[1], 1) else "q" if fits(q.shape[1], 2) else ""
    if not which:
        return ""
    return (
        ". The layout here is (batch, seqlen, num_heads, head_dim): for tensors laid out (batch, "
        f"num_heads, seqlen, head_dim), as {which} may be, pass .transpose(1, 2)"
    )


def _check_batch(call: Tensors) -> int:
    """Number of sequences, on which q and k must agree."""
    batches = []
    for name, tensor, cu_seqlens in (
        ("q", call.q, call.cu_seqlens_q),
        ("k", call.k, call.cu_seqlens_k),
    ):
        if cu_seqlens is None:
            batches.append(tensor.shape[0])
            continue
        require_tensor(f"cu_seqlens_{name}", cu_seqlens, "an int32 torch.Tensor")
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(
                f"cu_seqlens_{name} has shape {tuple(cu_seqlens.shape)}: expected (batch + 1,)"
            )
        batches.append(cu_seqlens.shape[0] - 1)
    if batches[0] != batches[1]:
        of_q = "q" if call.cu_seqlens_q is None else "cu_seqlens_q"
        of_k = "k" if call.cu_seqlens_k is None else "cu_seqlens_k"
        raise ValueError(
            f"q has {batches[0]} sequences ({of_q}) but k and v have {batches[1]} ({of_k}): they "
            "must agree"
        )
    return batches[0]


def check_lengths(call: Tensors, problem: Problem) -> None:
    """Read the lengths, which must be in CPU memory, and reject those that point outside."""
    if call.page_table is not None or call.leftpad_k is not None:
        check_paged.check_paged_values(call, problem)
    sides = (
        ("q", call.cu_seqlens_q, call.seqused_q, problem.seqlen_q, problem.total_q),
        ("k", call.cu_seqlens_k, call.seqused_k, problem.seqlen_k, problem.total_k),
    )
    for side, cu_seqlens, seqused, longest, total in sides:
        slots = [longest] * problem.batch
        if cu_seqlens is not None:
            ends = cu_seqlens.tolist()
            slots = [end - start for start, end in zip(ends, ends[1:], strict=False)]
            if ends[0] != 0 or min(slots) < 0 or ends[-1] > total:
                raise ValueError(
                    f"cu_seqlens_{side} is {shorten(ends)}: must start at 0, never decrease and "
                    f"end at most at the {total} rows of {side}"
                )
        used = slots
        if seqused is not None:
            used = seqused.tolist()
            if any(not 0 <= n <= slot for n, slot in zip(used, slots, strict=True)):
                raise ValueError(
                    f"seqused_{side} is {shorten(used)}: each must lie between 0 and the length "
                    f"of its sequence, {shorten(slots)}"
                )
        if cu_seqlens is not None and max(used) > longest:
            raise ValueError(
                f"max_seqlen_{side} is {longest} but the longest sequence has {max(used)} rows by "
                f"cu_seqlens_{side}: "
                "pass at least that"
            )


def host_max_seqlen(max_seqlen: Any, packed: Tensor) -> Any:
    """`max_seqlen` as a number: a CPU tensor is read; for one on a device, which only a
    synchronisation could read, the rows of the packed tensor are an upper bound."""
    if not isinstance(max_seqlen, Tensor):
        return max_seqlen
    if max_seqlen.device.type != "cpu":
        return packed.shape[0] if packed.ndim else 0  # none: `check_rows` will say so
    try:
        return operator.index(max_seqlen)
    except (TypeError, RuntimeError, ValueError):  # several numbers, a fraction: `seqlen_bound`
        return max_seqlen


def seqlen_bound(side: str, max_seqlen: Any, packed: Tensor) -> int:
    """The longest sequence, of the argument max_seqlen_q or max_seqlen_k."""
    name = f"max_seqlen_{side}"
    if max_seqlen is None:
        raise ValueError(f"{name} is None: pass the longest sequence of cu_seqlens_{side}, an int")
    bound = check_values.non_negative(name, host_max_seqlen(max_seqlen, packed))
    check_row_counts({name: bound})
    return bound


def check_row_counts(counts: Mapping[str, int]) -> None:
    """Rows of tensors, or of a sequence, by argument: kernels count them with 32 bits."""
    for name, count in counts.items():
        if count > _MAX_INT32:
            raise ValueError(
                f"{name}: {count} rows; at most {_MAX_INT32} are supported in one call"
            )


def strides_of(tensor: Tensor, packed: bool) -> Strides:
    """(batch, row, head); 0 where the index is always 0, so that equal problems compare equal."""
    sizes, steps = tensor.shape, tensor.stride()
    row, head = (
        step if size > 1 else 0 for size, step in zip(sizes[-3:-1], steps[-3:-1], strict=True)
    )
    return (0 if packed or sizes[0] <= 1 else steps[0], row, head)


def common_vector_bytes(tensors: Sequence[Tensor], strides: Sequence[Strides]) -> int:
    """Largest access aligned everywhere: in bytes, what divides all pointers and strides."""
    bits = _MAX_VECTOR_BYTES
    for tensor, steps in zip(tensors, strides, strict=True):
        bits |= tensor.data_ptr()
        for step in steps:
            bits |= step * tensor.element_size()
    return bits & -bits


def shorten(values: list[int]) -> str:
    shown = ", ".join(str(value) for value in values[:8])
    return f"[{shown}, ... {len(values)} in all]" if len(values) > 8 else f"[{shown}]"
