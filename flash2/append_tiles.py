"""Problem -> KernelSpec of append.cu. Pure, and without torch, as every choice of kernels."""

from __future__ import annotations

from .._common.ask.problem import Problem
from .._common.features import dtype, kv
from .._common.runtime.spec import KernelSpec
from .fwd_tiles import ELEM_BYTES

NUM_THREADS = 256


def append_spec(problem: Problem, arch: str, vector_bytes: int) -> KernelSpec:
    """The kernel that copies in pieces of vector_bytes. Sizes are parameters: it only moves rows.

    A row belongs to as many threads as it has vectors, up to a warp.
    """
    row_bytes = max(problem.head_dim_qk, problem.head_dim_v) * ELEM_BYTES
    threads_per_row = 1
    while threads_per_row < 32 and threads_per_row * vector_bytes < row_bytes:
        threads_per_row *= 2
    return KernelSpec.make(
        "flash2/append.cu",
        "flash2_append",
        "AppendParams",
        arch,
        vector_bytes=vector_bytes,
        threads_per_row=threads_per_row,
        num_threads=NUM_THREADS,
        min_ctas_per_sm=1,
        smem_bytes=0,
        **dtype.element(problem.dtype),
        **kv.append_constants(problem),
    )
