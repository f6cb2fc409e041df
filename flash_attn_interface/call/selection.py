"""Which backend serves a problem, and why. `decide` and its kin are pure; `select` and its kin ask
them with what is installed here and the environment.

Called by `dispatch.py` once per new kind of call, and by `explain.py`, which shows the same
decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .._common import env, log
from .._common.ask.backward_problem import BackwardProblem
from .._common.ask.problem import Problem, Target
from .._common.runtime.arch import arch_of
from . import backends
from .backends import Backend
from .simulation import capability_of, simulated_arch

_HOPPER_CAPABILITY = (9, 0)


@dataclass(frozen=True)
class Device:
    """What the choice of a backend may depend on. capability None: a CPU, not simulated."""

    capability: tuple[int, int] | None
    index: int = 0
    simulated: bool = False
    gpu: str = ""  # model, as the driver names it; "" if simulated or unknown


@dataclass(frozen=True)
class Decision:
    """Who serves a problem and why. target: None for the reference, which needs no compiling."""

    backend: Backend
    target: Target | None
    reason: str
    refused: tuple[tuple[str, str], ...] = ()  # (backend, its reason), in the order they were asked


def decide(
    problem: Problem, device: Device, installed: Iterable[Backend], forced: str | None = None
) -> Decision:
    """Choose the backend of a forward. Pure: the same arguments give the same answer.

    Args:
        installed: kernel trees in order of preference.
        forced: name of the only one allowed, or "reference"; None to choose.

    Raises:
        NotImplementedError: no backend serves it; the message has each one's reason and a way out.
    """
    return _decide(
        problem.describe(),
        lambda backend, target: backend.refuses_forward(problem, target),
        lambda: backends.REFERENCE.refuses_forward(problem, None),
        device,
        installed,
        forced,
        served_by_hopper=problem.append is None,
    )


def decide_backward(
    problem: BackwardProblem,
    device: Device,
    installed: Iterable[Backend],
    forced: str | None = None,
) -> Decision:
    """Choose the backend of a backward, whoever served its forward. Else as `decide`."""
    return _decide(
        problem.describe(),
        lambda backend, target: backend.refuses_backward(problem, target),
        lambda: backends.REFERENCE.refuses_backward(problem, None),
        device,
        installed,
        forced,
    )


def _decide(
    asked: str,
    refuses: Callable[[Backend, Target], str | None],
    reference_refuses: Callable[[], str | None],
    device: Device,
    installed: Iterable[Backend],
    forced: str | None,
    served_by_hopper: bool = True,
) -> Decision:
    if forced == "reference" or (device.capability is None and forced is None):
        refusal = reference_refuses()
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
        if backend.name == "hopper" and device.capability != _HOPPER_CAPABILITY:
            refusal = f"it serves sm_90a, this device is {target.arch}"
        else:
            refusal = refuses(backend, target)
        if refusal is None:
            advice = hopper_advice(device.capability, (backend.name, *dict(refused)))
            if advice is not None and forced is None and served_by_hopper:
                refused.append(("hopper", advice))
            reason = f"first of the installed kernel trees that serves {target.arch}"
            return Decision(backend, target, _forced(forced) if forced else reason, tuple(refused))
        refused.append((backend.name, refusal))
    if forced is not None and forced not in dict(refused):
        refused.append((forced, backends.HOPPER_NOT_INSTALLED))
    elif served_by_hopper and hopper_advice(device.capability, dict(refused)) is not None:
        refused.append(("hopper", backends.HOPPER_NOT_INSTALLED))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused)
    stop = "" if reasons.endswith(" .") else "."  # "pip install ." has one of its own
    raise NotImplementedError(
        f"No kernel serves {asked}. {reasons}{stop} Way out: "
        f"{env.FORCE_BACKEND.name}=reference computes it with PyTorch operations, slowly."
    )


def hopper_advice(capability: tuple[int, int] | None, asked: Iterable[str]) -> str | None:
    """What to tell whoever has a Hopper GPU, but none of its kernels; else None.

    asked: the kernel trees that are installed, or those that a call asked.
    """
    missing = capability == _HOPPER_CAPABILITY and "hopper" not in asked
    return backends.HOPPER_NOT_INSTALLED if missing else None


def _logged(asked: str, decision: Decision) -> Decision:
    others = "".join(f"; not {name}: {reason}" for name, reason in decision.refused)
    log.info("%s serves %s: %s%s", decision.backend.name, asked, decision.reason, others)
    return decision


def _forced(name: str | None) -> str:
    return f"{env.FORCE_BACKEND.name}={name}"


def target_for(backend_name: str, device: Device) -> Target:
    """The architecture a tree compiles for there. NotImplementedError for one we do not know."""
    assert device.capability is not None
    arch = arch_of(device.capability)
    if backend_name == "hopper" and device.capability == _HOPPER_CAPABILITY:
        arch += "a"  # wgmma and setmaxnreg exist only in sm_90a code
    return Target(arch, device.index, device.simulated, device.gpu)


def device_of(tensor: Tensor) -> Device:
    """Facts about the device that holds `tensor`, a simulated GPU included."""
    kind = tensor.device.type
    if kind == "cuda":
        if torch.version.hip is not None:
            raise NotImplementedError(
                "AMD GPUs are not supported: the kernels are NVIDIA machine code"
            )
        test_arch = env.TEST_ARCH.get()
        if test_arch is not None:
            return Device(capability_of(test_arch), tensor.get_device())
        capability = torch.cuda.get_device_capability(tensor.device)
        name = torch.cuda.get_device_name(tensor.device)
        return Device(capability, tensor.get_device(), gpu=name)
    if kind == "cpu":
        arch = simulated_arch()
        return Device(capability_of(arch), simulated=True) if arch else Device(None)
    raise NotImplementedError(
        f"q is on {tensor.device}: expected a CUDA device (or the CPU, for the slow reference)"
    )


def installed_backends(device: Device, forced: str | None) -> tuple[Backend, ...]:
    """Kernel trees in order of preference. Looks for the Hopper tree only where it may serve."""
    return tuple(_in_order(device, forced))


def _in_order(device: Device, forced: str | None) -> Iterator[Backend]:
    """As `installed_backends`, but a tree is imported when it is asked for: that takes 10 ms, and a
    process in which the first one serves all calls needs no other."""
    if device.capability is None or forced == "reference":
        return
    if device.capability == _HOPPER_CAPABILITY or forced == "hopper":
        hopper = backends.hopper()
        if hopper is not None:
            yield hopper
    yield backends.flash2()


def select(problem: Problem, device: Device) -> Decision:
    """`decide` with what is installed and the environment."""
    forced = env.FORCE_BACKEND.get()
    decision = decide(problem, device, _in_order(device, forced), forced)
    return _logged(problem.describe(), decision)


def select_backward(
    problem: BackwardProblem, device: Device, backend: str | None = None
) -> Decision:
    """`decide_backward` likewise. backend: the caller's choice where kernels run at all."""
    forced = env.FORCE_BACKEND.get()
    if backend is not None and device.capability is not None and forced != "reference":
        forced = backend
    decision = decide_backward(problem, device, _in_order(device, forced), forced)
    return _logged(problem.describe(), decision)
