"""Rotation by complex multiplication, the oracle of the rotary tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

F64 = torch.float64

# Against float64: one rounding to the result's dtype, after float32 maths.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}


def tables(
    rows: int, columns: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of random angles: no formula for frequencies can hide a wrong row."""
    angle = torch.rand(rows, columns, dtype=F64, device=device) * 2 * math.pi
    return angle.cos().to(dtype), angle.sin().to(dtype)


def by_complex(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x rotated in float64; cos and sin: a row per token, x: (tokens..., num_heads, head_dim)."""
    rotary_dim = 2 * cos.shape[-1]
    turned, rest = x.to(F64).split((rotary_dim, x.shape[-1] - rotary_dim), -1)
    pairs = turned.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    dim = -1 if interleaved else -2
    numbers = (
        torch.complex(*pairs.unbind(dim)) * torch.complex(cos.to(F64), sin.to(F64))[..., None, :]
    )
    turned = torch.stack((numbers.real, numbers.imag), dim).flatten(-2)
    return torch.cat((turned, rest), -1)


def close(actual: Tensor, expected: Tensor, tolerance: float = 0.0) -> None:
    tolerance = tolerance or TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.to(F64), expected.to(F64), rtol=tolerance, atol=tolerance)
