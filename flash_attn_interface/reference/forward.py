"""Plain PyTorch attention: what CPU tensors run, and what every kernel is tested against.

Slow and obvious on purpose. It materialises the score matrix, so memory is several times
num_heads_q * seqlen_q * seqlen_k per sequence, and with gradients on, the sum of that over the
batch. Called by backends.py for CPU tensors and by tests/support/oracle.py. Change the meaning of a
feature here first; kernels follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .._common.ask.out_layout import laid_out
from .._common.launch.philox import keep_mask
from .without_autocast import without_autocast

# Dense batches are handled in groups whose score matrices hold at most this many elements (256 MiB
# in float32).
_MAX_SCORES_AT_ONCE = 1 << 26

_NEG_INF = float("-inf")


@without_autocast
def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = True,
    return_softmax: bool = False,
    upcast: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """softmax(softmax_scale * q k^T) v with every feature, differentiable by autograd.

    Scores are scaled, soft-capped, biased by ALiBi and masked, in this order. A query that sees no
    key gives zeros, softmax_lse = -inf and zero gradients, and so does every row past `seqused_q`
    or past `cu_seqlens_q[-1]`.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim_qk), or (total_q, num_heads_q, head_dim_qk) with
            cu_seqlens_q.
        k: (batch, seqlen_k, num_heads_k, head_dim_qk), or packed with cu_seqlens_k.
        v: (batch, seqlen_k, num_heads_v, head_dim_v), or packed; num_heads_v and head_dim_v are
            free of k's.
        softmax_scale: None means head_dim_qk ** -0.5.
        causal: query i sees key j when j <= i + seqlen_k - seqlen_q, lengths being those of the
            sequence.
        window_size: (left, right); query i sees keys i + seqlen_k - seqlen_q - left ... + right,
            both ends included. Negative = unlimited. `causal` makes right 0.
        attention_chunk: if > 0, query and key must lie in the same chunk of so many key positions.
        softcap: if > 0, scores become softcap * tanh(scores / softcap).
        alibi_slopes: float (num_heads_q,) or (batch, num_heads_q); adds
            -slope * |i + seqlen_k - seqlen_q - j|.
        dropout_p: needs rng_state, int64 (2,) = (seed, offset); the mask is defined in
            common/launch/philox.py.
        seqused_q, seqused_k: int (batch,); only the first so many rows of each sequence take part.
        max_seqlen_q, max_seqlen_k: only size the returned softmax of packed sequences; None = the
            real maxima.
        upcast: True computes in float32 (float64 for float64 inputs). False computes in the dtype
            of q with the scale folded into k: an honest low-precision implementation, whose error
            is the yardstick of the tests.

    Returns:
        out: (batch, seqlen_q, num_heads_q, head_dim_v) or packed like q, dtype of q.
        softmax_lse: natural-log (batch, num_heads_q, seqlen_q), packed (num_heads_q, total_q);
            float32, or float64 for float64 inputs. None unless `return_lse`.
        s_dmask: (batch, num_heads_q, seqlen_q rounded up to 128, seqlen_k rounded up to 128), dtype
            of q: exp(score - row maximum), sign bit set where dropped, zero where masked. None
            unless `return_softmax`.
    """
    if dropout_p > 0.0 and rng_state is None:
        raise ValueError("attention_reference: dropout_p > 0 needs rng_state = (seed, offset)")
    compute_dtype = torch.promote_types(q.dtype, torch.float32) if upcast else q.dtype
    options = _Options(
        softmax_scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        scale_k=not upcast,
        window_left=_bound(window_size[0]),
        window_right=0 if causal else _bound(window_size[1]),
        attention_chunk=attention_chunk,
        softcap=softcap,
        dropout_p=dropout_p,
        rng_state=rng_state,
        return_softmax=return_softmax,
    )
    tokens = (q.to(compute_dtype), k.to(compute_dtype), v.to(compute_dtype))
    slots_q = _Slots(cu_seqlens_q, seqused_q, q)
    slots_k = _Slots(cu_seqlens_k, seqused_k, k)
    if slots_q.all_full and slots_k.all_full:
        out, lse, softmax = _dense(*tokens, alibi_slopes, options)
    else:
        out, lse, softmax = _per_sequence(*tokens, slots_q, slots_k, alibi_slopes, options)

    if softmax is not None:
        rows = slots_q.longest if max_seqlen_q is None else max_seqlen_q
        columns = slots_k.longest if max_seqlen_k is None else max_seqlen_k
        softmax = _resize(softmax, _round_up_128(rows), _round_up_128(columns)).to(q.dtype)
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return laid_out(out.to(q.dtype), q), lse.to(lse_dtype) if return_lse else None, softmax


@dataclass(frozen=True)
class _Options:
    """What applies to every sequence alike; window bounds are None when unlimited."""

    softmax_scale: float
    scale_k: bool
    window_left: int | None
    window_right: int | None
    attention_chunk: int
    softcap: float
    dropout_p: float
    rng_state: Tensor | None
    return_softmax: bool


Result = tuple[Tensor, Tensor, Tensor | None]


class _Slots:
    """Where each sequence lies in a dense or packed tensor, and how much of it is used."""

    def __init__(self, cu_seqlens: Tensor | None, seqused: Tensor | None, tokens: Tensor) -> None:
        self.all_full = cu_seqlens is None and seqused is None
        self.starts = None if cu_seqlens is None else cu_seqlens.tolist()
        if self.starts is None:
            capacity = [tokens.shape[1]] * tokens.shape[0]
        else:
            capacity = [stop - start for start, stop in pairwise(self.starts)]
        self.batch = len(capacity)
        self.longest = max(capacity, default=0)
        self.lengths = capacity if seqused is None else seqused.tolist()

    def rows(self, tokens: Tensor, batch_idx: int) -> Tensor:
        """View (length, ...) of the used rows of one sequence."""
        length = self.lengths[batch_idx]
        if self.starts is None:
            return tokens[batch_idx, :length]
        return tokens[self.starts[batch_idx] :][:length]


def _dense(q: Tensor, k: Tensor, v: Tensor, alibi: Tensor | None, options: _Options) -> Result:
    """All sequences have the same length: batched, in groups that bound the memory."""
    batch, seqlen_q, num_heads_q, _ = q.shape
    scores_per_sequence = max(1, num_heads_q * seqlen_q * k.shape[1])
    group = max(1, _MAX_SCORES_AT_ONCE // scores_per_sequence)
    parts = []
    for first in range(0, max(batch, 1), group):
        q_group, k_group, v_group = (x[first : first + group] for x in (q, k, v))
        alibi_group = _alibi_rows(alibi, first, group)
        parts.append(_attend(q_group, k_group, v_group, alibi_group, first, options))
    if len(parts) == 1:
        return parts[0]
    outs, lses, softmaxes = zip(*parts, strict=True)
    softmax = torch.cat(softmaxes) if options.return_softmax else None
    return torch.cat(outs), torch.cat(lses), softmax


def _per_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots_q: _Slots,
    slots_k: _Slots,
    alibi: Tensor | None,
    options: _Options,
) -> Result:
    """One sequence at a time; rows that belong to none keep out = 0 and softmax_lse = -inf."""
    num_heads_q = q.shape[-2]
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse_by_row = q.new_full(q.shape[:-1], _NEG_INF)  # heads last, so that rows() serves it too
    softmaxes = []
    for batch_idx in range(slots_q.batch):
        out_one, lse_one, softmax_one = _attend(
            slots_q.rows(q, batch_idx).unsqueeze(0),
            slots_k.rows(k, batch_idx).unsqueeze(0),
            slots_k.rows(v, batch_idx).unsqueeze(0),
            _alibi_rows(alibi, batch_idx, 1),
            batch_idx,
            options,
        )
        slots_q.rows(out, batch_idx).copy_(out_one.squeeze(0))
        slots_q.rows(lse_by_row, batch_idx).copy_(lse_one.squeeze(0).transpose(0, 1))
        if softmax_one is not None:
            softmaxes.append(_resize(softmax_one, slots_q.longest, slots_k.longest))
    softmax = None
    if options.return_softmax:
        nothing = q.new_zeros(0, num_heads_q, slots_q.longest, slots_k.longest)
        softmax = torch.cat([nothing, *softmaxes])
    return out, lse_by_row.transpose(-1, -2).contiguous(), softmax


def _attend(
    q: Tensor, k: Tensor, v: Tensor, alibi: Tensor | None, first_batch_idx: int, options: _Options
) -> Result:
    """Attention of (batch, seqlen, num_heads, head_dim) tensors in their own dtype."""
    batch, seqlen_q, num_heads_q, _ = q.shape
    seqlen_k = k.shape[1]
    k = k.repeat_interleave(num_heads_q // k.shape[2], dim=2)
    v = v.repeat_interleave(num_heads_q // v.shape[2], dim=2)

    # Scores: scale, softcap, ALiBi, mask. Positions of queries are those of the keys they are
    # aligned with.
    if options.scale_k:
        scores = torch.einsum("bihd,bjhd->bhij", q, k * options.softmax_scale)
    else:
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * options.softmax_scale
    if options.softcap > 0.0:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    position_q = torch.arange(seqlen_q, device=q.device).unsqueeze(1) + (seqlen_k - seqlen_q)
    position_k = torch.arange(seqlen_k, device=q.device)
    if alibi is not None:
        distance = (position_q - position_k).abs()
        scores = scores - (alibi.to(q.dtype)[..., None, None] * distance).to(q.dtype)
    visible = _visible(position_q, position_k, options)
    scores = scores.masked_fill(~visible, _NEG_INF)

    # Softmax. An empty row would give NaN: its scores become 0 here and its results are overwritten
    # below.
    empty = ~visible.any(dim=-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    p = torch.softmax(scores, dim=-1).masked_fill(empty, 0.0)
    lse = torch.logsumexp(scores, dim=-1).masked_fill(empty.squeeze(-1), _NEG_INF)

    p_kept = p
    keep = None
    if options.dropout_p > 0.0:
        assert options.rng_state is not None
        rng_state = options.rng_state.to(q.device)
        keep = keep_mask(
            rng_state, options.dropout_p, batch, num_heads_q, seqlen_q, seqlen_k, first_batch_idx
        )
        p_kept = p.masked_fill(~keep, 0.0)
        v = v * (1.0 / (1.0 - options.dropout_p))
    out = torch.einsum("bhij,bjhd->bihd", p_kept, v)

    softmax = None
    if options.return_softmax:
        row_max = scores.amax(dim=-1, keepdim=True) if seqlen_k > 0 else scores.new_zeros(())
        softmax = torch.exp(scores - row_max).masked_fill(empty, 0.0).detach()
        if keep is not None:
            softmax = torch.where(keep, softmax, -softmax)
    return out, lse, softmax


def _visible(position_q: Tensor, position_k: Tensor, options: _Options) -> Tensor:
    """Bool (seqlen_q, seqlen_k): which keys each query sees. Positions may be negative."""
    visible = torch.ones_like(position_q - position_k, dtype=torch.bool)
    if options.window_left is not None:
        visible &= position_k >= position_q - options.window_left
    if options.window_right is not None:
        visible &= position_k <= position_q + options.window_right
    if options.attention_chunk > 0:
        chunk_q = torch.div(position_q, options.attention_chunk, rounding_mode="floor")
        chunk_k = torch.div(position_k, options.attention_chunk, rounding_mode="floor")
        visible &= chunk_q == chunk_k
    return visible


def _bound(width: int | Tensor) -> int | None:
    width = int(width)
    return None if width < 0 else width


def _alibi_rows(alibi: Tensor | None, first_batch_idx: int, batch: int) -> Tensor | None:
    if alibi is None or alibi.dim() == 1:
        return alibi
    return alibi[first_batch_idx : first_batch_idx + batch]


def _round_up_128(length: int) -> int:
    return -(-length // 128) * 128


def _resize(x: Tensor, rows: int, columns: int) -> Tensor:
    """Zero-pads (or crops) the last two dimensions."""
    return torch.nn.functional.pad(x, (0, columns - x.shape[-1], 0, rows - x.shape[-2]))
