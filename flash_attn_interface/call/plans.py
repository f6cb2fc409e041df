"""The plans that calls have made, kept for their like: one table for the whole process.

`dispatch.py` and `combine.py` look here first. A plan holds a parameter
block that every run patches, so one thread at a time may run it: a call takes a plan out of its
slot and puts it back. Threads that run the same call at the same time get a plan each. Beyond
MAX_PLANS the least recently used ones go first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

MAX_PLANS = 768
"""A plan takes 10 to 38 KiB, so that all take less than 32 MiB. Kernels stay loaded without one."""

_EVICTED_AT_ONCE = 8  # one in so many, since finding the oldest takes a look at all


class Slot:
    """The plans of one key that no thread runs just now, and when the key was last asked for.

    Hot paths do by hand what `PlanTable.take` does: stamp `used`, pop from `idle`, and append to it
    after the run. Each is a single operation of a list, which threads may mix as they like.
    """

    __slots__ = ("idle", "made", "used")

    def __init__(self) -> None:
        self.idle: list[Any] = []
        self.made = 0  # plans, idle or not
        self.used = 0  # the table's clock


class PlanTable:
    """clock: counts the plans made; what was used between two of them is equally recent.
    find: slot of a key or None.
    """

    def __init__(self, bound: int = MAX_PLANS) -> None:
        self.bound = bound
        self.clock = 0
        self._slots: dict[Hashable, Slot] = {}
        self._count = 0
        self._guard = threading.Lock()
        self.find = self._slots.get

    def take(self, key: Hashable, make: Callable[[], Any]) -> tuple[Slot, Any]:
        """(slot, plan) of the key: an idle plan, or one that is made now."""
        slot = self.find(key)
        if slot is not None:
            slot.used = self.clock
            try:
                return slot, slot.idle.pop()
            except IndexError:  # other threads are running all
                pass
        plan = make()
        with self._guard:
            slot = self._slots.setdefault(key, Slot())
            self.clock += 1
            slot.used = self.clock
            slot.made += 1
            self._count += 1
            if self._count > self.bound:
                self._evict()
        return slot, plan

    def clear(self) -> None:
        """Plan every call anew, in all threads."""
        with self._guard:
            self._slots.clear()
            self._count = 0

    def __len__(self) -> int:
        return self._count

    def _evict(self) -> None:
        """What is running goes when it ends: its slot is no longer found."""
        oldest_first = sorted(self._slots.items(), key=lambda item: item[1].used)
        for key, slot in oldest_first:
            if self._count <= self.bound - self.bound // _EVICTED_AT_ONCE:
                break
            del self._slots[key]
            self._count -= slot.made


plans = PlanTable()
"""Of this process."""


def layout_of(tensor: Any) -> Hashable:
    """All that a check or a plan may depend on; of anything but a tensor, its type.

    Of contiguous tensors all strides that matter are known; reading them takes longer.
    """
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    try:
        return (
            tensor.shape, tensor.is_contiguous() or tensor.stride(), tensor.dtype,
            tensor.get_device(),
        )  # fmt: skip
    except RuntimeError:  # a nested or sparse tensor, which the checks will name
        return tensor.layout
