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

from flash_attn_interface.reference.forward import attention_reference

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


def worst_of_several(
    dout: Tensor,
    exact: Sequence[Tensor],
    exactly: Callable[[Tensor], Sequence[Tensor]],
    roughly: Callable[[Tensor], Sequence[Tensor]],
) -> tuple[float, ...]:
    """Worst error of each gradient in low precision, over this dout and, if it is small, others.

    The worst of a few hundred elements depends on luck: a low-precision computation that happens to
    round well would set a bound that another one of the same quality misses.
    """
    douts = [dout, *(random_like(dout) for _ in range(5 if dout.numel() < 50_000 else 0))]
    worst = [0.0] * len(exact)
    for index, each in enumerate(douts):
        wanted = exact if index == 0 else exactly(each)
        for i, (want, rough) in enumerate(zip(wanted, roughly(each), strict=True)):
            worst[i] = max(worst[i], oracle._max_abs((rough.double() - want).nan_to_num()))
    return tuple(worst)


def check(
    got: Sequence[Tensor],
    qkv: Sequence[Tensor],
    weights: Sequence[Tensor],
    factor: float = 3.0,
    **options: Any,
) -> None:
    """Asserts the tolerance rule. options: of `attention_reference`."""

    def exactly(dout: Tensor) -> Gradients:
        return reference_gradients(*qkv, (dout, *weights[1:]), torch.float64, **options)

    def roughly(dout: Tensor) -> Gradients:
        pair = (dout, *weights[1:])
        return reference_gradients(*qkv, pair, qkv[0].dtype, upcast=False, **options)

    exact = exactly(weights[0])
    yardstick = worst_of_several(weights[0], exact, exactly, roughly)
    for name, mine, want, rough in zip(("dq", "dk", "dv"), got, exact, yardstick, strict=True):
        assert mine.dtype == qkv[0].dtype and mine.shape == want.shape, name
        rounding = oracle._max_abs(want.to(mine.dtype).double() - want)
        bound = factor * max(rough, rounding) + 1e-5
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
