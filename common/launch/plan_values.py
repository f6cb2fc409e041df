"""What the plans of both trees derive from a Problem in the same way.

Fields of the parameter blocks that mask.cuh, score.cuh, softmax.cuh and dropout.cuh read, and
templates of results.
"""

from __future__ import annotations

from math import e, floor, log2
from typing import Any

import torch
from torch import Tensor

from ..ask.problem import Problem
from .lasting_memory import element

LOG2E = log2(e)
# The kernels' 32-bit index arithmetic holds sequence length + window; see MAX_SEQLEN in the trees'
# backend.py.
MAX_WINDOW = 2**29

TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def score_values(problem: Problem) -> dict[str, Any]:
    """Window, scale, softcap and ALiBi."""
    p = problem
    values: dict[str, Any] = {
        "window_left": min(p.window_left, MAX_WINDOW),
        "window_right": min(p.window_right, MAX_WINDOW),
        "attention_chunk": min(p.attention_chunk, MAX_WINDOW),
        "softmax_scale_log2": p.softmax_scale * LOG2E,
        "alibi_batch_stride": p.alibi_strides[0],
        "alibi_head_stride": p.alibi_strides[1],
    }
    if p.softcap > 0.0:
        values["softcap_in"] = p.softmax_scale / p.softcap
        values["softcap_out"] = p.softcap * LOG2E
    return values


def dropout_values(problem: Problem) -> dict[str, Any]:
    """Of the forward; none without dropout."""
    if not problem.dropout:
        return {}
    keep_probability = 1.0 - problem.dropout_p
    return {
        "keep_threshold": floor(keep_probability * 255.0),
        "keep_scale": 1.0 / keep_probability,
    }


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
