"""Keys and values of other ranks: buffers, and transfers ahead of their use. Used by `ring.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .exchange import Pending, Transfers, select
from .placed import Placed
from .steps import Rows

SLOTS = 3  # of keys: in use, complete or arriving, arriving


class KeysAndValues(NamedTuple):
    """Or their gradients."""

    k: Tensor
    v: Tensor


class Slots:
    """Buffers for the rows that steps bring, used by turns."""

    def __init__(self, k: Tensor, v: Tensor, dim: int, most_rows: int, count: int) -> None:
        self.like, self.dim = KeysAndValues(k, v), dim
        self.slots = [
            [x.new_empty(most_rows * row_elements(x, dim)) for x in (k, v)] for _ in range(count)
        ]

    def take(self, turn: int, counts: Sequence[int]) -> list[KeysAndValues]:
        """Contiguous tensors of so many rows, one behind another."""
        found, begins = [], [0, 0]
        for rows in counts:
            cut = []
            for i, (flat, x) in enumerate(zip(self._slot(turn), self.like, strict=True)):
                end = begins[i] + rows * row_elements(x, self.dim)
                shape = (*x.shape[: self.dim], rows, *x.shape[self.dim + 1 :])
                cut.append(flat[begins[i] : end].view(shape))
                begins[i] = end
            found.append(KeysAndValues(*cut))
        return found

    def _slot(self, turn: int) -> list[Tensor]:
        return self.slots[turn % len(self.slots)]


def row_elements(x: Tensor, dim: int) -> int:
    count = 1
    for axis, size in enumerate(x.shape):
        if axis != dim:
            count *= size
    return count


class Keys:
    """Brings the keys and values of each step, ahead of their use."""

    def __init__(
        self, placed: Placed, transfers: Transfers, k: Tensor, v: Tensor, dim: int
    ) -> None:
        self.placed, self.transfers, self.dim = placed, transfers, dim
        self.k, self.v = k, v
        self.steps = placed.plan.steps
        most = max((sum(n for _, n in step.receives) for step in self.steps), default=0)
        count = min(SLOTS, len(self.steps) - 1)
        self.slots = Slots(k, v, dim, most, count)
        self.used: list[Any] = [transfers.now()]  # after step i: the event
        self.pending: dict[int, tuple[Pending, list[KeysAndValues]]] = {}
        for number in range(1, min(SLOTS, len(self.steps))):
            self._post(number)

    def _post(self, number: int) -> None:
        step = self.steps[number]
        parts = self.slots.take(number, [count for _, count in step.receives])
        sends = [(peer, x, rows) for peer, rows in step.sends for x in (self.k, self.v)]
        receives = [
            (peer, x) for (peer, _), part in zip(step.receives, parts, strict=True) for x in part
        ]
        after = self.used[max(0, number - SLOTS)]
        pending = self.transfers.post(sends, receives, after, self.dim, self.placed.indices)
        self.pending[number] = pending, parts

    def start(self, number: int) -> None:
        """Before the kernels of step `number`: starts what is to arrive during them."""
        if number > 0 and number + SLOTS - 1 < len(self.steps):
            self._post(number + SLOTS - 1)

    def wait(self, number: int) -> KeysAndValues:
        """The rows of step `number`, own ones first; anything, if it has no launch."""
        pending, parts = self.pending.pop(number)
        pending.wait()
        step = self.steps[number]
        if not step.launches:
            return KeysAndValues(self.k, self.v)
        if len(step.own) or len(parts) != 1:
            own = [select(x, step.own, self.dim, self.placed.indices) for x in (self.k, self.v)]
            k = torch.cat([own[0], *(part.k for part in parts)], self.dim)
            v = torch.cat([own[1], *(part.v for part in parts)], self.dim)
            return KeysAndValues(k, v)
        return parts[0]

    def done(self) -> None:
        """After the kernels of each step but step 0."""
        self.used.append(self.transfers.now())


class Selected:
    """Rows of tensors that several launches may ask for one after another."""

    def __init__(self, indices: dict[int, Tensor]) -> None:
        self.indices = indices
        self.last: dict[int, tuple[int, Tensor]] = {}

    def __call__(self, tensor: Tensor, rows: Rows, dim: int) -> Tensor:
        if rows.index is None:
            return select(tensor, rows, dim, self.indices)
        index = self.indices[id(rows.index)]
        known = self.last.get(id(tensor))
        if known is None or known[0] != id(index):
            known = id(index), tensor.index_select(dim, index)
            self.last[id(tensor)] = known
        return known[1]
