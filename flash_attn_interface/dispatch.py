"""From checked arguments to a running plan: which backend serves a call, and the memory of earlier
answers.

Called by `autograd.py`. `forward` is the hot path: a warm call on a GPU builds one flat key, finds
its plan and runs it. A key seen for the first time goes through `checks.py` (errors), `decide`
(which backend) and the backend's planner. `explain.py` shows the same decisions.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backends
from ._common import checks, env
from ._common.arch import arch_of
from ._common.check_values import window_pair
from ._common.checks import ForwardCall
from ._common.problem import Problem, Target
from .backends import Backend, Plan
from .simulation import capability_of, simulated_arch

ForwardState = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""(out, softmax_lse, s_dmask, rng_state); None where the call does not ask for it."""

_HOPPER_CAPABILITY = (9, 0)
_MAX_PLANS = 4096  # per thread; a plan is a few kB. Ragged batches make a new one per total length
_ADDRESS_BITS = 15  # an address matters up to 16-byte alignment


@dataclass(frozen=True)
class Device:
    """What the choice of a backend may depend on. capability None: a CPU, not simulated."""

    capability: tuple[int, int] | None
    index: int = 0
    simulated: bool = False


@dataclass(frozen=True)
class Decision:
    """Who serves a problem and why. target: None for the reference, which needs no compiling."""

    backend: Backend
    target: Target | None
    reason: str
    refused: tuple[tuple[str, str], ...] = ()  # (backend, its reason), in the order they were asked


def decide(
    problem: Problem, device: Device, installed: Sequence[Backend], forced: str | None = None
) -> Decision:
    """Choose a backend. Pure: the same arguments give the same answer.

    Args:
        installed: kernel trees in order of preference.
        forced: name of the only one allowed, or "reference"; None to choose.

    Raises:
        NotImplementedError: nobody serves it; the message has each one's reason and a way out.
    """
    if forced == "reference" or (device.capability is None and forced is None):
        refusal = backends.REFERENCE.refuses_forward(problem, None)
        if refusal is not None:
            raise NotImplementedError(f"The reference cannot serve this call: {refusal}.")
        cpu = "CPU tensors run PyTorch operations; simulate(arch) runs the kernels on them"
        return Decision(backends.REFERENCE, None, _forced(forced) if forced else cpu)
    if device.capability is None:
        raise NotImplementedError(
            f"{_forced(forced)}, but the tensors are on the CPU: move them to a GPU, or run the "
            "kernels in the simulator with flash_attn_interface.simulate(arch)"
        )
    refused: list[tuple[str, str]] = []
    for backend in installed:
        if forced not in (None, backend.name):
            refused.append((backend.name, _forced(forced)))
            continue
        target = target_for(backend.name, device)
        refusal = _refusal(backend, problem, device, target)
        if refusal is None:
            reason = f"first of the installed kernel trees that serves {target.arch}"
            return Decision(backend, target, _forced(forced) if forced else reason, tuple(refused))
        refused.append((backend.name, refusal))
    if forced is not None and forced not in [backend.name for backend in installed]:
        refused.append((forced, "it is not installed; cd hopper && python setup.py install"))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused)
    raise NotImplementedError(
        f"No kernel serves {problem.describe()}. {reasons}. Way out: "
        f"{env.FORCE_BACKEND.name}=reference computes it with PyTorch operations, slowly."
    )


def _forced(name: str | None) -> str:
    return f"{env.FORCE_BACKEND.name}={name}"


def target_for(backend_name: str, device: Device) -> Target:
    """The architecture a tree compiles for there. NotImplementedError for one we do not know."""
    assert device.capability is not None
    arch = arch_of(device.capability)
    if backend_name == "hopper" and device.capability == _HOPPER_CAPABILITY:
        arch += "a"  # wgmma and setmaxnreg exist only in sm_90a code
    return Target(arch, device.index, device.simulated)


def _refusal(backend: Backend, problem: Problem, device: Device, target: Target) -> str | None:
    if backend.name == "hopper" and device.capability != _HOPPER_CAPABILITY:
        return f"it serves sm_90a, this device is {target.arch}"
    return backend.refuses_forward(problem, target)


def device_of(tensor: Tensor) -> Device:
    """Facts about the device that holds `tensor`, a simulated GPU included."""
    kind = tensor.device.type
    if kind == "cuda":
        if torch.version.hip is not None:
            raise NotImplementedError(
                "AMD GPUs are not supported: the kernels are NVIDIA machine code"
            )
        return Device(torch.cuda.get_device_capability(tensor.device), tensor.get_device())
    if kind == "cpu":
        arch = simulated_arch()
        return Device(capability_of(arch), simulated=True) if arch else Device(None)
    raise NotImplementedError(
        f"q is on {tensor.device}: expected a CUDA device (or the CPU, for the slow reference)"
    )


def installed_backends(device: Device, forced: str | None) -> tuple[Backend, ...]:
    """Kernel trees in order of preference. Looks for the Hopper tree only where it may serve."""
    if device.capability is None:
        return ()
    hopper = None
    if device.capability == _HOPPER_CAPABILITY or forced == "hopper":
        hopper = backends.hopper()
    return (backends.flash2(),) if hopper is None else (hopper, backends.flash2())


def select(problem: Problem, device: Device) -> Decision:
    """`decide` with what is installed and the environment."""
    forced = env.FORCE_BACKEND.get()
    if forced == "reference":
        return decide(problem, device, (), forced)
    return decide(problem, device, installed_backends(device, forced), forced)


def make_plan(problem: Problem, decision: Decision) -> Plan:
    """The plan of the chosen backend, or the one that launches nothing."""
    if decision.target is None:
        return backends.REFERENCE.plan_forward(problem, None)
    if min(problem.total_q, problem.total_k) == 0:
        return backends.EmptyPlan(problem)
    return decision.backend.plan_forward(problem, decision.target)


class _Plans(threading.local):
    """Plans of one thread: they hold a parameter block that is patched in place."""

    def __init__(self) -> None:
        self.by_key: dict[Hashable, Plan] = {}


_plans = _Plans()


def forget_plans() -> None:
    """Plan every call anew, in all threads, say after the environment changed."""
    global _plans
    _plans = _Plans()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    attention_chunk: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    return_lse: bool,
    return_softmax: bool,
) -> ForwardState:
    """Attention forward without autograd. Arguments as in `ForwardCall`; q, k, v are tensors."""
    q_strides, k_strides, v_strides = q.stride(), k.stride(), v.stride()
    if q_strides[-1:] != (1,) or k_strides[-1:] != (1,) or v_strides[-1:] != (1,):
        q, k, v = (checks.last_dim_contiguous(tensor) for tensor in (q, k, v))
        q_strides, k_strides, v_strides = q.stride(), k.stride(), v.stride()
    if type(window_size) is not tuple or window_size != (-1, -1):
        window_size = window_pair(window_size)
    ragged = None
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        max_seqlen_q = checks.host_max_seqlen(max_seqlen_q, q)
        max_seqlen_k = checks.host_max_seqlen(max_seqlen_k, k)
        ragged = (max_seqlen_q, max_seqlen_k, _layout(cu_seqlens_q), _layout(cu_seqlens_k))

    key = plan = None
    if q.is_cuda:
        key = (  # flat, since hashing nested tuples is slower
            q.shape, k.shape, v.shape, q_strides, k_strides, v_strides, q.dtype, k.dtype, v.dtype,
            q.get_device(), k.get_device(), v.get_device(),
            (q.data_ptr() | k.data_ptr() | v.data_ptr()) & _ADDRESS_BITS,
            softmax_scale, causal, window_size, attention_chunk, softcap, dropout_p,
            return_lse, return_softmax, ragged,
            None if seqused_q is None else _layout(seqused_q),
            None if seqused_k is None else _layout(seqused_k),
            None if alibi_slopes is None else _layout(alibi_slopes),
        )  # fmt: skip
        try:
            plan = _plans.by_key.get(key)
        except TypeError:  # an unhashable argument, a list say: the checks will name it
            key = None
    if plan is None:
        call = ForwardCall(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k,
            softmax_scale, causal, window_size, attention_chunk, softcap, alibi_slopes, dropout_p,
            return_lse, return_softmax,
        )  # fmt: skip
        plan = _plan_for(call, key)

    rng_state = None
    if dropout_p > 0.0:  # drawn on the device: CUDA graphs replay it, torch.manual_seed repeats it
        rng_state = torch.randint(0, 2**62, (2,), dtype=torch.int64, device=q.device)
    out, softmax_lse, s_dmask = plan.run(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, alibi_slopes, rng_state
    )
    return out, softmax_lse, s_dmask, rng_state


def _layout(tensor: Any) -> Hashable:
    """All that a check or a plan may depend on; of anything but a tensor, its type."""
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device()


def _plan_for(call: ForwardCall, key: Hashable | None) -> Plan:
    """Check the call, choose a backend, plan, and remember the plan.

    key: None to remember it by problem, as for CPU tensors, whose lengths can be read and so are
    checked in every call.
    """
    problem = checks.check_forward(call)
    if call.q.device.type == "cpu":
        checks.check_lengths(call, problem)
    decision = select(problem, device_of(call.q))
    if key is None:
        key = (problem, decision.target)
    plans = _plans.by_key
    plan = plans.get(key)
    if plan is None:
        plan = make_plan(problem, decision)
        if len(plans) >= _MAX_PLANS:
            plans.clear()
        plans[key] = plan
    return plan
