"""Templates of the results, which the plans of both trees derive from a Problem in the same way.

Values of parameters: common/features/.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ask.problem import Problem
from .lasting_memory import element

TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def out_template(problem: Problem, device: torch.device) -> tuple[Tensor, tuple[int, ...] | None]:
    """Of out, its axes ordered as in memory (`out_layout.py`), and how to permute what is made from
    it; None if they are in order."""
    order = problem.out_order
    sizes = (*(problem.out_shape[axis] for axis in order), problem.head_dim_v)
    like = template(sizes, TORCH_DTYPES[problem.dtype], device)
    if order == tuple(sorted(order)):
        return like, None
    return like, (*(order.index(axis) for axis in range(len(order))), len(order))


def template(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """For torch.empty_like at every run: of an expanded element, it is the cheapest allocation that
    torch offers."""
    return element(dtype, device).expand(shape)
