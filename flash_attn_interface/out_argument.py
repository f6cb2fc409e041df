"""Results that the caller has allocated. Called by the private operations and raw extension
functions, which have such arguments; kernels write their results into memory of their own."""

from __future__ import annotations

from torch import Tensor


def write_out(name: str, destination: Tensor, result: Tensor) -> Tensor:
    """Copies `result` into the argument `name`, which may have any strides, and returns that."""
    if not isinstance(destination, Tensor):
        raise TypeError(f"{name} is {type(destination).__name__}: expected a torch.Tensor")
    if destination.dtype != result.dtype:
        raise TypeError(f"{name} has dtype {destination.dtype}: expected {result.dtype}")
    if destination.shape != result.shape:
        raise ValueError(
            f"{name} has shape {tuple(destination.shape)}: expected {tuple(result.shape)}"
        )
    if destination.device != result.device:
        raise ValueError(
            f"{name} is on {destination.device} but the inputs are on {result.device}: move it "
            "there"
        )
    return destination.copy_(result)
