"""Attention step by step: queries stay, keys and values travel. Runs the plans of `steps.py`.

Two steps' keys are under way while the kernels of one run, in three buffers by turns. In the
backward a step's dK and dV travel straight to their owner, who adds them up in float32, in the
order of the steps, so that results are reproducible. Its own keys come in two parts, some heads
before all other steps and the others behind them: the first hides the first transfer of keys, the
second the last transfer of gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import gcd
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import kernels
from .exchange import Pending, Transfers, select
from .kernels import Options, Sequences
from .keys import SLOTS, Keys, KeysAndValues, Selected, Slots
from .merge import Result, Sum, add_rows, put_rows, wide
from .placed import Placed
from .steps import Launch, Rows, Step

# Fewer query rows times heads than these are launched at once: half of them would not fill a GPU.
SPLIT_FROM = 1 << 16


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
    keys = Keys(placed, transfers, k, v, dim)
    selected = Selected(placed.indices)
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
    keys = Keys(placed, transfers, saved.k, saved.v, dim)
    own = _Own(placed, saved, dim, options)
    selected = Selected(indices)
    # Additions to a row at most. With a window a query is in one launch, a key in several.
    launched = 1 + sum(bool(step.launches) for step in steps[1:])
    sent = 1 + sum(bool(step.sends) for step in steps[1:])
    dq = Sum(saved.q, dim, indices, launched if placed.plan.merges else 1)
    parts = sent if placed.plan.merges else 3
    dk, dv = Sum(saved.k, dim, indices, parts), Sum(saved.v, dim, indices, parts)
    most = max((sum(len(rows) for _, rows in step.sends) for step in steps), default=0)
    slots = Slots(saved.k, saved.v, dim, most, min(SLOTS, len(steps) - 1))
    own.run(0)
    before: _Returned | None = None
    for number, step in enumerate(steps[1:], 1):
        keys.start(number)
        here = keys.wait(number)
        gradients = _step_backward(
            step, placed.sequences[number], here, saved, dim, options, indices, selected,
            dq.add if placed.plan.merges else own.put_queries,
        )  # fmt: skip
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


def _step_backward(
    step: Step,
    sequences: tuple[Sequences, ...],
    here: KeysAndValues,
    saved: Saved,
    dim: int,
    options: Options,
    indices: dict[int, Tensor],
    selected: Selected,
    take_dq: Callable[[Rows, Tensor], None],
) -> KeysAndValues | None:
    """Gradients of the step's keys and values; those of the queries go to take_dq."""
    total: KeysAndValues | None = None
    for launch, found in zip(step.launches, sequences, strict=True):
        rows = _of_launch(saved, launch, dim, selected)
        k, v = _take(here, launch.k, dim, indices)
        part = kernels.backward(
            rows.dout, rows.dlse, rows.q, k, v, rows.out, rows.softmax_lse, found, options
        )
        take_dq(launch.q, part[0])
        if launch.k.index is None and len(launch.k) == step.rows and len(step.launches) == 1:
            return KeysAndValues(*part[1:])
        if total is None:
            total = KeysAndValues(
                *(torch.zeros_like(x, dtype=wide(x.dtype)) for x in (here.k, here.v))
            )
        for whole, piece in zip(total, part[1:], strict=True):
            add_rows(whole, launch.k, piece, dim, indices)
    return total


def _of_launch(saved: Saved, launch: Launch, dim: int, selected: Selected) -> Saved:
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
    slots: Slots,
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
    arriving = slots.take(number, [len(rows) for _, rows in step.sends])
    parts = [(rows, part) for (_, rows), part in zip(step.sends, arriving, strict=True)]
    receives = [
        (peer, x) for (peer, _), part in zip(step.sends, arriving, strict=True) for x in part
    ]
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
        self.whole = placed.plan.merges  # step 0 is then one launch, of all rows
        inputs = (saved.q, saved.k, saved.v)
        if not placed.plan.rows:
            self.dq = self.dk = self.dv = None
        elif self.whole:
            self.dq, self.dk, self.dv = (torch.empty_like(x) for x in inputs)
        else:
            self.dk, self.dv = (torch.zeros_like(x, dtype=wide(x.dtype)) for x in inputs[1:])
            self.dq = torch.empty_like(saved.q)  # every query is in one launch
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
        selected = Selected(indices)
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
                put_rows(into[0], launch.q, gradients[0], dim, indices)
                for total, x in zip(into[1:], gradients[1:], strict=True):
                    add_rows(total, launch.k, x, dim, indices)

    def put_queries(self, rows: Rows, part: Tensor) -> None:
        """dq of rows that are in no other launch."""
        assert self.dq is not None
        put_rows(self.dq, rows, part, self.dim, self.placed.indices)

    def add(self, rows: Rows, gradients: KeysAndValues) -> None:
        """What another step has found for the rank's own keys, its first rows."""
        assert self.dk is not None and self.dv is not None
        for total, x in zip((self.dk, self.dv), gradients, strict=True):
            part = x.narrow(self.dim, 0, len(rows))
            add_rows(total, rows, part, self.dim, self.placed.indices)
