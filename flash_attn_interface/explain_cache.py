"""explain_with_kvcache(...): the way a call of flash_attn_with_kvcache would take, without running
it. `explain.py` does the same for the plain forward."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ._common.cache_problem import CacheProblem
from ._common.check_cache import CacheCall, check_cache, check_cache_tensors, check_dense
from .explain import TensorOrShape, _decision_lines, _device, _stand_in
from .kvcache_dispatch import make_cache_plan
from .selection import Decision, Device, select_cache

_FLOATING = ("q", "k_cache", "v_cache", "k", "v", "qv", "rotary_cos", "rotary_sin")
_FLOAT32 = ("alibi_slopes",)
_VALUES = ("softmax_scale", "causal", "window_size", "attention_chunk", "softcap")


@dataclass(frozen=True)
class CacheExplanation:
    """What `explain_with_kvcache` found; print it. If nobody serves the call, error says why."""

    problem: CacheProblem
    device: Device
    decision: Decision | None
    plan: str  # the kernels in their order, in the plan's own words
    error: str = ""

    @property
    def backend(self) -> str | None:
        """Name of the backend chosen: "flash2", "reference"; None if all refuse."""
        return self.decision.backend.name if self.decision else None

    def __str__(self) -> str:
        hops = (
            ("1 problem", [self.problem.describe()]),
            ("2 backend", _decision_lines(self.decision, self.error)),
            ("3 plan", self.plan.splitlines() or ["-"]),
        )
        lines = []
        for title, texts in hops:
            for text in texts:
                lines.append(f"{title:<11}{text}".rstrip())
                title = ""
        return "\n".join(lines)


def explain_with_kvcache(
    q: TensorOrShape,
    k_cache: TensorOrShape,
    v_cache: TensorOrShape,
    *,
    dtype: torch.dtype = torch.bfloat16,
    arch: str | None = None,
    **arguments: Any,
) -> CacheExplanation:
    """Which kernels a call would launch, with which splits, and why. Nothing is compiled or run.

        print(explain_with_kvcache((16, 1, 32, 128), (16, 8192, 8, 128), (16, 8192, 8, 128),
        cache_seqlens=(16,), causal=True, arch="sm_80"))

    Args:
        q, k_cache, v_cache: tensors on any device, or just their shapes.
        dtype: of what is given as a shape.
        arch: the architecture to explain for; None means the device of q. The number of splits is
            that of the current GPU, or without one that of the simulator.
        arguments: those of `flash_attn_with_kvcache`, tensors or shapes, and alibi_slopes.

    Returns:
        A CacheExplanation: print it, or read problem, backend, decision, plan.

    Raises:
        TypeError, ValueError, NotImplementedError: the errors of arguments, as in the call itself.
            That no backend serves the call is not raised: the explanation says so.
    """
    given = {"q": q, "k_cache": k_cache, "v_cache": v_cache, **arguments}
    for name in ("scheduler_metadata", "pack_gqa"):
        given.pop(name, None)
    given["return_lse"] = given.pop("return_softmax_lse", False)
    fields: dict[str, Any] = {}
    for name, value in given.items():
        floating = torch.float32 if name in _FLOAT32 else dtype
        kind = floating if name in _FLOATING + _FLOAT32 else torch.int32
        fields[name] = value if name in _VALUES else _stand_in(value, kind)
    if any(isinstance(value, Tensor) and value.is_meta for value in fields.values()):
        fields = {
            name: value.to("meta") if isinstance(value, Tensor) and name not in _VALUES else value
            for name, value in fields.items()
        }
    call = CacheCall(**fields)
    check_cache_tensors(call.q, call.k_cache, call.v_cache)
    check_dense(call)
    problem = check_cache(call)
    device = _device(call.q, arch)
    if arch is not None and not torch.cuda.is_available():  # the splits depend on the SMs
        device = replace(device, simulated=True)
    try:
        decision = select_cache(problem, device)
        plan = make_cache_plan(problem, decision)
    except NotImplementedError as error:
        return CacheExplanation(problem, device, None, "", str(error))
    return CacheExplanation(problem, device, decision, plan.describe())
