"""Counters of a launch: zeroed device memory by which its CTAs learn who of them is the last
(flash2/decode.cu) or draw their tiles (hopper/tile_scheduler.cuh).

A launch leaves its counters at zero (the last of its CTAs to look at one stores 0), so launches
that follow each other may share them, concurrent ones may not. Launches on one stream follow each
other; launches captured into CUDA graphs may be replayed at any time, so each gets counters of its
own. All lie in `lasting_memory.py`, since a launch of a stream may come after any graph.
"""

from __future__ import annotations

import threading

import torch

from . import lasting_memory

MAX_COUNTERS = 4096
"""Of one launch. As many belong to each stream for good."""

_BLOCK = 1 << 18  # counters that are allocated at a time: 1 MiB
_COUNTER_BYTES = 4
_ALIGNMENT = 4  # counters: what a launch gets begins at a multiple of 16 bytes


class _Pool:
    """One device's. Counters are handed out once: who has them may use them for ever."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._guard = threading.Lock()
        self._blocks: list[torch.Tensor] = []
        self._next = self._end = 0  # addresses, of the last block
        self._of_stream: dict[int, int] = {}

    def reserve(self) -> None:
        """Makes room for many launches. Waits for the device where it must allocate."""
        with self._guard:
            if self._end - self._next < _BLOCK * _COUNTER_BYTES // 2:
                block = lasting_memory.zeros(_BLOCK, torch.int32, self._device)
                self._blocks.append(block)
                self._next = block.data_ptr()
                self._end = self._next + _BLOCK * _COUNTER_BYTES

    def take(self, count: int) -> int:
        count = -(-count // _ALIGNMENT) * _ALIGNMENT
        with self._guard:
            address = self._next
            if self._end - address < count * _COUNTER_BYTES:
                return 0
            self._next += count * _COUNTER_BYTES
            return address

    def of_stream(self, stream: int) -> int:
        address = self._of_stream.get(stream)
        if address is None:
            self.reserve()
            address = self._of_stream.setdefault(stream, self.take(MAX_COUNTERS))
        return address


_pools: dict[int, _Pool] = {}


def prepare(device_index: int) -> None:
    """Makes room for the device's next launches, unless a CUDA graph is being captured."""
    if not torch._C._cuda_isCurrentStreamCapturing():
        pool = _pools.get(device_index)
        if pool is None:
            pool = _pools.setdefault(device_index, _Pool(torch.device("cuda", device_index)))
        pool.reserve()


def address(device_index: int, count: int) -> int:
    """Of `count` zeroed counters for a launch on torch's current stream of the device.

    count: at most MAX_COUNTERS. The answer is 0 where a capture finds none left, which `prepare`
    makes unlikely: then do without, or let the graph allocate and zero them.
    """
    if torch._C._cuda_getDevice() != device_index:
        with torch.cuda.device(device_index):
            return address(device_index, count)
    pool = _pools.get(device_index)
    if torch._C._cuda_isCurrentStreamCapturing():
        return pool.take(count) if pool is not None else 0
    if pool is None:
        prepare(device_index)
        pool = _pools[device_index]
    return pool.of_stream(torch._C._cuda_getCurrentRawStream(device_index))
