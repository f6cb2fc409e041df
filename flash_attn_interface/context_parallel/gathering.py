"""Layout.gather: the undivided tensor from each rank's rows, and its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .merge import wide

if TYPE_CHECKING:
    from .layout import Layout


def gather(layout: Layout, x_local: Tensor, dim: int) -> Tensor:
    if layout.world == 1 and layout.dense:
        return x_local
    gathered: Tensor = _Gather.apply(x_local, layout, dim)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_local: Tensor, layout: Layout, dim: int) -> Tensor:
        ctx.layout, ctx.dim = layout, dim
        front = x_local.movedim(dim, 0)
        most = max(layout.division.tokens(rank) for rank in range(layout.world))
        padded = front.new_zeros((most, *front.shape[1:]))
        padded[: front.shape[0]] = front
        everyone = padded.new_empty((layout.world, *padded.shape))
        if padded.numel():
            as_bytes = list(everyone.view(layout.world, -1).view(torch.uint8).unbind(0))
            dist.all_gather(as_bytes, padded.view(-1).view(torch.uint8), group=layout.group)
        rows = everyone.flatten(0, 1).index_select(0, layout.padded_rows(x_local.device))
        return rows.movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        total = gradient.to(wide(gradient.dtype)).contiguous()
        if total is gradient:
            total = total.clone()
        dist.all_reduce(total, group=ctx.layout.group)
        rows = total.index_select(ctx.dim, ctx.layout.indices(total.device))
        return rows.to(gradient.dtype), None, None
