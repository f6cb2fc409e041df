"""Attention on one rank: the only module here that knows how the rest of the package is called.

`forward` goes through the public functions, `backward` through `dispatch.backward`, which takes an
out and a softmax_lse that were merged over more keys than it is given. CPU tensors that no
simulator takes run the reference, in any floating dtype.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .._common import env
from .._common.ask.call import Backward, Call, Tensors
from .._common.ask.call import Options as CallOptions
from .._common.ask.call import Sequences as Lengths
from .._common.ask.problem import Target
from .._flash2.merge import MergePlan, MergeProblem
from ..api.fa3 import flash_attn_func, flash_attn_varlen_func
from ..call import dispatch, selection
from ..call.simulation import simulate, simulated_arch
from ..reference.forward import attention_reference


class Options(NamedTuple):
    """What every launch of a call has in common."""

    softmax_scale: float
    softcap: float
    deterministic: bool
    arch: str | None = None  # being simulated, of which the backward's thread knows nothing


class Sequences(NamedTuple):
    """A launch on the device. cu_seqlens: None for tensors with a batch dimension."""

    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool
    window: tuple[int, int]


def forward(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: Options
) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse) without autograd; softmax_lse is (batch, heads, rows) or (heads, rows)."""
    s = sequences
    if _reference(q, options):
        return _reference_forward(q, k, v, s, options)
    with _machine(options):
        if s.cu_seqlens_q is None:
            results = flash_attn_func(
                q,
                k,
                v,
                softmax_scale=options.softmax_scale,
                causal=s.causal,
                window_size=s.window,
                softcap=options.softcap,
                return_attn_probs=True,
            )
        else:
            results = flash_attn_varlen_func(
                q,
                k,
                v,
                s.cu_seqlens_q,
                s.cu_seqlens_k,
                s.max_seqlen_q,
                s.max_seqlen_k,
                softmax_scale=options.softmax_scale,
                causal=s.causal,
                window_size=s.window,
                softcap=options.softcap,
                return_attn_probs=True,
            )
    out, softmax_lse = results
    return out, softmax_lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    sequences: Sequences,
    options: Options,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of these keys' part in (out, softmax_lse). into: where to write them."""
    s = sequences
    if _reference(q, options):
        found = _reference_backward(dout, dlse, q, k, v, out, softmax_lse, s, options)
        if into is None:
            return found
        for result, value in zip(into, found, strict=True):
            result.copy_(value)
        return into
    results = into or (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    with _machine(options):
        call = Call(
            Tensors(q, k, v, s.cu_seqlens_q, s.cu_seqlens_k),
            Lengths(s.max_seqlen_q, s.max_seqlen_k),
            None,
            CallOptions(
                softmax_scale=options.softmax_scale,
                causal=s.causal,
                window_size=s.window,
                softcap=options.softcap,
                deterministic=options.deterministic,
            ),
        )
        dlse = None if dlse is None else dlse.contiguous()
        lse = softmax_lse.contiguous()
        dispatch.backward(call, Backward(dout.to(q.dtype), out, lse, *results, None, dlse))
    return results


def merge(
    out: Tensor, softmax_lse: Tensor, part: Tensor, lse_part: Tensor, rows: Tensor | None
) -> bool:
    """Adds a result over other keys to (out, softmax_lse), in place, by one kernel; False if none
    serves these tensors.

    Args:
        out: of 16 bits or float32, with a batch dimension or packed; part likewise, of 16 bits.
        rows: int64, the rows of out and softmax_lse that the part is of; None: all of them.
    """
    if part.dtype not in (torch.bfloat16, torch.float16) or env.FORCE_BACKEND.get() == "reference":
        return False
    device = selection.device_of(part)
    if device.capability is None:
        return False
    if out.ndim == 3:
        out, softmax_lse, part, lse_part = (
            x.unsqueeze(0) for x in (out, softmax_lse, part, lse_part)
        )
    problem = MergeProblem.of(out, softmax_lse, part, lse_part, rows)
    key = problem, selection.target_for("flash2", device)
    plan = _merges.plans.get(key)
    if plan is None:
        if len(_merges.plans) >= _MAX_MERGES:
            _merges.plans.clear()
        plan = _merges.plans[key] = MergePlan(*key)
    plan.run(out, softmax_lse, part, lse_part, rows)
    return True


class _Merges(threading.local):
    """Plans of one thread: they hold a parameter block that is patched in place."""

    def __init__(self) -> None:
        self.plans: dict[tuple[MergeProblem, Target], MergePlan] = {}


_merges = _Merges()
_MAX_MERGES = 1024  # packed documents make a new one per length


def takes(tensor: Tensor) -> bool:
    """Whether the dtype is one that attention on the tensor's device takes."""
    if tensor.device.type == "cpu" and simulated_arch() is None:
        return tensor.dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    return tensor.dtype in (torch.bfloat16, torch.float16)


def _machine(options: Options) -> simulate | nullcontext[None]:  # type: ignore[valid-type]
    return nullcontext() if options.arch is None else simulate(options.arch)


def _reference(q: Tensor, options: Options) -> bool:
    return q.device.type == "cpu" and options.arch is None


def _reference_forward(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: Options
) -> tuple[Tensor, Tensor]:
    out, softmax_lse, _ = attention_reference(
        q,
        k,
        v,
        softmax_scale=options.softmax_scale,
        causal=sequences.causal,
        window_size=sequences.window,
        softcap=options.softcap,
        cu_seqlens_q=sequences.cu_seqlens_q,
        cu_seqlens_k=sequences.cu_seqlens_k,
    )
    assert softmax_lse is not None
    return out, softmax_lse


def _reference_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    sequences: Sequences,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """By autograd. With the part's own (out_part, lse_part) and w = exp(lse_part - lse), the whole
    is out = sum of w out_part; so the part's gradients are w dout for out_part, and for lse_part
    w (dout . (out_part - out) + dlse).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q_wide, k_wide, v_wide = (x.detach().to(wide).requires_grad_() for x in (q, k, v))
    with torch.enable_grad():
        out_part, lse_part = _reference_forward(q_wide, k_wide, v_wide, sequences, options)
    with torch.no_grad():
        dout = dout.to(wide)
        seen = (lse_part > float("-inf")) & (softmax_lse.abs() < float("inf"))
        weight = torch.where(seen, torch.exp(lse_part - softmax_lse), 0.0)
        inner = (dout * (out_part - out.to(wide))).sum(-1).transpose(-1, -2)
        dlse_part = weight * (inner if dlse is None else inner + dlse)
        dout_part = dout * weight.transpose(-1, -2).unsqueeze(-1)
    found = torch.autograd.grad(
        (out_part, lse_part), (q_wide, k_wide, v_wide), (dout_part, dlse_part)
    )
    dq, dk, dv = (d.to(x.dtype) for d, x in zip(found, (q, k, v), strict=True))
    return dq, dk, dv
