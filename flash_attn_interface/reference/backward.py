"""The reference's backward in explicit formulas, for any out and softmax_lse.

Called by `backends.py` where a backward is an operation of its own: under torch.compile, by the
private operations, and if the reference is forced. Plain calls on CPU tensors are differentiated by
autograd instead; tests/call/test_autograd.py compares the two. Like `forward.py` it materialises
the score matrix, of one sequence at a time.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .._common.ask.call import Backward, Tensors
from .._common.ask.problem import Problem
from .._common.launch.philox import keep_mask
from .forward import _alibi_rows, _Options, _Slots, _visible
from .without_autocast import without_autocast

STAT_ROWS = 128  # FlashAttention-2's padding of softmax_d


@without_autocast
def reference_backward(problem: Problem, tensors: Tensors, backward: Backward) -> Tensor:
    """Writes dq, dk and dv, zeros where no sequence is; returns softmax_d as FlashAttention-2 does.

    P = exp(scores - softmax_lse), also where softmax_lse and out were merged over more keys than k
    holds (ring attention). Rows whose softmax_lse is infinite, of either sign, have P = 0.
    """
    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, alibi_slopes, *_ = tensors
    dout, out, softmax_lse, dq, dk, dv, rng_state, dlse = backward
    softmax_d = (dout.float() * out.float()).sum(-1).transpose(-1, -2)
    if dlse is not None:
        softmax_d = softmax_d - dlse
    softmax_d = softmax_d.masked_fill(softmax_lse.isinf(), 0.0)
    slots_q = _Slots(cu_seqlens_q, seqused_q, q)
    slots_k = _Slots(cu_seqlens_k, seqused_k, k)
    for gradient in (dq, dk, dv):
        gradient.zero_()
    for batch_idx in range(problem.batch):
        results = _one_sequence(
            problem,
            batch_idx,
            slots_q.rows(dout, batch_idx).float(),
            slots_q.rows(q, batch_idx).float(),
            slots_k.rows(k, batch_idx).float(),
            slots_k.rows(v, batch_idx).float(),
            slots_q.rows(softmax_lse.transpose(-1, -2), batch_idx).transpose(-1, -2),
            slots_q.rows(softmax_d.transpose(-1, -2), batch_idx).transpose(-1, -2),
            _alibi_rows(alibi_slopes, batch_idx, 1),
            rng_state,
        )
        for into, slots, result in zip(
            (dq, dk, dv), (slots_q, slots_k, slots_k), results, strict=True
        ):
            slots.rows(into, batch_idx).copy_(result)
    return _padded(softmax_d, cu_seqlens_q)


def _one_sequence(
    problem: Problem,
    batch_idx: int,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_lse: Tensor,
    softmax_d: Tensor,
    alibi: Tensor | None,
    rng_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of (seqlen, num_heads, head_dim) tensors; statistics (num_heads_q, seqlen_q)."""
    seqlen_q, seqlen_k = q.shape[0], k.shape[0]
    k_of_q = k.repeat_interleave(problem.qhead_per_khead, dim=1)
    v_of_q = v.repeat_interleave(problem.qhead_per_vhead, dim=1)
    position_q = torch.arange(seqlen_q, device=q.device).unsqueeze(1) + (seqlen_k - seqlen_q)
    position_k = torch.arange(seqlen_k, device=q.device)
    visible = _visible(position_q, position_k, _mask(problem))

    scores = torch.einsum("ihd,jhd->hij", q, k_of_q) * problem.softmax_scale
    dscores_factor: Tensor | float = problem.softmax_scale
    if problem.softcap > 0.0:
        tanh = torch.tanh(scores / problem.softcap)
        scores = problem.softcap * tanh
        dscores_factor = (1.0 - tanh * tanh) * problem.softmax_scale
    if alibi is not None:
        scores = scores - alibi.reshape(-1, 1, 1) * (position_q - position_k).abs()
    exists = visible & ~softmax_lse.isinf().unsqueeze(-1)
    p = torch.exp(scores - softmax_lse.unsqueeze(-1)).masked_fill(~exists, 0.0)

    dp = torch.einsum("ihd,jhd->hij", dout, v_of_q)
    p_kept = p
    if problem.dropout:
        assert rng_state is not None
        keep = keep_mask(
            rng_state, problem.dropout_p, 1, problem.num_heads_q, seqlen_q, seqlen_k, batch_idx
        )[0]
        keep_scale = 1.0 / (1.0 - problem.dropout_p)
        p_kept, dp = p.masked_fill(~keep, 0.0) * keep_scale, dp.masked_fill(~keep, 0.0) * keep_scale
    ds = (p * (dp - softmax_d.unsqueeze(-1))).masked_fill(~exists, 0.0) * dscores_factor
    dk = torch.einsum("hij,ihd->jhd", ds, q)
    dv = torch.einsum("hij,ihd->jhd", p_kept, dout)
    groups_k = (problem.num_heads_k, problem.qhead_per_khead)
    groups_v = (problem.num_heads_v, problem.qhead_per_vhead)
    return (
        torch.einsum("hij,jhd->ihd", ds, k_of_q),
        dk.reshape(seqlen_k, *groups_k, q.shape[-1]).sum(2),
        dv.reshape(seqlen_k, *groups_v, v.shape[-1]).sum(2),
    )


def _mask(problem: Problem) -> _Options:
    """What `_visible` reads."""
    return _Options(
        softmax_scale=problem.softmax_scale,
        scale_k=False,
        window_left=None if problem.window_left < 0 else problem.window_left,
        window_right=None if problem.window_right < 0 else problem.window_right,
        attention_chunk=problem.attention_chunk,
        softcap=problem.softcap,
        dropout_p=problem.dropout_p,
        rng_state=None,
        return_softmax=False,
    )


def _padded(softmax_d: Tensor, cu_seqlens_q: Tensor | None) -> Tensor:
    """Rows rounded up to 128; packed, 128 more for each sequence."""
    if cu_seqlens_q is None:
        return torch.nn.functional.pad(softmax_d, (0, -softmax_d.shape[-1] % STAT_ROWS))
    starts = cu_seqlens_q.tolist()
    num_heads_q, total_q = softmax_d.shape
    padded = softmax_d.new_zeros(num_heads_q, total_q + STAT_ROWS * (len(starts) - 1))
    for batch_idx, (start, end) in enumerate(pairwise(starts)):
        first = start + STAT_ROWS * batch_idx
        padded[:, first : first + end - start] = softmax_d[:, start:end]
    return padded
