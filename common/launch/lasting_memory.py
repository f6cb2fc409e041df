"""Device memory that outlives the call that first needs it: templates, counters.

Within a call torch's allocator may be serving from the private pool of a CUDA graph: while a graph
is captured, and in the runs with which torch.compile(mode="reduce-overhead") warms up, which
capture nothing. What is kept from such a pool belongs to the graph, and torch complains of it. A
pool serves one thread or one stream, so this memory is allocated in another thread, on a stream of
its own.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_HIGH_PRIORITY = -1  # streams of which no capture makes use unless it asks for them


def zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(count,) zeros, which every stream may use when this returns."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=dtype, device=device)
    return _elsewhere(lambda: _zeros_on_a_stream(count, dtype, device))


@functools.cache
def element(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(1,), one for the whole process. Its value means nothing."""
    return zeros(1, dtype, device)


def _zeros_on_a_stream(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    from .driver import relaxed_capture

    stream = torch.cuda.Stream(device, priority=_HIGH_PRIORITY)  # type: ignore[no-untyped-call]
    with relaxed_capture(), torch.cuda.stream(stream):
        result = torch.zeros(count, dtype=dtype, device=device)
        stream.synchronize()
    return result


def _elsewhere(make: Callable[[], Tensor]) -> Tensor:
    """What `make` returns or raises, in a thread without any modes, streams and pools."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(make())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="flash_attn_interface memory")
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    result: Tensor = outcome[0]
    return result
