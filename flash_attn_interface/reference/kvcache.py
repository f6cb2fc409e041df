"""Attention over a key and value cache in plain PyTorch: what CPU tensors run, and the tests'
oracle.

Slow and obvious on purpose: one sequence at a time, its keys gathered from the cache and given to
`forward.py`. Change the meaning of a feature here first; kernels follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .._common.ask.out_layout import laid_out
from .forward import attention_reference
from .without_autocast import without_autocast


@without_autocast
def cache_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    *,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    rotary_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    rotary_per_row: bool | None = None,
    alibi_slopes: Tensor | None = None,
    upcast: bool = True,
    rotated_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Write k and v behind the cached keys and values, in place, then attend over all of these.

    Args:
        q, k_cache, v_cache, k, v, qv, the tensors up to rotary_seqlens, softmax_scale, causal,
            window_size, attention_chunk, softcap, rotary_interleaved: as in
            `flash_attn_interface.flash_attn_with_kvcache`; float64 is fine as well.
        rotary_per_row: row t of q turns by position base + t; otherwise every row by base. None:
            if the call is causal, windowed or chunked.
        alibi_slopes, upcast: as in `attention_reference`.
        rotated_dtype: rotate in float32 and round the results to this, whatever the dtype of q;
            None: that dtype.

    Returns:
        (out, softmax_lse), as `attention_reference`. Rows of a ragged q that belong to no sequence
        give zeros and -inf.
    """
    if rotary_per_row is None:
        rotary_per_row = causal or max(window_size) >= 0 or attention_chunk > 0
    if softmax_scale is None:
        softmax_scale = (q.shape[-1] + (0 if qv is None else v_cache.shape[-1])) ** -0.5
    queries = _Rows(q, cu_seqlens_q)
    out = q.new_zeros(*q.shape[:-1], v_cache.shape[-1])
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    lse_by_row = q.new_full(q.shape[:-1], float("-inf"), dtype=lse_dtype)
    for b in range(queries.count):
        # The slots of the cache that belong to this sequence: (cache row, page row) of each key.
        index = b if cache_batch_idx is None else int(cache_batch_idx[b])
        if page_table is None:
            capacity = k_cache.shape[1]
            place = torch.arange(capacity, device=q.device)
            slots = (torch.full_like(place, index), place)
        else:
            page_size = k_cache.shape[1]
            capacity = page_table.shape[1] * page_size
            place = torch.arange(capacity, device=q.device)
            slots = (page_table[index].long()[place // page_size], place % page_size)
        length = capacity if cache_seqlens is None else int(cache_seqlens[b])
        base = length if rotary_seqlens is None else int(rotary_seqlens[b])

        q_rows = queries.of(q, b)
        if rotary_cos is not None and rotary_sin is not None:
            steps = torch.arange(q_rows.shape[0], device=q.device) * int(rotary_per_row)
            q_rows = _rotate(
                q_rows, rotary_cos, rotary_sin, base + steps, rotary_interleaved, rotated_dtype
            )
        if k is not None and v is not None:
            new_rows = _Rows(k, cu_seqlens_k_new)
            k_rows, v_rows = new_rows.of(k, b), new_rows.of(v, b)
            count = k_rows.shape[0]
            if rotary_cos is not None and rotary_sin is not None:
                positions = base + torch.arange(count, device=q.device)
                k_rows = _rotate(
                    k_rows, rotary_cos, rotary_sin, positions, rotary_interleaved, rotated_dtype
                )
            written = tuple(axis[length : length + count] for axis in slots)
            k_cache[written] = k_rows
            v_cache[written] = v_rows
            length += count

        first = 0 if cache_leftpad is None else int(cache_leftpad[b])
        read = tuple(axis[first:length] for axis in slots)
        keys, values = k_cache[read], v_cache[read]
        if qv is not None:  # q . k + qv . v is one product of concatenated vectors
            q_rows = torch.cat([q_rows, queries.of(qv, b)], -1)
            keys, values = (
                x.repeat_interleave(q.shape[-2] // x.shape[-2], -2) for x in (keys, values)
            )
            keys = torch.cat([keys, values], -1)
        out_one, lse_one, _ = attention_reference(
            q_rows.unsqueeze(0),
            keys.unsqueeze(0),
            values.unsqueeze(0),
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            attention_chunk=attention_chunk,
            softcap=softcap,
            alibi_slopes=alibi_slopes
            if alibi_slopes is None or alibi_slopes.ndim == 1
            else alibi_slopes[b],
            upcast=upcast,
        )
        assert lse_one is not None
        queries.of(out, b).copy_(out_one.squeeze(0))
        queries.of(lse_by_row, b).copy_(lse_one.squeeze(0).transpose(0, 1))
    return laid_out(out, q), lse_by_row.transpose(-1, -2).contiguous()


class _Rows:
    """Where each sequence's rows lie in (batch, rows, ...) or, with cu_seqlens, (rows, ...)."""

    def __init__(self, tokens: Tensor, cu_seqlens: Tensor | None) -> None:
        self._bounds = None if cu_seqlens is None else list(pairwise(cu_seqlens.tolist()))
        self.count = tokens.shape[0] if self._bounds is None else len(self._bounds)

    def of(self, tokens: Tensor, b: int) -> Tensor:
        """View (rows of sequence b, ...)."""
        if self._bounds is None:
            return tokens[b]
        start, stop = self._bounds[b]
        return tokens[start:stop]


def _rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    interleaved: bool,
    rounded_to: torch.dtype | None,
) -> Tensor:
    """x (rows, heads, head_dim), turned by its rows' positions; beyond the tables, by none."""
    rounded_to = rounded_to or x.dtype
    dtype = torch.promote_types(rounded_to, torch.float32)
    known = (positions < cos.shape[0]).unsqueeze(-1)
    rows = positions.clamp(max=cos.shape[0] - 1)
    cos = torch.where(known, cos[rows].to(dtype), 1.0).unsqueeze(1)
    sin = torch.where(known, sin[rows].to(dtype), 0.0).unsqueeze(1)
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].to(dtype), x[..., 2 * half :]
    if interleaved:
        x0, x1 = turned[..., 0::2], turned[..., 1::2]
    else:
        x0, x1 = turned[..., :half], turned[..., half:]
    y0, y1 = x0 * cos - x1 * sin, x0 * sin + x1 * cos
    y = torch.stack([y0, y1], -1).flatten(-2) if interleaved else torch.cat([y0, y1], -1)
    return torch.cat([y.to(rounded_to).to(x.dtype), rest], -1)
