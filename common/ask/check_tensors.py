"""User errors in tensors as such: kind, dtype, device, one-dimensional shapes. Called by
`checks.py` and by every module whose functions take tensors.

TypeError for the wrong type, layout or dtype, ValueError for the wrong shape, stride or device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def require_tensor(name: str, value: Any, expected: str = "a torch.Tensor") -> None:
    """A tensor that has strides, which nested, sparse and packed ones do not."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}: expected {expected}")
    if value.is_nested:
        raise TypeError(
            f"{name} is a nested tensor: expected a dense one; pass the values() and offsets() of "
            "a jagged tensor to flash_attn_varlen_func"
        )
    if value.layout is not torch.strided:
        raise TypeError(f"{name} has layout {value.layout}: expected a dense tensor")


def check_tensors(q: Any, k: Any, v: Any) -> None:
    """That they are tensors at all; cheap, since every call starts with it."""
    if isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor):
        return
    for name, value in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, value)


def refuse_layouts(**tensors: Any) -> None:
    """Names the first of these arguments that is nested or sparse. Others pass, None too."""
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            require_tensor(name, value)


def check_qkv_kind(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Tensors, strided, of one supported dtype and one device."""
    check_kinds({"q": q, "k": k, "v": v})


def check_kinds(tensors: Mapping[str, Tensor]) -> None:
    """Likewise, of tensors by name; the first is q."""
    for name, tensor in tensors.items():
        require_tensor(name, tensor)
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1:
            raise NotImplementedError(
                f"{name} has dtype {tensor.dtype}: the Ampere kernels have no fp8; "
                "convert q, k and v to torch.bfloat16 (multiplied by their descales)"
            )
        if tensor.dtype not in DTYPE_NAMES:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}: expected torch.float16 or torch.bfloat16; "
                f"convert with .to(torch.bfloat16){_autocast_hint(tensor)}"
            )
    q = tensors["q"]
    for name, tensor in tensors.items():
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype} but q has {q.dtype}: they must agree")
        require_device(name, tensor, q.device)


def _autocast_hint(tensor: Tensor) -> str:
    """What else helps against a wrong dtype."""
    if tensor.dtype != torch.float32:
        return ""
    if not autocasts(tensor):
        return " or, for the public functions, run under torch.autocast"
    return (
        "; torch.autocast, which is on here, casts for the public functions and never casts a cache"
    )


def autocasts(tensor: Tensor) -> bool:
    """Whether torch.autocast is on for the tensor's device."""
    try:
        return bool(torch.is_autocast_enabled(tensor.device.type))
    except RuntimeError:  # a device that has no autocast, "meta" say
        return False


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require_floating(name: str, value: Any) -> None:
    """A tensor of a dtype that PyTorch calculates with."""
    require_tensor(name, value)
    if value.dtype not in _FLOATS:
        raise TypeError(
            f"{name} has dtype {value.dtype}: expected float16, bfloat16, float32 or float64"
        )


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...], why: str) -> None:
    """why: which arguments say so."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected {shape}, {why}")


def require_device(name: str, tensor: Tensor, device: torch.device, of: str = "q") -> None:
    """That it is where the argument `of` is."""
    if tensor.device != device:
        raise ValueError(
            f"{name} is on {tensor.device} but {of} is on {device}: move them to one device"
        )


def check_int32_vector(
    name: str,
    tensor: Tensor | None,
    length: int,
    device: torch.device,
    of: str = "q",
    why: str = ", by the sequences of q (cu_seqlens_q)",
) -> None:
    """None, or int32 (length,), contiguous, where the argument `of` is. why: the length."""
    if tensor is None:
        return
    require_tensor(name, tensor, "an int32 torch.Tensor")
    if tensor.dtype != torch.int32:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}: expected torch.int32, use .to(torch.int32)"
        )
    if tensor.shape != (length,):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected ({length},){why}")
    require_device(name, tensor, device, of)
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} has stride {tensor.stride()}: must be contiguous, use .contiguous()"
        )


def check_alibi_slopes(
    slopes: Tensor | None, batch: int, num_heads_q: int, device: torch.device
) -> tuple[int, int]:
    """`Problem.alibi_strides`."""
    if slopes is None:
        return 0, 1
    require_tensor("alibi_slopes", slopes, "a float32 torch.Tensor")
    if slopes.dtype != torch.float32:
        raise TypeError(
            f"alibi_slopes has dtype {slopes.dtype}: expected torch.float32, use .float()"
        )
    if slopes.shape not in ((num_heads_q,), (batch, num_heads_q)):
        raise ValueError(
            f"alibi_slopes has shape {tuple(slopes.shape)}: expected (num_heads_q,) = "
            f"({num_heads_q},) or (batch, num_heads_q) = ({batch}, {num_heads_q})"
        )
    require_device("alibi_slopes", slopes, device)
    batch_stride = slopes.stride(0) if slopes.ndim == 2 and batch > 1 else 0
    return batch_stride, slopes.stride(-1) if num_heads_q > 1 else 1


SINK_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_sink_kind(s_aux: Any, device: torch.device) -> None:
    """TypeError or ValueError for a wrong type, dtype, device or number of dims."""
    require_tensor("s_aux", s_aux, "a torch.Tensor (num_heads_q,)")
    if s_aux.dtype not in SINK_DTYPES:
        raise TypeError(f"s_aux has dtype {s_aux.dtype}: expected float32, bfloat16 or float16")
    require_device("s_aux", s_aux, device)
    if s_aux.ndim != 1:
        raise ValueError(f"s_aux has shape {tuple(s_aux.shape)}: expected (num_heads_q,)")


def check_sinks(s_aux: Tensor | None, num_heads_q: int, device: torch.device) -> None:
    """Likewise, and that there is one logit for each query head."""
    if s_aux is None:
        return
    check_sink_kind(s_aux, device)
    if s_aux.shape != (num_heads_q,):
        raise ValueError(
            f"s_aux has shape {tuple(s_aux.shape)}: expected (num_heads_q,) = ({num_heads_q},)"
        )


def last_dim_contiguous(tensor: Tensor) -> Tensor:
    """`tensor`, copied only if its last dim has gaps, as upstream does."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.stride()[-1:] == (1,):
        return tensor  # check_kinds rejects other layouts
    return tensor.contiguous()
