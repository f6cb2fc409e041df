"""User errors in arguments that are no tensors: window, numbers, flags. Called by `checks.py`.

TypeError for the wrong type, ValueError for the wrong value; the message says what is allowed.
"""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .call import Options

# What the public functions take; fewer where no installed backend serves them. 576 and 512 are
# those of latent attention (MLA) in its absorbed form.
MAX_HEAD_DIM_QK, MAX_HEAD_DIM_V = 576, 512


def window_pair(window_size: Any) -> tuple[int, int]:
    """(left, right), negative = unlimited, of any indexable pair: tuple, list, CPU tensor."""
    try:
        length = len(window_size)
        if length == 2:
            return operator.index(window_size[0]), operator.index(window_size[1])
    except (TypeError, LookupError, RuntimeError):  # the last from tensors that cannot be read
        length = None
    if length is None or isinstance(window_size, str):
        raise TypeError(
            f"window_size is {shown(window_size)}: expected two integers (left, right), "
            "-1 = unlimited"
        )
    raise ValueError(f"window_size has {length} items: expected (left, right), -1 = unlimited")


def is_unlimited(window_size: Any) -> bool:
    """Whether it is (-1, -1) as such, which most calls pass and which needs no check."""
    try:
        return type(window_size) is tuple and window_size == (-1, -1)
    except (RuntimeError, ValueError):  # two tensors or arrays of several numbers
        return False


def window_sides(left: Any, right: Any) -> tuple[int, int]:
    """window_size_left and window_size_right."""
    return integer("window_size_left", left), integer("window_size_right", right)


def integer(name: str, value: Any) -> int:
    """No tensor, since those hide a synchronisation and cannot be memoised. One that is symbolic
    while a compiler traces stays so."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    try:
        if isinstance(value, Tensor):
            raise TypeError
        return int(operator.index(value))  # a plain one, of True as well
    except TypeError:
        raise TypeError(f"{name} is {shown(value)}: expected an integer") from None


def non_negative(name: str, value: Any) -> int:
    """An integer >= 0."""
    number = integer(name, value)
    if number < 0:
        raise ValueError(f"{name} is {shown(number)}: expected an integer >= 0")
    return number


_ORDER = (
    ". By position: flash_attn.flash_attn_func(q, k, v, dropout_p, softmax_scale, causal) as in "
    "FlashAttention-2, but flash_attn_interface.flash_attn_func(q, k, v, softmax_scale, causal) as "
    "in FlashAttention-3, which has no dropout_p. Pass options by name"
)


def flag(name: str, value: Any) -> bool:
    """A bool, 0 or 1, or NumPy's bool. Nothing else has a truth value here: "False" would count
    as true, and so would a softmax_scale that the order of arguments has put in this place."""
    if isinstance(value, (bool, torch.SymBool)):
        return bool(value)
    if isinstance(value, int) and value in (0, 1):
        return value == 1
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    order = _ORDER if isinstance(value, float) else ""
    raise TypeError(f"{name} is {shown(value)}: expected a bool, True or False{order}")


def optional_flag(name: str, value: Any) -> bool | None:
    """As `flag`, or None, where None leaves the choice to us."""
    return None if value is None else flag(name, value)


def with_flags(options: Options) -> Options:
    """The options of a public function, with flags that are bools. return_lse, return_softmax: both
    its return_attn_probs."""
    return options._replace(
        causal=flag("causal", options.causal),
        return_lse=flag("return_attn_probs", options.return_lse),
        return_softmax=flag("return_attn_probs", options.return_softmax),
        deterministic=flag("deterministic", options.deterministic),
        pack_gqa=optional_flag("pack_gqa", options.pack_gqa),
    )


def with_cache_flags(options: Options) -> Options:
    """Likewise, of flash_attn_with_kvcache."""
    return options._replace(
        causal=flag("causal", options.causal),
        rotary_interleaved=flag("rotary_interleaved", options.rotary_interleaved),
        return_lse=flag("return_softmax_lse", options.return_lse),
    )


def real(name: str, value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {shown(value)}: expected a number")
    try:
        number = float(value)
    except OverflowError:  # an integer of more than 308 digits
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} is {shown(value)}: expected a finite number")
    return number


def probability(name: str, value: Any) -> float:
    """A number in [0, 1)."""
    number = real(name, value)
    if not 0.0 <= number < 1.0:
        raise ValueError(f"{name} is {number}: must be in [0, 1); pass 0.0 in evaluation")
    return number


def bounded(name: str, value: Any, limit: int) -> int:
    """An integer from 0 to the limit."""
    number = non_negative(name, value)
    if number > limit:
        raise ValueError(f"{name} is {number}: at most {limit}")
    return number


def check_factory(device: Any, dtype: Any) -> None:
    """What modules pass on to the functions that make their tensors."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype is {shown(dtype)}: expected a floating-point torch.dtype or None")
    if device is None or isinstance(device, torch.device):
        return
    if isinstance(device, bool) or not isinstance(device, (str, int)):
        raise TypeError(f"device is {shown(device)}: expected a torch.device, its name or None")
    try:
        torch.empty(0, device=device)
    except Exception as error:  # AssertionError, RuntimeError, AcceleratorError: torch's choice
        raise ValueError(f"device is {device!r}: {error}") from None


# Kernels take scale and cap times log2(e) as float32, and divide one by the other: no smaller
# than what float32 holds in full.
_SMALLEST, _LARGEST = 2.0**-126, 2.0**126
# Of softcap / |softmax_scale|, at most that far from 1.
_CAP_RANGE = 2.0**60


def default_softmax_scale(head_dim_qk: int) -> float:
    """What softmax_scale=None stands for, of a size that a compiler may trace."""
    size = int(head_dim_qk)  # with qv, of both
    head_dim("q and k", size, MAX_HEAD_DIM_QK + MAX_HEAD_DIM_V)
    return float(size**-0.5)


def softmax_scale(value: Any, head_dim_qk: int) -> float:
    """0, or a number of either sign that float32 holds; None means head_dim_qk ** -0.5."""
    if value is None:
        return float(head_dim_qk**-0.5)
    scale = real("softmax_scale", value)
    if scale != 0.0 and not _SMALLEST <= abs(scale) <= _LARGEST:
        raise ValueError(
            f"softmax_scale is {scale!r}: expected 0, or {_SMALLEST:.3g} to {_LARGEST:.3g} in "
            "magnitude, which float32 holds"
        )
    return scale


def softcap(value: Any, scale: float) -> float:
    """The cap of scores; 0.0, off, for numbers up to 0, and for one too large to change any score.

    scale: softmax_scale. From 2**60 times that on, cap * tanh(score / cap) is the score in float32,
    for all products of q and k up to 2**40, which fp16 cannot exceed. With a scale of 0 all scores
    are 0 anyway.
    """
    cap = real("softcap", value)
    if cap <= 0.0 or cap >= _CAP_RANGE * abs(scale):
        return 0.0
    smallest = max(_SMALLEST, abs(scale) / _CAP_RANGE)
    if not smallest <= cap <= _LARGEST:
        raise ValueError(
            f"softcap is {cap!r}: with a softmax_scale of {scale!r} expected 0, or {smallest:.3g} "
            f"to {_LARGEST:.3g}, which float32 holds"
        )
    return cap


def attention_chunk(value: Any, keys: int) -> int:
    """Keys of a chunk, 0 for off. keys: a bound of those of any sequence; a chunk that holds them
    all is as good as any longer one."""
    return min(non_negative("attention_chunk", value), max(keys, 1))


def head_dim(name: str, value: int, limit: int = MAX_HEAD_DIM_QK) -> None:
    """A head dim that some backend serves."""
    if value < 1:
        raise ValueError(f"{name}: head_dim is {value}, expected 1 to {limit}")
    if value > limit:
        raise NotImplementedError(
            f"{name}: head_dim is {value}, at most {limit} is supported; "
            "torch.nn.functional.scaled_dot_product_attention takes any"
        )


def shown(value: Any) -> str:
    """For messages: a tensor by its type, everything else by its repr, cut short."""
    if isinstance(value, Tensor):
        return "a tensor"
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of more than 4300 digits
        return f"a long {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
