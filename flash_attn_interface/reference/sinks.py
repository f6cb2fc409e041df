"""Attention sinks: one logit per query head in the softmax's denominator that has no value.

Not fused yet: these are PyTorch operations on the result of a call without sinks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._common.ask.check_tensors import require_device, require_floating


def apply_sinks(out: Tensor, softmax_lse: Tensor, s_aux: Tensor) -> tuple[Tensor, Tensor]:
    """What attention with the sinks `s_aux` gives, from the result of attention without them.

    out * sigmoid(lse - s_aux) and logaddexp(lse, s_aux), computed in float32. Gradients reach out,
    softmax_lse and s_aux.

    Args:
        out: (..., num_heads_q, head_dim_v): (batch, seqlen_q, ...) or packed, (total_q, ...).
        softmax_lse: (batch, num_heads_q, seqlen_q), or packed (num_heads_q, total_q), as the
            functions of this package return it: -inf for a row that sees no key.
        s_aux: (num_heads_q,), any floating dtype; -inf is "no sink".

    Returns:
        (out, softmax_lse) with sinks, in the dtypes given. A row that sees no key has out 0 and
        softmax_lse s_aux.

    Raises:
        TypeError: an argument is no tensor of floating-point numbers.
        ValueError: shapes or devices disagree.
    """
    for name, tensor in (("out", out), ("softmax_lse", softmax_lse), ("s_aux", s_aux)):
        require_floating(name, tensor)
        require_device(name, tensor, out.device, "out")
    if out.ndim < 3:
        raise ValueError(f"out has shape {tuple(out.shape)}: expected (..., num_heads_q, head_dim)")
    heads = out.shape[-2]
    if s_aux.shape != (heads,):
        raise ValueError(
            f"s_aux has shape {tuple(s_aux.shape)}: expected (num_heads_q,), ({heads},) by out"
        )
    if softmax_lse.ndim < 2 or softmax_lse.transpose(-1, -2).shape != out.shape[:-1]:
        raise ValueError(
            f"softmax_lse has shape {tuple(softmax_lse.shape)}, which does not suit out, "
            f"{tuple(out.shape)}: expected (batch, num_heads_q, seqlen_q) or (num_heads_q, total_q)"
        )
    precise = torch.promote_types(softmax_lse.dtype, torch.float32)
    sink = s_aux.to(precise)[:, None]
    # -inf - -inf is nan, in the gradients too, so such rows and heads are taken out beforehand.
    empty = torch.isneginf(softmax_lse)
    finite_lse = softmax_lse.to(precise).masked_fill(empty, 0.0)
    share = torch.sigmoid(finite_lse - sink).masked_fill(empty, 0.0)
    # log(exp(lse) + exp(sink)) = sink + softplus(lse - sink), which -inf in sink would make nan.
    absent = torch.isneginf(sink)
    present = sink.masked_fill(absent, 0.0)
    combined = torch.where(absent, finite_lse, torch.logaddexp(finite_lse, present))
    lse = torch.where(empty, sink.expand_as(combined), combined)
    scaled = out.to(precise) * share.transpose(-1, -2)[..., None]
    return scaled.to(out.dtype), lse.to(softmax_lse.dtype)
