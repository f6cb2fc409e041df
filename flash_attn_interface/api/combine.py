"""flash_attn_combine: merge the results of attention over disjoint sets of keys.

On a GPU by the kernel that also merges the splits of decoding, `flash2/combine.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._common import env
from .._common.ask.check_kv import MAX_SPLITS
from .._common.ask.check_overlap import check_outputs
from .._common.ask.check_tensors import last_dim_contiguous, require_device, require_tensor
from .._common.ask.check_values import shown
from ..call import selection
from ..call.custom_op import custom_op
from ..call.out_argument import check_out
from ..call.plans import plans
from ..call.watchers import refuse_forward_mode, unwatched
from ..reference.without_autocast import without_autocast

_RESULT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The attention over all keys, from the results over parts of them.

    Args:
        out_partial: float32 (num_splits, batch, seqlen, num_heads, head_dim_v), up to 256 splits.
        lse_partial: float32 (num_splits, batch, seqlen, num_heads), natural logarithm. A part
            whose value is -inf saw no key, and its out_partial is ignored, NaN or not.
        out: where to put the result; None makes a tensor.
        out_dtype: of the result: float32 (None), float16 or bfloat16; that of `out` if given.

    Returns:
        (out, softmax_lse): (batch, seqlen, num_heads, head_dim_v) and float32 (batch, seqlen,
        num_heads), which lies in memory as (batch, num_heads, seqlen). A row that no part saw a key
        for is 0, with -inf.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices are others, or out overlaps itself or an
            input.
    """
    _check(out_partial, lse_partial)
    dtype = _result_dtype(out_partial, lse_partial, out, out_dtype)
    if is_compiling() or _is_watched(out_partial, lse_partial, out):
        refuse_forward_mode(out_partial, lse_partial)
        merged, softmax_lse = combine(out_partial, lse_partial, dtype)
        return merged if out is None else out.copy_(merged), softmax_lse
    return _combine(out_partial, lse_partial, out, dtype)


def _is_watched(out_partial: Tensor, lse_partial: Tensor, out: Tensor | None) -> bool:
    """Also by autograd: the operator has a gradient, the kernel has none."""
    partials = (out_partial, lse_partial)
    if not unwatched(*partials, out_partial if out is None else out) or out_partial.is_meta:
        return True
    return torch.is_grad_enabled() and any(partial.requires_grad for partial in partials)


@custom_op(
    "flash_attn_interface::combine",
    "(Tensor out_partial, Tensor lse_partial, ScalarType out_dtype) -> (Tensor, Tensor)",
)
def combine(
    out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`flash_attn_combine` for tensors that somebody watches (`watchers.py`)."""
    merged, softmax_lse = _combine(out_partial, lse_partial, None, out_dtype)
    return merged, softmax_lse.transpose(1, 2).contiguous().transpose(1, 2)


@combine.register_fake
def _(out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, seqlen, num_heads = lse_partial.shape[1:]
    softmax_lse = lse_partial.new_empty((batch, num_heads, seqlen)).transpose(1, 2)
    return out_partial.new_empty(out_partial.shape[1:], dtype=out_dtype), softmax_lse


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], *output)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None]:
    """Part i has the weight w = exp(lse_partial[i] - softmax_lse) in the sum."""
    out_partial, lse_partial, out, softmax_lse = ctx.saved_tensors
    weights = torch.exp(lse_partial - softmax_lse).masked_fill(lse_partial == float("-inf"), 0.0)
    dlse_partial = weights * (0.0 if dlse is None else dlse)
    if dout is None:
        return None, dlse_partial, None
    dout = dout.float()
    differences = torch.where(weights.unsqueeze(-1) > 0, out_partial - out.float(), 0.0)
    dlse_partial = dlse_partial + weights * (dout * differences).sum(-1)
    return weights.unsqueeze(-1) * dout, dlse_partial, None


combine.register_autograd(_differentiate, setup_context=_save)


def _combine(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`flash_attn_combine` of checked arguments."""
    device = selection.device_of(out_partial)
    if device.capability is None or env.FORCE_BACKEND.get() == "reference":
        merged, softmax_lse = _reference(out_partial, lse_partial, dtype)
        return merged if out is None else out.copy_(merged), softmax_lse
    if out is not None and (out.stride(-1) == 1 or out.shape[-1] == 1):
        return out, _kernel(out_partial, lse_partial, out, device)
    merged = out_partial.new_empty(out_partial.shape[1:], dtype=dtype)
    softmax_lse = _kernel(out_partial, lse_partial, merged, device)
    return merged if out is None else out.copy_(merged), softmax_lse


def _kernel(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor, device: selection.Device
) -> Tensor:
    """Fills out; returns softmax_lse."""
    from .._flash2.combine import CombinePlan, CombineProblem

    out_partial = last_dim_contiguous(out_partial)
    if lse_partial.stride(2) != 1 and lse_partial.shape[2] > 1:
        lse_partial = lse_partial.transpose(2, 3).contiguous().transpose(2, 3)
    target = selection.target_for("flash2", device)
    key = (CombineProblem.of(out_partial, lse_partial, out), target)
    slot, plan = plans.take(key, lambda: CombinePlan(*key))
    try:
        softmax_lse: Tensor = plan.run(out_partial, lse_partial, out)
    finally:
        slot.idle.append(plan)
    return softmax_lse


@without_autocast
def _reference(
    out_partial: Tensor, lse_partial: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """With PyTorch operations."""
    largest = lse_partial.amax(0)
    reference = largest.masked_fill(largest == float("-inf"), 0.0)
    weights = torch.exp(lse_partial - reference)
    total = weights.sum(0)
    weights = (weights / total.masked_fill(total == 0, 1.0)).unsqueeze(-1)
    merged = torch.where(weights > 0, out_partial * weights, 0.0).sum(0).to(dtype)
    softmax_lse = torch.log(total) + reference
    return merged, softmax_lse.transpose(1, 2).contiguous().transpose(1, 2)


def _check(out_partial: Tensor, lse_partial: Tensor) -> None:
    for name, tensor in (("out_partial", out_partial), ("lse_partial", lse_partial)):
        require_tensor(name, tensor)
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} has dtype {tensor.dtype}: expected torch.float32")
    if out_partial.ndim != 5:
        raise ValueError(
            f"out_partial has shape {tuple(out_partial.shape)}: expected (num_splits, batch, "
            "seqlen, num_heads, head_dim_v)"
        )
    if not 1 <= out_partial.shape[0] <= MAX_SPLITS:
        raise ValueError(
            f"out_partial has {out_partial.shape[0]} splits: expected 1 to {MAX_SPLITS}"
        )
    if lse_partial.shape != out_partial.shape[:-1]:
        raise ValueError(
            f"lse_partial has shape {tuple(lse_partial.shape)}: expected "
            f"{tuple(out_partial.shape[:-1])}, that of out_partial without the last size"
        )
    require_device("lse_partial", lse_partial, out_partial.device, "out_partial")


def _result_dtype(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor | None, out_dtype: torch.dtype | None
) -> torch.dtype:
    if out is not None:
        require_tensor("out", out)
    dtype = out_dtype
    if dtype is None:
        dtype = torch.float32 if out is None else out.dtype
    if not isinstance(dtype, torch.dtype) or dtype not in _RESULT_DTYPES:
        given = "out has dtype" if out_dtype is None else "out_dtype is"
        raise TypeError(f"{given} {shown(dtype)}: expected torch.float32, float16 or bfloat16")
    if out is not None:
        if out.dtype != dtype:
            raise TypeError(f"out_dtype is {dtype} but out has {out.dtype}: they must agree")
        check_out("out", out, out_partial.shape[1:], dtype, out_partial.device, "out_partial")
        check_outputs({"out": out}, {"out_partial": out_partial, "lse_partial": lse_partial})
    return dtype
