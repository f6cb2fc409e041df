"""A handful of calls against the reference: does this installation compute attention here?

Run by `python -m flash_attn_interface`. Small on purpose; the test suite is the thorough check.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextvars import copy_context
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..api import fa2, fa3
from ..call.simulation import simulate
from ..reference.forward import attention_reference

# Our error may be at most this multiple of the error of PyTorch operations in the same dtype:
# upstream's rule.
ERROR_RATIO = 2.0
ABSOLUTE_TOLERANCE = 1e-3
LSE_TOLERANCE = 1e-2
_WORKERS = 4  # compilations at once


@dataclass(frozen=True)
class Case:
    """One call. seqlens: query lengths of the sequences, unequal ones being packed (varlen)."""

    name: str
    head_dims: tuple[int, int]
    heads: tuple[int, int, int] = (2, 2, 2)  # of q, k, v
    dtype: torch.dtype = torch.bfloat16
    ragged: bool = False
    extra_keys: int = 0  # seqlen_k - seqlen_q
    alibi: bool = False
    options: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("equal head dims", (64, 64)),
    Case("unequal head dims, causal", (64, 128), options={"causal": True}),
    Case("192 and 128, grouped queries", (192, 128), (4, 2, 2), options={"causal": True}),
    Case("other heads for v, fp16", (32, 64), (4, 1, 2), torch.float16, extra_keys=9),
    Case(
        "odd head dims, window, softcap",
        (40, 59),
        options={"window_size": (17, 5), "softcap": 15.0},
    ),
    Case("ragged batch, causal", (128, 64), ragged=True, extra_keys=5, options={"causal": True}),
    Case("alibi", (64, 64), alibi=True, options={"causal": True}),
    Case("wide head dims", (512, 512), (4, 2, 2), extra_keys=9),
)


@dataclass(frozen=True)
class Result:
    """error: largest difference to the reference; bound: largest allowed."""

    case: Case
    error: float
    bound: float
    seconds: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        return not self.failure and self.error <= self.bound

    def describe(self) -> str:
        """One line."""
        if self.failure:
            return f"FAIL  {self.case.name}: {self.failure}"
        verdict = "ok  " if self.passed else "FAIL"
        figures = f"error {self.error:.1e}, allowed {self.bound:.1e}, {self.seconds:.1f} s"
        return f"{verdict}  {self.case.name}: {figures}"


def run_cases(
    device: torch.device,
    arch: str | None,
    report: Callable[[Result, int, int], None],
    cases: tuple[Case, ...] = CASES,
) -> list[Result]:
    """Run all cases, their kernels compiling side by side.

    Args:
        arch: simulate this architecture on CPU tensors, at toy size; None runs on `device` for
            real.
        report: called with each result as it comes, how many there are so far, and of how many.
    """
    seqlen = 48 if arch else 500
    results: list[Result] = []
    with contextlib.ExitStack() as stack:
        if arch:
            stack.enter_context(simulate(arch))
        pool = stack.enter_context(ThreadPoolExecutor(_WORKERS))
        # Each thread needs a context of its own: simulate() is a context variable.
        futures = [
            pool.submit(copy_context().run, run_case, case, device, seqlen) for case in cases
        ]
        for future in as_completed(futures):
            results.append(future.result())
            report(results[-1], len(results), len(cases))
    return results


def run_case(case: Case, device: torch.device, seqlen: int) -> Result:
    """One case; an exception of the call is a result, too."""
    start = time.perf_counter()
    inputs = _inputs(case, device, seqlen)
    try:
        out, lse = _call(case, inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # the user is to see each case's own
        failure = f"{type(error).__name__}: {error}"
        return Result(case, 0.0, 0.0, time.perf_counter() - start, failure)
    seconds = time.perf_counter() - start

    cu_seqlens = {} if inputs.cu_seqlens_q is None else inputs.ragged_arguments()
    keywords = {**case.options, **cu_seqlens, "alibi_slopes": inputs.alibi_slopes}
    tensors = (inputs.q, inputs.k, inputs.v)
    exact, exact_lse, _ = attention_reference(*(t.float() for t in tensors), **keywords)
    low, _, _ = attention_reference(*tensors, upcast=False, **keywords)
    bound = ERROR_RATIO * _distance(low, exact) + ABSOLUTE_TOLERANCE
    assert exact_lse is not None
    failure = "" if _distance(lse, exact_lse) <= LSE_TOLERANCE else "softmax_lse is wrong"
    return Result(case, _distance(out, exact), bound, seconds, failure)


@dataclass(frozen=True)
class _Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    alibi_slopes: Tensor | None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0

    def ragged_arguments(self) -> dict[str, Any]:
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        return {name: getattr(self, name) for name in names}


def _inputs(case: Case, device: torch.device, seqlen: int) -> _Inputs:
    generator = torch.Generator().manual_seed(0)

    def tokens(rows: tuple[int, ...], heads: int, head_dim: int) -> Tensor:
        values = torch.randn((*rows, heads, head_dim), generator=generator)
        return values.to(device, case.dtype)

    lengths_q = (seqlen, 0, seqlen // 3) if case.ragged else (seqlen, seqlen)
    lengths_k = tuple(length + case.extra_keys for length in lengths_q)
    rows_q: tuple[int, ...] = (sum(lengths_q),) if case.ragged else (len(lengths_q), seqlen)
    rows_k: tuple[int, ...] = (sum(lengths_k),) if case.ragged else (len(lengths_k), lengths_k[0])
    (heads_q, heads_k, heads_v), (dim_qk, dim_v) = case.heads, case.head_dims
    inputs = _Inputs(
        q=tokens(rows_q, heads_q, dim_qk),
        k=tokens(rows_k, heads_k, dim_qk),
        v=tokens(rows_k, heads_v, dim_v),
        alibi_slopes=torch.rand(heads_q, generator=generator).to(device) if case.alibi else None,
    )
    if not case.ragged:
        return inputs
    q, k, v = inputs.q, inputs.k, inputs.v
    ends_q, ends_k = (
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        for lengths in (lengths_q, lengths_k)
    )
    return _Inputs(q, k, v, inputs.alibi_slopes, ends_q, ends_k, max(lengths_q), max(lengths_k))


def _call(case: Case, inputs: _Inputs) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse) through the public fa3."""
    q, k, v = inputs.q, inputs.k, inputs.v
    result: Any
    if case.ragged:
        result = fa3.flash_attn_varlen_func(
            q, k, v, **inputs.ragged_arguments(), **case.options, return_attn_probs=True
        )
    elif case.alibi:
        result = fa2.flash_attn_func(
            q, k, v, alibi_slopes=inputs.alibi_slopes, **case.options, return_attn_probs=True
        )
    else:
        result = fa3.flash_attn_func(q, k, v, **case.options, return_attn_probs=True)
    return result[0], result[1]


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; infinite where only one is infinite, or any is NaN."""
    a, b = a.double(), b.double()
    difference = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(nan=float("inf"))
    return float(difference.max())
