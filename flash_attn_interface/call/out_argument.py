"""Results that the caller has allocated. Called by the private operations, the raw extension
functions and the norms, which have such arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from .._common.ask.check_overlap import check_output
from .._common.ask.check_tensors import require_device, require_tensor


def check_out(
    name: str,
    destination: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    of: str,
) -> None:
    """That a result of this kind can be written into the argument `name`, which may have any
    strides. To be called before anything is computed. of: the argument that decides what kind."""
    if destination is None:
        return
    require_tensor(name, destination)
    if destination.dtype != dtype:
        raise TypeError(f"{name} has dtype {destination.dtype}: expected {dtype}, by {of}")
    if destination.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(destination.shape)}: expected {tuple(shape)}, by {of}"
        )
    require_device(name, destination, device, of)
    check_output(name, destination)
    if destination.requires_grad and destination.is_leaf and torch.is_grad_enabled():
        raise ValueError(
            f"{name} is a leaf that requires a gradient: it is written, pass .detach()"
        )


def check_attention_out(name: str, destination: Tensor | None, q: Tensor, v: Tensor) -> None:
    """Likewise, of the result of attention: q and v are tensors of at least one dim."""
    if destination is not None:
        check_out(name, destination, (*q.shape[:-1], v.shape[-1]), q.dtype, q.device, "q and v")
