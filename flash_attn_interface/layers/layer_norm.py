"""LayerNorm and RMSNorm with FlashAttention-2's signatures, in plain PyTorch:
`flash_attn.ops.triton.layer_norm` re-exports them.

They have nothing to do with attention: model code imports them wherever it finds flash_attn.
Arithmetic is float32; under torch.compile it becomes a fused kernel, as upstream's Triton code is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .._common.ask.check_overlap import check_outputs
from .._common.ask.check_tensors import require_device, require_floating, require_shape
from .._common.ask.check_values import bounded, check_factory, flag, probability, real, shown
from ..call.out_argument import check_out


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
        out, residual_out: where to put the first result and the sum; any strides, no overlap.

    Returns:
        result, or a tuple (result, result1 if weight1 is given, sum if prenorm, and with
        return_dropout_mask the masks of x and x1, None where there is no dropout).

    Raises:
        TypeError: an argument's type or dtype is wrong.
        ValueError: rowscale and x1 are given, shapes or devices disagree, or out and residual_out
            overlap.
    """
    _check(
        x, {"residual": residual, "x1": x1},
        {"weight": weight, "bias": bias, "weight1": weight1, "bias1": bias1}, rowscale,
    )  # fmt: skip
    eps, dropout_p = real("eps", eps), probability("dropout_p", dropout_p)
    prenorm, is_rms_norm = flag("prenorm", prenorm), flag("is_rms_norm", is_rms_norm)
    residual_in_fp32 = flag("residual_in_fp32", residual_in_fp32)
    zero_centered_weight = flag("zero_centered_weight", zero_centered_weight)
    return_dropout_mask = flag("return_dropout_mask", return_dropout_mask)
    dtype = x.dtype if out_dtype is None else out_dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"out_dtype is {shown(out_dtype)}: expected a floating-point torch.dtype")
    kept_dtype = _residual_dtype(x, residual, residual_in_fp32)
    check_out("out", out, x.shape, dtype, x.device, "x and out_dtype")
    check_out("residual_out", residual_out, x.shape, kept_dtype, x.device, "x and residual")
    if out is not None and residual_out is not None and not is_compiling():
        check_outputs({"out": out, "residual_out": residual_out}, {})

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
    first = _scaled(normalised, weight, bias, zero_centered_weight).to(dtype)
    results = [first if out is None else out.copy_(first)]
    if weight1 is not None:
        results.append(_scaled(normalised, weight1, bias1, zero_centered_weight).to(dtype))
    if prenorm:
        kept = total.to(kept_dtype)
        results.append(kept if residual_out is None else residual_out.copy_(kept))
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
        """Arguments as in `rms_norm_fn`; TypeError and ValueError for wrong ones."""
        super().__init__()
        hidden_size = bounded("hidden_size", hidden_size, 2**31 - 1)
        self.eps = real("eps", eps)
        dropout_p = probability("dropout_p", dropout_p)
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.zero_centered_weight = flag("zero_centered_weight", zero_centered_weight)
        check_factory(device, dtype)
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


def _check(x: Any, same_shape: dict[str, Any], per_channel: dict[str, Any], rowscale: Any) -> None:
    """same_shape: like x, or None. per_channel: (hidden_size,), or None, but for the weight."""
    require_floating("x", x)
    if x.ndim == 0:
        raise ValueError("x is a scalar: expected (..., hidden_size)")
    if rowscale is not None and same_shape["x1"] is not None:
        raise ValueError("rowscale is given together with x1: expected one of them at most")
    shapes = dict.fromkeys(same_shape, (x.shape, "the shape of x"))
    shapes |= dict.fromkeys(per_channel, (x.shape[-1:], "the last size of x"))
    shapes["rowscale"] = (x.shape[:-1], "the shape of x without its last size")
    for name, tensor in (same_shape | per_channel | {"rowscale": rowscale}).items():
        if tensor is not None or name == "weight":
            require_floating(name, tensor)
            require_device(name, tensor, x.device, "x")
            require_shape(name, tensor, *shapes[name])


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
