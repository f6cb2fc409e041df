"""torch.autocast: the public functions cast float32 inputs as torch's own attention does, and the
arithmetic of the reference stays what it is.

`cast` is called by `autograd.py`, `paged.py` and the kvcache functions. The operations of
`fa2_ops.py` and their like take tensors as they are, as upstream's do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .._common.ask.check_tensors import DTYPE_NAMES, autocasts

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """For the reference: autocast would do its float32 arithmetic in 16 bits, or refuse a mixture.

    Some of the arguments, or of their items, are tensors, of one device.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next(_tensors((*args, *kwargs.values())))
        if not autocasts(first):
            return function(*args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return run


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


def cast(*tensors: Any, like: Any = None) -> tuple[Any, ...]:
    """The tensors, those of float32 in the 16-bit dtype that another has, or else in autocast's.

    Nothing is cast where autocast is off, and nothing but float32 ever; casts have gradients.
    like: a tensor that is not cast itself, a cache, and whose dtype comes first.
    """
    floats = [x for x in (like, *tensors) if isinstance(x, Tensor)]
    if not any(x.dtype is torch.float32 for x in floats) or not autocasts(floats[-1]):
        return tensors
    dtype = next(
        (x.dtype for x in floats if x.dtype in DTYPE_NAMES),
        torch.get_autocast_dtype(floats[-1].device.type),
    )
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.dtype is torch.float32 else x for x in tensors
    )
