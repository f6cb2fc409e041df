"""Gradients of public functions and what they should be: shared by the tests of autograd, private
operations, torch.compile.

The exact gradients are autograd's of the reference in float64; a kernel's may be three times as far
off as those of the same reference in the inputs' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import oracle
import torch
from torch import Tensor

from flash_attn_interface.reference import attention_reference

Gradients = tuple[Tensor, ...]


def random_like(tensor: Tensor) -> Tensor:
    """The same numbers for the same shape and torch.manual_seed, whatever the strides."""
    return torch.randn(tensor.shape, device=tensor.device).to(tensor.dtype)


def objective(results: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """A number whose gradients with respect to the results are the weights; of finite results."""
    total = torch.zeros((), dtype=torch.float64, device=results[0].device)
    for result, weight in zip(results, weights, strict=True):
        total = total + (result.double() * weight.double()).masked_fill(result.isinf(), 0.0).sum()
    return total


def reference_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    dtype: torch.dtype,
    upcast: bool = True,
    **options: Any,
) -> Gradients:
    """dq, dk, dv by autograd. weights: of out, and of softmax_lse if there are two."""
    q, k, v = (tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in (q, k, v))
    results = attention_reference(q, k, v, **options, upcast=upcast)[: len(weights)]
    return torch.autograd.grad(objective(results, weights), (q, k, v), materialize_grads=True)


def check(
    got: Sequence[Tensor],
    qkv: Sequence[Tensor],
    weights: Sequence[Tensor],
    factor: float = 3.0,
    **options: Any,
) -> None:
    """Asserts the tolerance rule. options: of `attention_reference`."""
    exact = reference_gradients(*qkv, weights, torch.float64, **options)
    rough = reference_gradients(*qkv, weights, qkv[0].dtype, upcast=False, **options)
    for name, mine, want, other in zip(("dq", "dk", "dv"), got, exact, rough, strict=True):
        assert mine.dtype == qkv[0].dtype and mine.shape == want.shape, name
        rounding = oracle._max_abs(want.to(mine.dtype).double() - want)
        bound = factor * max(oracle._max_abs(other.double() - want), rounding) + 1e-5
        oracle._assert_close(name, mine.double(), want, bound)


def results_and_gradients(
    function: Callable[..., Any], inputs: Sequence[Tensor], weigh_lse: bool = False
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Gradients]:
    """(results, weights, gradients of the inputs) of function(*inputs).

    weigh_lse: softmax_lse, the second result, takes part in the objective.
    """
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    results = function(*inputs)
    results = (results,) if isinstance(results, Tensor) else results
    weights = tuple(random_like(result) for result in results[: 2 if weigh_lse else 1])
    found = torch.autograd.grad(objective(results[: len(weights)], weights), inputs)
    return tuple(result.detach() for result in results), weights, found
