"""LayerNorm and RMSNorm with FlashAttention-2's signatures, in plain PyTorch:
`flash_attn.ops.triton.layer_norm` re-exports them.

They have nothing to do with attention: model code imports them wherever it finds flash_attn.
Arithmetic is float32; under torch.compile it becomes a fused kernel, as upstream's Triton code is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .out_argument import write_out


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """norm(dropout(rowscale * x) + dropout(x1) + residual) * weight + bias, differentiable.

    Args:
        x, x1, residual: (..., hidden_size); x1 and residual None are left out of the sum.
        weight, bias: (hidden_size,).
        weight1, bias1: of a second result, from the same normalised values.
        rowscale: (...), a factor of each row of x; not together with x1.
        prenorm: also return the sum, for the next residual connection.
        residual_in_fp32: keep the sum in float32, where residual does not say otherwise.
        zero_centered_weight: weights are stored less 1.
        is_rms_norm: divide by the root mean square, without subtracting the mean.
        return_dropout_mask: also return which values were kept.
        out_dtype: of the results; None: that of x.
        out, residual_out: where to put the first result and the sum.

    Returns:
        result, or a tuple (result, result1 if weight1 is given, sum if prenorm, and with
        return_dropout_mask the masks of x and x1, None where there is no dropout).

    Raises:
        ValueError: rowscale and x1 are given, or shapes disagree.
    """
    if rowscale is not None and x1 is not None:
        raise ValueError("rowscale is given together with x1: expected one of them at most")
    for name, other in (("residual", residual), ("x1", x1)):
        if other is not None and other.shape != x.shape:
            raise ValueError(f"{name} has shape {tuple(other.shape)}: expected {tuple(x.shape)}")
    total = x.float()
    if rowscale is not None:
        total = total * rowscale.float().unsqueeze(-1)
    total, mask = _dropout(total, dropout_p)
    mask1 = None
    if x1 is not None:
        second, mask1 = _dropout(x1.float(), dropout_p)
        total = total + second
    if residual is not None:
        total = total + residual.float()
    normalised = _normalise(total, eps, is_rms_norm)
    dtype = x.dtype if out_dtype is None else out_dtype
    first = _scaled(normalised, weight, bias, zero_centered_weight).to(dtype)
    results = [first if out is None else write_out("out", out, first)]
    if weight1 is not None:
        results.append(_scaled(normalised, weight1, bias1, zero_centered_weight).to(dtype))
    if prenorm:
        kept = total.to(_residual_dtype(x, residual, residual_in_fp32))
        results.append(
            kept if residual_out is None else write_out("residual_out", residual_out, kept)
        )
    if return_dropout_mask:
        return (*results, mask, mask1)
    return results[0] if len(results) == 1 else tuple(results)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """`layer_norm_fn` with is_rms_norm=True."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm,
        residual_in_fp32, zero_centered_weight, True, return_dropout_mask, out_dtype, out,
        residual_out,
    )  # fmt: skip


class RMSNorm(nn.Module):
    """`rms_norm_fn` with a weight."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.zero_centered_weight = zero_centered_weight
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The weight that changes nothing."""
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        """As `rms_norm_fn`; dropout in training only."""
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )


def _dropout(x: Tensor, dropout_p: float) -> tuple[Tensor, Tensor | None]:
    """(x with dropout, what was kept)."""
    if dropout_p <= 0.0:
        return x, None
    kept = torch.rand_like(x) >= dropout_p
    return x * kept / (1.0 - dropout_p), kept


def _normalise(x: Tensor, eps: float, is_rms_norm: bool) -> Tensor:
    if not is_rms_norm:
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _scaled(x: Tensor, weight: Tensor, bias: Tensor | None, zero_centered: bool) -> Tensor:
    x = x * (weight.float() + 1.0 if zero_centered else weight.float())
    return x if bias is None else x + bias.float()


def _residual_dtype(x: Tensor, residual: Tensor | None, in_fp32: bool) -> torch.dtype:
    if residual is not None:
        return residual.dtype
    return torch.float32 if in_fp32 else x.dtype
