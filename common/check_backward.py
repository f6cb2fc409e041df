"""User errors of the private backward operations, whose callers bring every tensor themselves.

Called by `flash_attn_interface/dispatch.py` once per new combination, like `checks.py`, which has
checked q, k, v and the options by then.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .problem import Problem


class BackwardTensors(NamedTuple):
    """Tensors of a backward besides those of its forward."""

    dout: Tensor
    out: Tensor
    softmax_lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    rng_state: Tensor | None
    dlse: Tensor | None


def check_backward(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, tensors: BackwardTensors
) -> None:
    """That the tensors fit the problem of q, k and v."""
    out_shape = (*q.shape[:-1], problem.head_dim_v)
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "dout": (out_shape, q.dtype),
        "out": (out_shape, q.dtype),
        "softmax_lse": (problem.lse_shape, torch.float32),
        "dlse": (problem.lse_shape, torch.float32),
        "dq": (tuple(q.shape), q.dtype),
        "dk": (tuple(k.shape), q.dtype),
        "dv": (tuple(v.shape), q.dtype),
        "rng_state": ((2,), torch.int64),
    }
    if problem.dropout and tensors.rng_state is None:
        raise ValueError("rng_state is None: with dropout pass the one that the forward returned")
    for name, (shape, dtype) in expected.items():
        tensor = getattr(tensors, name)
        if tensor is not None:
            _check(name, tensor, shape, dtype, q.device)


def _check(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}: expected a torch.Tensor")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}: expected {dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected {shape}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} but q is on {device}: move it there")
