"""Whether anybody but autograd watches a call, which decides which way the call takes.

Plain tensors that nobody watches go straight to `dispatch.py`, past torch's dispatcher. That is
most calls, so `unwatched` has a budget of half a microsecond. All others go through the registered
operators (`watched.py`): tensor subclasses (DTensor, AsyncCollectiveTensor, FakeTensor), dispatch
and function modes (FlopCounterMode, selective checkpointing, make_fx), the transforms of
torch.func, forward-mode AD, torch.jit.trace, and views with a pending negation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack

PLAIN_TYPES: set[type] = {Tensor, torch.nn.Parameter}

_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_num_function_modes = torch._C._len_torch_function_stack
_transforms_active = torch._C._are_functorch_transforms_active
_tracing = torch._C._is_tracing


def unwatched(q: Any, k: Any, v: Any) -> bool:
    """Whether q, k and v are plain tensors whose memory is all there is to know about a call."""
    types = PLAIN_TYPES
    return (
        type(q) in types
        and type(k) in types
        and type(v) in types
        and not _num_dispatch_modes()
        and not _transforms_active()
        and (not _num_function_modes() or _only_default_devices())
        and forward_ad._current_level < 0
        and not _tracing()
        and not (q.is_neg() or k.is_neg() or v.is_neg())
    )


def all_plain(*arguments: Any) -> bool:
    """Whether further arguments are neither tensor subclasses nor pending negations.

    Arguments that are no tensors count as plain: the checks of the direct way name them.
    """
    for argument in arguments:
        if argument is not None:
            if type(argument) in PLAIN_TYPES:
                if argument.is_neg():
                    return False
            elif isinstance(argument, Tensor):
                return False
    return True


def has_plain_type(argument: Any) -> bool:
    """As `all_plain`, of one tensor of integers, say lengths."""
    return type(argument) in PLAIN_TYPES or not isinstance(argument, Tensor)


def differentiates(*arguments: Any) -> bool:
    """Whether nobody but torch's own autograd, in forward mode or with a pending negation, watches
    these tensors: then the reference, which is made of PyTorch operations, needs no help."""
    return (
        all(type(each) in PLAIN_TYPES or not isinstance(each, Tensor) for each in arguments)
        and not _num_dispatch_modes()
        and not _transforms_active()
        and (not _num_function_modes() or _only_default_devices())
        and not _tracing()
    )


def a_transform_is(kind: str) -> bool:
    """Whether one of the running transforms of torch.func is of that kind: Grad, Vmap or Jvp."""
    return any(interpreter.key().name == kind for interpreter in _interpreters())


def tracing() -> bool:
    """Whether torch.jit.trace records."""
    return bool(_tracing())


def traced_or_transformed(*tensors: Any) -> str | None:
    """Which of those watches that a call with side effects cannot be seen by; None for none."""
    if _tracing():
        return "torch.jit.trace"
    if _transforms_active():
        return "a transform of torch.func"
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return "make_fx"
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return "FakeTensorMode"
    if forward_ad._current_level >= 0 and any(
        isinstance(x, Tensor) and x.is_floating_point() and _has_tangent(x) for x in tensors
    ):
        return "forward-mode AD"
    return None


def refuse_forward_mode(*tensors: Any) -> None:
    """NotImplementedError if forward-mode AD or torch.func.jvp follows one of the tensors."""
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and _has_tangent(tensor):
            raise NotImplementedError(
                "forward-mode AD (torch.func.jvp, jacfwd, torch.autograd.forward_ad) of attention: "
                "its kernels have a backward only. Use reverse mode (torch.func.vjp, jacrev), "
                "forward_ad on CPU tensors, or scaled_dot_product_attention of "
                "torch.nn.functional under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
            )


def _has_tangent(tensor: Tensor) -> bool:
    if a_transform_is("Jvp") and not _the_innermost_is("Jvp"):
        return True  # it may be hidden in a batch
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def _the_innermost_is(kind: str) -> bool:
    return bool(_interpreters()[-1].key().name == kind)


def _interpreters() -> list[Any]:
    """Of the active transforms, outermost first."""
    return list(torch._C._functorch.get_interpreter_stack() or ())


def _only_default_devices() -> bool:
    """Whether all function modes come from torch.set_default_device or `with torch.device(...)`:
    these concern functions that make tensors."""
    from torch.utils._device import DeviceContext

    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return all(type(mode) is DeviceContext for mode in modes)
