"""Keeps torch.autocast away from the reference's arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .._common.ask.check_tensors import autocasts

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
