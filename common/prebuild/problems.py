"""The problems whose kernels are prebuilt for a pair of head dims. docs/prebuild.md has the list.

Called by each tree's `prebuild.py`, which turns them into specs with its own tiles. What a kernel
does not depend on (sizes, strides, scales, widths) has example values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import gcd
from typing import Any

from ..ask.backward_problem import MAX_VECTOR_BYTES, BackwardProblem
from ..ask.kv_problem import Append
from ..ask.problem import Problem, Strides
from ..tiles import tuned_tiles
from .headdim import Pair, Wanted

_ELEM_BYTES = 2
_ROWS = 1024  # of a sequence: enough that no mask is without effect
_HEADS = 8
_MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True, "window_right": 0},
    "local": {"window_left": _ROWS // 4, "window_right": 0},
}
_EXTRAS: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 30.0},
    "alibi": {"alibi": True},
    "dropout": {"dropout_p": 0.1},
}
_LAYOUTS = ("dense", "varlen")
_NO_STRIDES = (0, 0, 0)
_PAGE_SIZE = 256


def forward_problems(pair: Pair, wanted: Wanted) -> Iterator[Problem]:
    """Of every dtype, mask, layout and at most one extra feature."""
    extras = [{}, *(_EXTRAS[name] for name in wanted.features if name in _EXTRAS)]
    for dtype in wanted.dtypes:
        for mask in (_MASKS[name] for name in wanted.features if name in _MASKS):
            for varlen in (name == "varlen" for name in wanted.features if name in _LAYOUTS):
                for extra in extras:
                    yield replace(_problem(pair, dtype, varlen), **mask, **extra)


def backward_problems(pair: Pair, wanted: Wanted) -> Iterator[BackwardProblem]:
    """Of every forward problem, with one and with several query heads per key head."""
    if "backward" not in wanted.features:
        return
    head_dim_qk, head_dim_v = pair
    modes = (False, True) if "deterministic" in wanted.features else (False,)
    for forward in forward_problems(pair, wanted):
        for num_heads_k in (forward.num_heads_q, 1):
            grouped = replace(forward, num_heads_k=num_heads_k, num_heads_v=num_heads_k)
            for deterministic in modes:
                yield BackwardProblem(
                    grouped,
                    out_strides=_NO_STRIDES,
                    dout_strides=_NO_STRIDES,
                    dq_strides=_NO_STRIDES,
                    dk_strides=_NO_STRIDES,
                    dv_strides=_NO_STRIDES,
                    vector_bytes=_vector_bytes(head_dim_qk, head_dim_v),
                    out_vector_bytes=_vector_bytes(head_dim_v),
                    grad_vector_bytes=_vector_bytes(head_dim_qk, head_dim_v),
                    deterministic=deterministic,
                )


def paged_problems(pair: Pair, wanted: Wanted) -> Iterator[Problem]:
    """Forward problems over paged keys: packed sequences, and prefill into a cache."""
    if "decode" not in wanted.features:
        return
    for forward in forward_problems(pair, wanted):
        if not forward.dropout:
            yield replace(
                forward,
                page_size=_PAGE_SIZE,
                cache_slots=2 * _ROWS // _PAGE_SIZE,
                has_seqused_k=not forward.varlen_k,
            )


def cache_problems(pair: Pair, wanted: Wanted) -> Iterator[Problem]:
    """A step of decoding: paged and not, with and without an append, rotated in either way or not.

    One query per sequence; a few where there is a causal mask, which only then means something.
    """
    if "decode" not in wanted.features:
        return
    for paged in (False, True):
        for forward in forward_problems(pair, wanted):
            if forward.varlen_q or forward.dropout:
                continue
            rows = 2 if forward.causal else 1
            attention = replace(
                forward,
                seqlen_q=rows,
                total_q=2 * rows,
                has_seqused_k=True,
                page_size=_PAGE_SIZE if paged else 0,
                cache_slots=2 * _ROWS // _PAGE_SIZE if paged else 2,
            )
            for rotary_dim, interleaved in ((0, True), (_ROTARY_DIM, True), (_ROTARY_DIM, False)):
                append = Append(
                    seqlen_new=rows,
                    total_new=2 * rows,
                    rotary_dim=rotary_dim,
                    rotary_interleaved=interleaved,
                    new_vector_bytes=attention.vector_bytes,
                )
                yield replace(attention, append=append)


# Rows of the tables are copied in pieces of 16 bytes for any multiple of 16.
_ROTARY_DIM = 16


def gpus(arch: str) -> tuple[str, ...]:
    """Models of an architecture that have tables of tuned tiles; "" stands for all others."""
    models = {""}
    for folder, checked in tuned_tiles.folders():
        for path in sorted(folder.glob("*.json")):
            table = tuned_tiles.read(path, checked)
            if table is not None and table.arch == arch.rstrip("af"):
                models.add(table.gpu)
    return tuple(sorted(models))


def _problem(pair: Pair, dtype: str, varlen: bool) -> Problem:
    head_dim_qk, head_dim_v = pair
    return Problem(
        dtype=dtype,
        head_dim_qk=head_dim_qk,
        head_dim_v=head_dim_v,
        num_heads_q=_HEADS,
        num_heads_k=_HEADS,
        num_heads_v=_HEADS,
        batch=2,
        seqlen_q=_ROWS,
        seqlen_k=_ROWS,
        total_q=2 * _ROWS,
        total_k=2 * _ROWS,
        softmax_scale=head_dim_qk**-0.5,
        varlen_q=varlen,
        varlen_k=varlen,
        q_strides=_contiguous(head_dim_qk, varlen),
        k_strides=_contiguous(head_dim_qk, varlen),
        v_strides=_contiguous(head_dim_v, varlen),
        vector_bytes=_vector_bytes(head_dim_qk, head_dim_v),
    )


def _contiguous(head_dim: int, varlen: bool) -> Strides:
    row = _HEADS * head_dim
    return (0 if varlen else _ROWS * row, row, head_dim)


def _vector_bytes(*head_dims: int) -> int:
    """Of contiguous tensors with these head dims."""
    return gcd(MAX_VECTOR_BYTES, *(_ELEM_BYTES * head_dim for head_dim in head_dims))
