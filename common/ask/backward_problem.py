"""BackwardProblem: what one backward asks, without its data. The forward's is in `problem.py`.

Built by `flash_attn_interface/call/dispatch.py` from checked arguments, read by the backends
(`flash2/bwd_tiles.py` turns it into KernelSpecs).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

from .problem import Problem, Strides

if TYPE_CHECKING:  # planning a build needs no torch
    from torch import Tensor

    from .call import Backward, Call

MAX_VECTOR_BYTES = 16


@dataclass(frozen=True)
class BackwardProblem:
    """One backward call: the forward's problem, and how the tensors that only the backward has lie
    in memory. `of` makes one from tensors.

    Strides are (batch, row, head) in elements, batch 0 when packed; the last dim is contiguous.
    Vector widths are the largest of 16, 8, 4, 2 bytes that divide every pointer, stride and row of
    the tensors named.
    """

    forward: Problem
    out_strides: Strides
    dout_strides: Strides
    dq_strides: Strides
    dk_strides: Strides
    dv_strides: Strides
    vector_bytes: int = 16  # of q, k, v and dout
    out_vector_bytes: int = 16  # of out and dout
    grad_vector_bytes: int = 16  # of dq, dk and dv
    deterministic: bool = False  # dq is bitwise reproducible too, as dk and dv always are

    @classmethod
    def of(
        cls, forward: Problem, call: Call, tensors: Backward, deterministic: bool = False
    ) -> BackwardProblem:
        """The problem of these tensors. forward: that of the call, which made tensors.out."""
        q, k, v = call.tensors[:3]
        dout, out, _, dq, dk, dv = tensors[:6]
        return cls(
            forward,
            out_strides=_strides(out),
            dout_strides=_strides(dout),
            dq_strides=_strides(dq),
            dk_strides=_strides(dk),
            dv_strides=_strides(dv),
            vector_bytes=min(forward.vector_bytes, _vector_bytes(q, k, v, dout)),
            out_vector_bytes=_vector_bytes(out, dout),
            grad_vector_bytes=_vector_bytes(dq, dk, dv),
            deterministic=deterministic,
        )

    def describe(self) -> str:
        """One line for people."""
        mode = ", deterministic" if self.deterministic else ""
        return f"the backward of {self.forward.describe()}{mode}"


def _strides(tensor: Tensor) -> Strides:
    """Axes of one element count as 0, so that equal problems compare equal."""
    strides = [
        step if size > 1 else 0
        for size, step in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    ]
    batch, row, head = strides if tensor.dim() == 4 else (0, *strides)
    return batch, row, head


def _vector_bytes(*tensors: Tensor) -> int:
    common = MAX_VECTOR_BYTES
    for tensor in tensors:
        elements = (*_strides(tensor), tensor.shape[-1])
        common = gcd(common, tensor.data_ptr(), *(n * tensor.element_size() for n in elements))
    return common
