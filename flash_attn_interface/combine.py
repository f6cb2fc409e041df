"""flash_attn_combine: merge the results of attention over disjoint sets of keys.

On a GPU by the kernel that also merges the splits of decoding, `flash2/combine.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, selection
from ._common import env
from ._common.check_cache import MAX_SPLITS
from ._common.check_overlap import check_outputs
from ._common.check_tensors import last_dim_contiguous, require_device, require_tensor
from ._common.check_values import shown
from .autocast import without_autocast
from .out_argument import check_out

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
    from ._flash2.combine import CombinePlan, CombineProblem

    out_partial = last_dim_contiguous(out_partial)
    if lse_partial.stride(2) != 1 and lse_partial.shape[2] > 1:
        lse_partial = lse_partial.transpose(2, 3).contiguous().transpose(2, 3)
    target = selection.target_for("flash2", device)
    key = (CombineProblem.of(out_partial, lse_partial, out), target)
    plan: CombinePlan | None = dispatch._plans.cache_by_key.get(key)
    if plan is None:
        plan = CombinePlan(*key)
        dispatch.remember(dispatch._plans.cache_by_key, key, plan)
    return plan.run(out_partial, lse_partial, out)


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
