"""Runs the autotuner's candidates: is the result right, and how long does it take?

A Case holds the tensors of one problem and knows how a direction's plans are run. The clock is an
argument, so that the tests replace it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from math import gcd
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._common.ask.call import Backward, Tensors
from .._common.ask.problem import Problem, Strides, Target
from .._common.tiles.tuning import Tunable
from ..call import backends
from ..reference.forward import attention_reference

# Our error may be at most this multiple of the error of PyTorch operations in the same dtype:
# upstream's rule for results and for gradients.
OUT_ERROR_RATIO, GRADIENT_ERROR_RATIO = 2.0, 3.0
ABSOLUTE_TOLERANCE = 1e-5
LSE_TOLERANCE = 1e-2
SLEEP_CYCLES_PER_CALL = 150_000  # about 80 us: longer than the host needs to issue one call
BURST_US = 6000.0

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FEATURES = ("local", "softcap", "alibi", "dropout")

Run = Callable[[], tuple[Tensor, ...]]
Clock = Callable[[Run, int], list[float]]
"""(run, calls) -> microseconds of each of so many calls in a row."""
K = TypeVar("K", bound=Hashable)


def make_problem(
    dtype: str,
    dims: tuple[int, int],
    causal: bool,
    *,
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    heads_kv: int = 0,
    features: Sequence[str] = (),
    window: int = 1024,
) -> Problem:
    """A forward of contiguous tensors. heads_kv 0: as many as of q. features: of FEATURES."""

    def strides(rows: int, heads: int, head_dim: int) -> Strides:
        return (rows * heads * head_dim, heads * head_dim, head_dim)

    qk, v = dims
    heads_kv = heads_kv or heads
    local = "local" in features
    return Problem(
        dtype=dtype,
        head_dim_qk=qk,
        head_dim_v=v,
        num_heads_q=heads,
        num_heads_k=heads_kv,
        num_heads_v=heads_kv,
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        total_q=batch * seqlen_q,
        total_k=batch * seqlen_k,
        softmax_scale=qk**-0.5,
        causal=causal and not local,
        window_left=window if local else -1,
        window_right=0 if causal or local else -1,
        softcap=30.0 if "softcap" in features else 0.0,
        alibi="alibi" in features,
        dropout_p=0.1 if "dropout" in features else 0.0,
        return_lse=False,
        q_strides=strides(seqlen_q, heads, qk),
        k_strides=strides(seqlen_k, heads_kv, qk),
        v_strides=strides(seqlen_k, heads_kv, v),
        vector_bytes=gcd(16, 2 * qk, 2 * v),
    )


class Case:
    """Random tensors of a problem on a target, and what plans of a direction are run with."""

    def __init__(self, tunable: Tunable, problem: Problem, target: Target) -> None:
        self.tunable = tunable
        self.problem = replace(problem, return_lse=True) if tunable.direction == "bwd" else problem
        self.target = target
        device = torch.device("cpu" if target.simulated else f"cuda:{target.device_index}")
        generator = torch.Generator(device).manual_seed(1)
        dtype = DTYPES[problem.dtype]

        def normal(rows: int, heads: int, head_dim: int) -> Tensor:
            shape = (problem.batch, rows, heads, head_dim)
            values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
            return values.to(dtype)

        p = problem
        self.q = normal(p.seqlen_q, p.num_heads_q, p.head_dim_qk)
        self.k = normal(p.seqlen_k, p.num_heads_k, p.head_dim_qk)
        self.v = normal(p.seqlen_k, p.num_heads_v, p.head_dim_v)
        self.dout = normal(p.seqlen_q, p.num_heads_q, p.head_dim_v)
        slopes = torch.rand(p.num_heads_q, generator=generator, device=device)
        self.alibi_slopes = slopes if p.alibi else None
        rng_state = torch.tensor([17, 4], dtype=torch.int64, device=device)
        self.rng_state = rng_state if p.dropout else None
        self.forward_results: tuple[Tensor, Tensor] | None = None  # what a backward starts from
        self._gradients: tuple[Tensor, ...] = ()

    def run(self, plan: Any) -> Run:
        """What one call of the plan is. Returns out, softmax_lse if asked for; or dq, dk, dv."""
        tensors = Tensors(self.q, self.k, self.v, alibi_slopes=self.alibi_slopes)
        if self.tunable.direction == "fwd":

            def forward() -> tuple[Tensor, ...]:
                out, lse, _ = plan.run(tensors, None, self.rng_state)
                return (out,) if lse is None else (out, lse)

            return forward
        if self.tunable.direction == "decode":

            def decode() -> tuple[Tensor, ...]:
                out, lse = plan.run(tensors)
                return (out,) if lse is None else (out, lse)

            return decode
        if self.forward_results is None:
            self.forward_results = self._forward()
        if not self._gradients:
            self._gradients = tuple(torch.empty_like(t) for t in (self.q, self.k, self.v))
        out, lse = self.forward_results
        dq, dk, dv = self._gradients
        asked = Backward(self.dout, out, lse, dq, dk, dv, self.rng_state)

        def backward() -> tuple[Tensor, ...]:
            plan.run(tensors, asked)
            return self._gradients

        return backward

    def poison(self) -> None:
        """Fills what a run will write with NaN: gradients, and the memory that out will get."""
        for gradient in self._gradients:
            gradient.fill_(float("nan"))
        torch.full_like(self.dout, float("nan"))  # freed at once: the allocator hands it out next

    def _forward(self) -> tuple[Tensor, Tensor]:
        """(out, softmax_lse) of the flash2 tree, which serves every GPU."""
        arch = self.target.arch.rstrip("a")
        backend = backends.flash2()
        plan = backend.plan_forward(self.problem, replace(self.target, arch=arch))
        tensors = Tensors(self.q, self.k, self.v, alibi_slopes=self.alibi_slopes)
        out, lse, _ = plan.run(tensors, None, self.rng_state)
        assert lse is not None
        return out, lse


class Checker:
    """Compares a direction's results with the reference, whose own are computed once."""

    def __init__(self, tunable: Tunable, problem: Problem, target: Target) -> None:
        self.case = Case(tunable, replace(problem, return_lse=True), target)
        exact, out, self._lse = self._reference(upcast=True)
        low, _, _ = self._reference(upcast=False)
        self.case.forward_results = (out.to(self.case.q.dtype).contiguous(), self._lse)
        backward = tunable.direction == "bwd"
        names = ("dq", "dk", "dv") if backward else ("out",)
        ratio = GRADIENT_ERROR_RATIO if backward else OUT_ERROR_RATIO
        self._expected = [
            (name, want, ratio * _distance(rough, want) + ABSOLUTE_TOLERANCE)
            for name, want, rough in zip(names, exact, low, strict=True)
        ]

    def refuses(self, plan: Any) -> str | None:
        """What is wrong with a plan's results; None if nothing is."""
        run = self.case.run(plan)
        self.case.poison()
        results = run()
        for (name, want, bound), got in zip(self._expected, results, strict=False):
            error = _distance(got, want)
            if not error <= bound:
                return f"{name} is wrong: error {error:.2e}, allowed {bound:.2e}"
        if len(results) == 2 and not _distance(results[1], self._lse) <= LSE_TOLERANCE:
            return "softmax_lse is wrong"
        return None

    def _reference(self, upcast: bool) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        """(results, out, softmax_lse) of PyTorch operations, in float32 or in the own dtype."""
        case, p = self.case, self.case.problem
        inputs = [case.q, case.k, case.v]
        if upcast:
            inputs = [tensor.float() for tensor in inputs]
        backward = case.tunable.direction == "bwd"
        leaves = [tensor.detach().requires_grad_(backward) for tensor in inputs]
        with torch.enable_grad():
            out, lse, _ = attention_reference(
                *leaves,
                softmax_scale=p.softmax_scale,
                causal=p.causal,
                window_size=(p.window_left, p.window_right),
                softcap=p.softcap,
                alibi_slopes=case.alibi_slopes,
                dropout_p=p.dropout_p,
                rng_state=case.rng_state,
                upcast=upcast,
            )
            assert lse is not None
            if not backward:
                return (out,), out, lse
            gradients = torch.autograd.grad(out, leaves, case.dout.to(out.dtype))
        return gradients, out.detach(), lse.detach()


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; infinite where only one is infinite, or any is NaN."""
    a, b = a.double(), b.double()
    difference = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(nan=float("inf"))
    return float(difference.max())


def cuda_clock(run: Run, calls: int) -> list[float]:
    """A spin kernel first keeps the GPU busy while the host issues the calls, so that the events
    bracket GPU work alone, also for kernels that are shorter than their launch.
    """
    event: Any = torch.cuda.Event
    starts, ends = ([event(enable_timing=True) for _ in range(calls)] for _ in "se")
    spin: Any = torch.cuda._sleep
    spin(SLEEP_CYCLES_PER_CALL * (calls + 1))
    for start, end in zip(starts, ends, strict=True):
        start.record()
        run()
        end.record()
    ends[-1].synchronize()
    return [s.elapsed_time(e) * 1e3 for s, e in zip(starts, ends, strict=True)]


def interleaved(runs: Mapping[K, Run], rounds: int, clock: Clock) -> dict[K, list[float]]:
    """Microseconds of every timed call, in rounds that each start with another contestant.

    Interleaving gives all of them the same share of the GPU's clock and power states.
    """
    names = list(runs)
    samples: dict[K, list[float]] = {name: [] for name in names}
    calls = {}
    for name in names:
        runs[name]()  # loads the kernel
        once = statistics.median(clock(runs[name], 2))
        calls[name] = max(1, min(10, round(BURST_US / max(once, 1.0))))
    for turn in range(rounds):
        shift = turn % len(names)
        for name in [*names[shift:], *names[:shift]]:
            samples[name] += clock(runs[name], calls[name])
    return samples
