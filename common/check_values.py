"""User errors in arguments that are no tensors: window, numbers, flags. Called by `checks.py`.

TypeError for the wrong type, ValueError for the wrong value; the message says what is allowed.
"""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

from torch import Tensor

# What the public functions take; fewer where no installed backend serves them. A wide v goes with
# a narrow q and k, forward only: see hopper/tiles.py.
MAX_HEAD_DIM = 256
MAX_HEAD_DIM_WIDE_V, MAX_HEAD_DIM_QK_OF_WIDE_V = 512, 64


def window_pair(window_size: Any) -> tuple[int, int]:
    """(left, right), negative = unlimited, of any indexable pair: tuple, list, CPU tensor."""
    try:
        if len(window_size) != 2:
            raise ValueError(
                f"window_size has {len(window_size)} items: expected (left, right), -1 = unlimited"
            )
        return operator.index(window_size[0]), operator.index(window_size[1])
    except (TypeError, KeyError):
        raise TypeError(
            f"window_size is {window_size!r}: expected two integers (left, right), -1 = unlimited"
        ) from None


def non_negative(name: str, value: Any) -> int:
    """An integer >= 0; no tensor, since those hide a synchronisation and cannot be memoised."""
    try:
        if isinstance(value, Tensor):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}: expected an integer >= 0") from None
    if number < 0:
        raise ValueError(f"{name} is {number}: expected an integer >= 0")
    return number


def flag(name: str, value: Any) -> bool:
    """A truth value; no tensor, for the same reasons."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} is a tensor: expected a bool")
    return bool(value)


def real(name: str, value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}: expected a number")
    try:
        number = float(value)
    except OverflowError:  # an int or a fraction beyond float's range
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} is {value!r}: expected a finite number")
    return number


# Kernels take scale and cap times log2(e) as float32, and divide one by the other: no smaller
# than what float32 holds in full.
_SMALLEST, _LARGEST = 2.0**-126, 2.0**126
# Of softcap / |softmax_scale|, at most that far from 1.
_CAP_RANGE = 2.0**60


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


def head_dim(name: str, value: int, wide: bool = False) -> None:
    """A head dim that some backend serves. wide: v beside a head_dim_qk that allows more."""
    limit = MAX_HEAD_DIM_WIDE_V if wide else MAX_HEAD_DIM
    if value < 1:
        raise ValueError(f"{name}: head_dim is {value}, expected 1 to {limit}")
    if value > limit:
        raise NotImplementedError(
            f"{name}: head_dim is {value}, at most {limit} is supported; "
            "torch.nn.functional.scaled_dot_product_attention takes any"
        )


def dropout_probability(value: Any) -> float:
    """A number in [0, 1)."""
    dropout_p = real("dropout_p", value)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}: must be in [0, 1); pass 0.0 in evaluation")
    return dropout_p
