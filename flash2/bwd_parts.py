"""Backward for a V whose columns are too many for `bwd.cu`: in parts, whose dQ and dK are added up.

dS = P * (dO V^T - D) is linear in the columns of V, and so is D = rowsum(dO * O) - dlse: each part
of them gives its own dV and what it contributes to dQ and dK. With n parts of head dims (qk, v)
that takes 3 n qk + 2 v products of a column instead of 3 qk + 2 v, at (512, 512) in two parts 1.6
times as many, and for all but one part memory of the size of dQ and dK. Called by `backend.py`;
the parts: `part_tiles.py`.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd

import torch
from torch import Tensor

from .._common.ask.backward_problem import BackwardProblem
from .._common.ask.call import Backward, Tensors
from .._common.ask.checks import strides_of
from .._common.ask.problem import Target
from . import part_tiles
from .bwd import BackwardPlan
from .fwd_tiles import ELEM_BYTES


class BackwardPartsPlan:
    """One problem on one target, as `BackwardPlan`: a plan for each part of V's columns."""

    def __init__(self, problem: BackwardProblem, target: Target) -> None:
        self.problem = problem
        self.target = target
        self.parts = part_tiles.backward_parts(problem.forward, target.arch)
        problems = [part_tiles.part_backward(problem, *part) for part in self.parts]
        self._first = BackwardPlan(problems[0], target)
        self._other_problems = problems[1:]
        self._others: list[BackwardPlan] = []  # made by the first run, which knows q and k

    def run(self, tensors: Tensors, backward: Backward) -> Tensor:
        """As `BackwardPlan.run`."""
        dout, out, softmax_lse, dq, dk, dv, rng_state, dlse = backward
        more_dq = torch.empty_like(dq, memory_format=torch.contiguous_format)
        more_dk = torch.empty_like(dk, memory_format=torch.contiguous_format)
        if not self._others:
            self._others = [self._plan(part, more_dq, more_dk) for part in self._other_problems]
        softmax_d = None
        for plan, (first, columns) in zip((self._first, *self._others), self.parts, strict=True):
            part = slice(first, first + columns)
            gradients = (dq, dk) if softmax_d is None else (more_dq, more_dk)
            of_part = Backward(
                dout[..., part], out[..., part], softmax_lse, *gradients, dv[..., part], rng_state,
                dlse if softmax_d is None else None,
            )  # fmt: skip
            d = plan.run(tensors._replace(v=tensors.v[..., part]), of_part)
            if softmax_d is None:
                softmax_d = d
            else:
                softmax_d += d
                dq += more_dq
                dk += more_dk
        assert softmax_d is not None
        return softmax_d

    def _plan(self, problem: BackwardProblem, more_dq: Tensor, more_dk: Tensor) -> BackwardPlan:
        """Of a part that is not the first: into contiguous gradients of q and k."""
        p = problem.forward
        row_bytes = p.head_dim_qk * ELEM_BYTES
        contiguous = replace(
            problem,
            dq_strides=strides_of(more_dq, p.varlen_q),
            dk_strides=strides_of(more_dk, p.varlen_k),
            grad_vector_bytes=gcd(problem.grad_vector_bytes, row_bytes),
        )
        return BackwardPlan(contiguous, self.target)

    def describe(self) -> str:
        """Several lines for people: the kernels of each part in order."""
        problems = [part_tiles.part_backward(self.problem, *part) for part in self.parts]
        return "\n".join(BackwardPlan(problem, self.target).describe() for problem in problems)
