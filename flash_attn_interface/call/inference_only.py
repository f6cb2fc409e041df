"""Functions without a backward, on tensors that require gradients: the call works, as in
FlashAttention-2 and -3, and only a backward through it is an error. Called by `kvcache.py` and
`paged.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def inference_only(run: Callable[[], Any], why: str, *tensors: Tensor | None) -> Any:
    """run(), whose results depend on the tensors for autograd.

    why: text of the NotImplementedError that a backward raises.
    """
    return _InferenceOnly.apply(run, why, *tensors)  # type: ignore[no-untyped-call]


class _InferenceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[[], Any], why: str, *tensors: Tensor | None) -> Any:
        ctx.why = why
        return run()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError(ctx.why)
