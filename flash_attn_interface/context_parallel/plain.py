"""What context_parallel takes: plain tensors that only autograd watches. Kernels and NCCL read
memory, and the transfers of a call are no part of a graph or a transform.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from .._common.ask.check_tensors import require_tensor
from ..call.watchers import PLAIN_TYPES, traced_or_transformed


def refuse_watchers(function: str, *tensors: Any) -> None:
    """NotImplementedError for who would see a part of a call only, the same on every rank.

    It is raised without agreement: under these a rank cannot even read what the others say.
    """
    watcher = traced_or_transformed(*tensors)
    if watcher is not None:
        raise NotImplementedError(
            f"{function} under {watcher}: it transfers tensors between ranks, which can be neither "
            "traced nor transformed. Use torch.autograd, or torch.compile, which breaks the graph"
        )


def require_plain(name: str, value: Any) -> None:
    """A dense tensor of no subclass, but what a collective returns, for which PyTorch waits."""
    known = (*PLAIN_TYPES, AsyncCollectiveTensor)
    if isinstance(value, Tensor) and type(value) not in known:
        raise TypeError(
            f"{name} is a {type(value).__name__}: expected a plain tensor, this rank's own; a "
            "DTensor has it as to_local()"
        )
    require_tensor(name, value)


def in_memory(tensor: Tensor) -> Tensor:
    """The values of a gradient as a plain tensor: collectives are waited for, negations done."""
    if tensor._is_zerotensor():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    if isinstance(tensor, AsyncCollectiveTensor):
        tensor = tensor.wait()
    return tensor.resolve_neg()
