"""Attention step by step: queries stay, keys and values travel. Runs the plans of `steps.py`.

Two steps' keys are under way while the kernels of one run, in three buffers by turns. In the
backward a step's dK and dV travel straight to their owner, who adds them up in float32, in the
order of the steps, so that results are reproducible. Its own keys come in two parts, some heads
before all other steps and the others behind them: the first hides the first transfer of keys, the
second the last transfer of gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import kernels
from .exchange import Pending, Transfers, select
from .kernels import Options, Sequences
from .merge import Result, Sum, add_rows, wide
from .placed import Placed
from .steps import Launch, Rows, Step

_SLOTS = 3  # of keys: in use, complete or arriving, arriving

# Fewer query rows times heads than these are launched at once: half of them would not fill a GPU.
SPLIT_FROM = 1 << 16


class KeysAndValues(NamedTuple):
    """Or their gradients."""

    k: Tensor
    v: Tensor


class _Slots:
    """Buffers for the rows that steps bring, used by turns."""

    def __init__(self, k: Tensor, v: Tensor, dim: int, most_rows: int, count: int) -> None:
        self.like, self.dim = KeysAndValues(k, v), dim
        self.slots = [
            [x.new_empty(most_rows * _row_elements(x, dim)) for x in (k, v)] for _ in range(count)
        ]

    def take(self, turn: int, rows: int) -> KeysAndValues:
        """Contiguous tensors of so many rows."""
        return KeysAndValues(
            *(
                flat[: rows * _row_elements(x, self.dim)].view(
                    *x.shape[: self.dim], rows, *x.shape[self.dim + 1 :]
                )
                for flat, x in zip(self.slots[turn % len(self.slots)], self.like, strict=True)
            )
        )


def _row_elements(x: Tensor, dim: int) -> int:
    count = 1
    for axis, size in enumerate(x.shape):
        if axis != dim:
            count *= size
    return count


class _Keys:
    """Brings the keys and values of each step, ahead of their use."""

    def __init__(
        self, placed: Placed, transfers: Transfers, k: Tensor, v: Tensor, dim: int
    ) -> None:
        self.placed, self.transfers, self.dim = placed, transfers, dim
        self.k, self.v = k, v
        self.steps = placed.plan.steps
        most = max((sum(n for _, n in step.receives) for step in self.steps), default=0)
        count = min(_SLOTS, len(self.steps) - 1)
        self.slots = _Slots(k, v, dim, most, count)
        self.used: list[Any] = [transfers.now()]  # after step i: the event
        self.pending: dict[int, tuple[Pending, list[KeysAndValues]]] = {}
        for number in range(1, min(_SLOTS, len(self.steps))):
            self._post(number)

    def _post(self, number: int) -> None:
        step = self.steps[number]
        parts = []
        flat = self.slots.take(number, sum(n for _, n in step.receives))
        if len(step.receives) == 1:
            parts = [flat]
        else:  # one after another in memory, whatever the batch
            offset = [0, 0]
            for _, rows in step.receives:
                cut = []
                for i, x in enumerate(flat):
                    size = rows * _row_elements(x, self.dim)
                    shape = (*x.shape[: self.dim], rows, *x.shape[self.dim + 1 :])
                    cut.append(x.view(-1)[offset[i] : offset[i] + size].view(shape))
                    offset[i] += size
                parts.append(KeysAndValues(*cut))
        sends = [(peer, x, rows) for peer, rows in step.sends for x in (self.k, self.v)]
        receives = [
            (peer, x) for (peer, _), part in zip(step.receives, parts, strict=True) for x in part
        ]
        after = self.used[max(0, number - _SLOTS)]
        pending = self.transfers.post(sends, receives, after, self.dim, self.placed.indices)
        self.pending[number] = pending, parts

    def start(self, number: int) -> None:
        """Before the kernels of step `number`: starts what is to arrive during them."""
        if number > 0 and number + _SLOTS - 1 < len(self.steps):
            self._post(number + _SLOTS - 1)

    def wait(self, number: int) -> KeysAndValues:
        """The rows of step `number`, own ones first."""
        pending, parts = self.pending.pop(number)
        pending.wait()
        step = self.steps[number]
        if len(step.own) or len(parts) != 1:
            own = [select(x, step.own, self.dim, self.placed.indices) for x in (self.k, self.v)]
            k = torch.cat([own[0], *(part.k for part in parts)], self.dim)
            v = torch.cat([own[1], *(part.v for part in parts)], self.dim)
            return KeysAndValues(k, v)
        return parts[0]

    def done(self) -> None:
        """After the kernels of each step but step 0."""
        self.used.append(self.transfers.now())


class _Selected:
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


def forward(
    placed: Placed,
    group: dist.ProcessGroup,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dim: int,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse) of the rank's queries. dim: that of rows."""
    transfers = Transfers(group, q.device)
    keys = _Keys(placed, transfers, k, v, dim)
    selected = _Selected(placed.indices)
    merges = sum(bool(step.launches) for step in placed.plan.steps[1:])
    result = Result(q, v.shape[-1], dim, placed.indices, merges if placed.plan.merges else 0)
    for number, step in enumerate(placed.plan.steps):
        keys.start(number)
        here = keys.wait(number) if number else KeysAndValues(k, v)
        for launch, sequences in zip(step.launches, placed.sequences[number], strict=True):
            q_rows = selected(q, launch.q, dim)
            part = kernels.forward(
                q_rows, *_take(here, launch.k, dim, placed.indices), sequences, options
            )
            if number and placed.plan.merges:
                result.merge(launch.q, *part)
            else:
                result.put(launch.q, *part)
        if number:
            keys.done()
    return result.finish()


def _take(
    here: KeysAndValues, rows: Rows, dim: int, indices: dict[int, Tensor]
) -> tuple[Tensor, Tensor]:
    return select(here.k, rows, dim, indices), select(here.v, rows, dim, indices)


# ---- backward -----------------------------------------------------------------------------------


class Saved(NamedTuple):
    """What the backward reads. dlse: None or the gradient of softmax_lse."""

    dout: Tensor
    dlse: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    softmax_lse: Tensor


def backward(
    placed: Placed, group: dist.ProcessGroup, saved: Saved, dim: int, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of the rank's tokens."""
    steps, indices = placed.plan.steps, placed.indices
    transfers = Transfers(group, saved.q.device)
    keys = _Keys(placed, transfers, saved.k, saved.v, dim)
    own = _Own(placed, saved, dim, options)
    selected = _Selected(indices)
    dq = Sum(saved.q, dim, indices, _parts(placed, [bool(s.launches) for s in steps[1:]]))
    parts = _parts(placed, [bool(step.sends) for step in steps[1:]])
    dk, dv = Sum(saved.k, dim, indices, parts), Sum(saved.v, dim, indices, parts)
    most = max((sum(len(rows) for _, rows in step.sends) for step in steps), default=0)
    slots = _Slots(saved.k, saved.v, dim, most, min(_SLOTS, len(steps) - 1))
    own.run(0)
    before: _Returned | None = None
    for number, step in enumerate(steps[1:], 1):
        keys.start(number)
        here = keys.wait(number)
        gradients = _step_backward(
            step, placed.sequences[number], here, saved, dim, options, indices, selected, dq
        )
        keys.done()
        returned = _return(step, gradients, slots, number, transfers, dim)
        if gradients is not None and len(step.own):
            own.add(step.own, gradients)
        if before is not None:
            _collect(before, dk, dv)
        before = returned
    own.run(1)
    if before is not None:
        _collect(before, dk, dv)
    return dq.finish(own.dq), dk.finish(own.dk), dv.finish(own.dv)


def _parts(placed: Placed, steps: list[bool]) -> int:
    """Additions to a row at most; with a window some rows are in several launches of a step."""
    return 1 + sum(steps) if placed.plan.merges else 3


def _step_backward(
    step: Step,
    sequences: tuple[Sequences, ...],
    here: KeysAndValues,
    saved: Saved,
    dim: int,
    options: Options,
    indices: dict[int, Tensor],
    selected: _Selected,
    dq: Sum,
) -> KeysAndValues | None:
    """Gradients of the step's keys and values; those of the queries are added to dq."""
    total: KeysAndValues | None = None
    for launch, found in zip(step.launches, sequences, strict=True):
        rows = _of_launch(saved, launch, dim, selected)
        k, v = _take(here, launch.k, dim, indices)
        part = kernels.backward(
            rows.dout, rows.dlse, rows.q, k, v, rows.out, rows.softmax_lse, found, options
        )
        dq.add(launch.q, part[0])
        if launch.k.index is None and len(launch.k) == step.rows and len(step.launches) == 1:
            return KeysAndValues(*part[1:])
        if total is None:
            total = KeysAndValues(
                *(torch.zeros_like(x, dtype=wide(x.dtype)) for x in (here.k, here.v))
            )
        for whole, piece in zip(total, part[1:], strict=True):
            add_rows(whole, launch.k, piece, dim, indices)
    return total


def _of_launch(saved: Saved, launch: Launch, dim: int, selected: _Selected) -> Saved:
    """The launch's rows of everything that has the queries' rows."""
    return saved._replace(
        dout=selected(saved.dout, launch.q, dim),
        dlse=None if saved.dlse is None else selected(saved.dlse, launch.q, dim + 1),
        q=selected(saved.q, launch.q, dim),
        out=selected(saved.out, launch.q, dim),
        softmax_lse=selected(saved.softmax_lse, launch.q, dim + 1),
    )


class _Returned(NamedTuple):
    """Gradients on their way to us: rows, and where they arrive."""

    pending: Pending
    parts: list[tuple[Rows, KeysAndValues]]


def _return(
    step: Step,
    gradients: KeysAndValues | None,
    slots: _Slots,
    number: int,
    transfers: Transfers,
    dim: int,
) -> _Returned:
    """Sends gradients to the owners of the keys, and receives those of the keys that were sent."""
    sends: list[tuple[int, Tensor, Rows]] = []
    first = len(step.own)
    for peer, count in step.receives:
        assert gradients is not None
        for x, like in zip(gradients, slots.like, strict=True):
            part = x.narrow(dim, first, count).to(like.dtype)
            sends.append((peer, part, Rows(0, count)))
        first += count
    parts, receives = [], []
    flat = [x.view(-1) for x in slots.take(number, sum(len(rows) for _, rows in step.sends))]
    offset = [0, 0]
    for peer, rows in step.sends:
        cut = []
        for i, like in enumerate(slots.like):
            size = len(rows) * _row_elements(like, dim)
            shape = (*like.shape[:dim], len(rows), *like.shape[dim + 1 :])
            cut.append(flat[i][offset[i] : offset[i] + size].view(shape))
            offset[i] += size
        parts.append((rows, KeysAndValues(*cut)))
        receives += [(peer, x) for x in cut]
    return _Returned(transfers.post(sends, receives, transfers.now(), dim), parts)


def _collect(returned: _Returned, dk: Sum, dv: Sum) -> None:
    returned.pending.wait()
    for rows, part in returned.parts:
        dk.add(rows, part.k)
        dv.add(rows, part.v)


class _Own:
    """Gradients from the rank's own keys, in two parts by heads (one, if they are few)."""

    def __init__(self, placed: Placed, saved: Saved, dim: int, options: Options) -> None:
        self.placed, self.saved, self.dim, self.options = placed, saved, dim, options
        launches = placed.plan.steps[0].launches
        self.whole = len(launches) == 1 and len(launches[0].q) == placed.plan.rows
        self.whole = self.whole and launches[0].k.index is None and launches[0].q.index is None
        self.whole = self.whole and placed.plan.merges
        inputs = (saved.q, saved.k, saved.v)
        if not placed.plan.rows:
            self.dq = self.dk = self.dv = None
        elif self.whole:
            self.dq, self.dk, self.dv = (torch.empty_like(x) for x in inputs)
        else:
            self.dq, self.dk, self.dv = (torch.zeros_like(x, dtype=wide(x.dtype)) for x in inputs)
        self.turns = list(self._turns(len(placed.plan.steps) > 1))

    def _turns(self, transfers: bool) -> Iterator[tuple[slice, slice, slice]]:
        """Heads of q, k and v of each part; a part's query heads use its own key heads only."""
        heads = [x.shape[-2] for x in (self.saved.q, self.saved.k, self.saved.v)]
        groups = gcd(heads[1], heads[2])
        rows = self.saved.q.numel() // max(1, self.saved.q.shape[-1])
        cut = (groups + 1) // 2 if transfers and rows >= SPLIT_FROM else groups
        for start, stop in ((0, cut), (cut, groups)):
            if stop > start:
                yield tuple(slice(n // groups * start, n // groups * stop) for n in heads)  # type: ignore[misc]

    def run(self, turn: int) -> None:
        """turn: 0 before the other steps, 1 behind them."""
        if turn >= len(self.turns) or self.dq is None or self.dk is None or self.dv is None:
            return
        heads_q, heads_k, heads_v = self.turns[turn]
        saved, dim, indices = self.saved, self.dim, self.placed.indices
        part = Saved(
            saved.dout[..., heads_q, :],
            None if saved.dlse is None else saved.dlse[..., heads_q, :],
            saved.q[..., heads_q, :],
            saved.k[..., heads_k, :],
            saved.v[..., heads_v, :],
            saved.out[..., heads_q, :],
            saved.softmax_lse[..., heads_q, :],
        )
        into = (
            self.dq[..., heads_q, :],
            self.dk[..., heads_k, :],
            self.dv[..., heads_v, :],
        )
        selected = _Selected(indices)
        for launch, found in zip(
            self.placed.plan.steps[0].launches, self.placed.sequences[0], strict=True
        ):
            rows = _of_launch(part, launch, dim, selected)
            k, v = _take(KeysAndValues(part.k, part.v), launch.k, dim, indices)
            gradients = kernels.backward(
                rows.dout,
                rows.dlse,
                rows.q,
                k,
                v,
                rows.out,
                rows.softmax_lse,
                found,
                self.options,
                into if self.whole else None,
            )
            if not self.whole:
                for total, x, of in zip(
                    into, gradients, (launch.q, launch.k, launch.k), strict=True
                ):
                    add_rows(total, of, x, dim, indices)

    def add(self, rows: Rows, gradients: KeysAndValues) -> None:
        """What another step has found for the rank's own keys, its first rows."""
        assert self.dk is not None and self.dv is not None
        for total, x in zip((self.dk, self.dv), gradients, strict=True):
            part = x.narrow(self.dim, 0, len(rows))
            add_rows(total, rows, part, self.dim, self.placed.indices)
