"""The counters that CTAs draw their tiles from: four zero bytes of device memory per launch.

A launch leaves its counter at zero (hopper/tile_scheduler.cuh), so launches that follow each other
may share one, concurrent ones may not. Launches on one stream follow each other; launches captured
into CUDA graphs may be replayed at any time, so each gets a counter of its own.
"""

from __future__ import annotations

import itertools

import torch

# A pool's counters: one per stream and one per captured launch, never reused. When they are used up
# launches get none, and their CTAs take turns instead, which balances causal work less well.
_POOL_SIZE = 1 << 16
_COUNTER_BYTES = 4


class _Pool:
    def __init__(self, device: torch.device) -> None:
        self._memory = torch.zeros(_POOL_SIZE, dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()  # other streams may use it at once
        self._begin = self._memory.data_ptr()
        self._next = itertools.count()
        self._of_stream: dict[int, int] = {}

    def _new(self) -> int:
        index = next(self._next)
        return self._begin + index * _COUNTER_BYTES if index < _POOL_SIZE else 0

    def counter(self, stream: int) -> int:
        if torch._C._cuda_isCurrentStreamCapturing():
            return self._new()
        address = self._of_stream.get(stream)
        if address is None:
            address = self._of_stream.setdefault(stream, self._new())
        return address


_pools: dict[int, _Pool] = {}


def prepare(device_index: int) -> None:
    """Makes the device's pool. Not while a CUDA graph is captured: launches then get no counter."""
    if device_index not in _pools and not torch._C._cuda_isCurrentStreamCapturing():
        _pools.setdefault(device_index, _Pool(torch.device("cuda", device_index)))


def address(device_index: int) -> int:
    """Of the counter for a launch on torch's current stream of the device; 0 if there is none."""
    pool = _pools.get(device_index)
    if pool is None:
        return 0
    return pool.counter(torch._C._cuda_getCurrentRawStream(device_index))
