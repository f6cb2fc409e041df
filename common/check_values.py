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
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}: expected a finite number")
    return float(value)


def softmax_scale(value: Any, head_dim_qk: int) -> float:
    """A number of any sign; None means head_dim_qk ** -0.5."""
    return float(head_dim_qk**-0.5) if value is None else real("softmax_scale", value)


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
