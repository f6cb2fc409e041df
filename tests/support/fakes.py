"""Stand-ins for kernel trees and CUDA tensors: dispatch is tested without GPU and simulator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flash_attn_interface._common.ask.backward_problem import BackwardProblem
from flash_attn_interface._common.ask.call import Backward, Cache, Tensors
from flash_attn_interface._common.ask.problem import Problem, Target
from flash_attn_interface._common.runtime.spec import KernelSpec
from flash_attn_interface.call import backends, watchers


def as_a_kernel_reads(argument: Any) -> Any:
    """The argument, if memory is all that there is to know about it: kernels take addresses."""
    if isinstance(argument, PretendCudaTensor):
        return argument.as_subclass(Tensor)
    if isinstance(argument, Tensor):
        assert not argument.is_neg()
        assert argument.data_ptr() != 0 or argument.numel() == 0, type(argument)
    return argument


@dataclass
class FakePlan:
    """Computes with the reference and counts its runs."""

    problem: Problem
    target: Target
    runs: list[tuple[Any, ...]] = field(default_factory=list)
    grid: int = 7

    @property
    def spec(self) -> KernelSpec:
        constants = {"num_threads": 128, "min_ctas_per_sm": 1, "smem_bytes": 1024}
        constants["head_dim_qk"] = self.problem.head_dim_qk
        names = ("flash2/fwd.cu", "flash2_fwd", "FwdParams", self.target.arch)
        return KernelSpec.make(*names, **constants)

    def run(
        self, tensors: Tensors, cache: Cache | None = None, rng_state: Tensor | None = None
    ) -> backends.ForwardResult:
        self.runs.append(tensors)
        plan: Any = backends.REFERENCE.plan_forward(self.problem, None)
        of_cache = None if cache is None else Cache(*map(as_a_kernel_reads, cache))
        return plan.run(
            Tensors(*map(as_a_kernel_reads, tensors)), of_cache, as_a_kernel_reads(rng_state)
        )

    def describe(self) -> str:
        return f"{self.spec.describe()}\n{self.grid} CTAs"


@dataclass
class FakeBackwardPlan:
    """Likewise."""

    problem: BackwardProblem
    target: Target
    runs: list[tuple[Any, ...]] = field(default_factory=list)

    def run(self, tensors: Tensors, backward: Backward) -> Tensor:
        self.runs.append((tensors, backward))
        plan: Any = backends.REFERENCE.plan_backward(self.problem, None)
        return plan.run(
            Tensors(*map(as_a_kernel_reads, tensors)), Backward(*map(as_a_kernel_reads, backward))
        )

    def describe(self) -> str:
        return "three kernels"


@dataclass
class FakeBackend:
    """A kernel tree that remembers what it planned; refusal: its reason to refuse everything."""

    name: str = "flash2"
    refusal: str | None = None
    extra: str = ""  # the only feature of this name that it has
    release: str = "0"
    plans: list[FakePlan] = field(default_factory=list)
    backward_plans: list[FakeBackwardPlan] = field(default_factory=list)
    cache_plans: list[FakePlan] = field(default_factory=list)

    def refuses_forward(self, problem: Problem, target: Target) -> str | None:
        return self.refusal or self._misses(problem)

    def plan_forward(self, problem: Problem, target: Target) -> FakePlan:
        made = self.plans if problem.append is None else self.cache_plans
        made.append(FakePlan(problem, target))
        return made[-1]

    def _misses(self, problem: Problem) -> str | None:
        return None if problem.extra == self.extra else f"it does not serve {problem.extra}"

    def refuses_backward(self, problem: BackwardProblem, target: Target) -> str | None:
        return self.refusal or self._misses(problem.forward)

    def plan_backward(self, problem: BackwardProblem, target: Target) -> FakeBackwardPlan:
        self.backward_plans.append(FakeBackwardPlan(problem, target))
        return self.backward_plans[-1]


class PretendCudaTensor(Tensor):
    """A CPU tensor that says it is on cuda:0."""

    is_cuda = True
    device = torch.device("cuda", 0)

    def get_device(self) -> int:
        return 0


watchers.PLAIN_TYPES.add(PretendCudaTensor)  # so that it takes the direct way


def pretend_cuda(*tensors: Tensor) -> list[PretendCudaTensor]:
    return [tensor.as_subclass(PretendCudaTensor) for tensor in tensors]


def qkv(
    *, batch: int = 2, seqlen_q: int = 5, seqlen_k: int = 7, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense q, k, v with heads 4/2/1 and head dims 16/24."""
    return (
        torch.randn(batch, seqlen_q, 4, 16, dtype=dtype),
        torch.randn(batch, seqlen_k, 2, 16, dtype=dtype),
        torch.randn(batch, seqlen_k, 1, 24, dtype=dtype),
    )


def ragged_qkv() -> dict[str, Any]:
    """Arguments of the varlen functions: two sequences of 3 and 4 queries, 5 and 2 keys."""
    return {
        "q": torch.randn(7, 4, 16, dtype=torch.bfloat16),
        "k": torch.randn(7, 2, 16, dtype=torch.bfloat16),
        "v": torch.randn(7, 1, 24, dtype=torch.bfloat16),
        "cu_seqlens_q": torch.tensor([0, 3, 7], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 5, 7], dtype=torch.int32),
        "max_seqlen_q": 4,
        "max_seqlen_k": 5,
    }
