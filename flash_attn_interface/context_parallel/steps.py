"""What a rank computes and sends, step by step: pure planning on a `Division`.

A step has transfers, and launches that need what they bring. Two plans exist:

ring    Without a window. Step 0 is the rank's own keys; in step i a rank receives keys of the rank
        i before it and sends to the rank i behind it, only the rows that can be seen there. Results
        of steps are merged by their softmax_lse.
halo    With a window. Each run of queries needs one stretch of keys. Queries whose keys are all
        here make up step 0; step 1 brings the keys that the others lack, from all ranks at once.
        Every query is in one launch only, so nothing is merged.

Steps have the same number on every rank and both ends of a transfer put it into the same step, so
that ranks that go through them in order never wait in a circle.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .division import Division, Share, Span


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor, in order: start <= i < stop, or those of `index`."""

    start: int
    stop: int
    index: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, spans: Iterable[Span]) -> Rows:
        """The spans one after another; a slice where they touch."""
        joined: list[list[int]] = []
        for start, stop in spans:
            if joined and joined[-1][1] == start:
                joined[-1][1] = stop
            elif stop > start:
                joined.append([start, stop])
        if len(joined) < 2:
            return cls(*(joined[0] if joined else (0, 0)))
        index = np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in joined])
        return cls(0, len(index), index)

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Launch:
    """One call of attention: sequences of queries, each with its keys.

    window: (left, right) as flash_attn_varlen_func takes it, for every sequence.
    """

    q: Rows  # of the rank's queries
    k: Rows  # of the rank's keys in step 0, later of what the step has brought
    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    causal: bool
    window: tuple[int, int]

    @property
    def scores(self) -> int:
        """Visible (query, key) pairs, for those who count work."""
        return sum(
            visible_scores(n_q, n_k, 0 if self.causal else self.window[1], self.window[0])
            for n_q, n_k in zip(self.q_lengths, self.k_lengths, strict=True)
        )


@dataclass(frozen=True)
class Step:
    """Transfers, and launches on what they bring: rows `own` of the rank's own keys, then those
    received, by peer in the order of `receives`.
    """

    sends: tuple[tuple[int, Rows], ...] = ()  # (peer, rows of the rank's own keys)
    receives: tuple[tuple[int, int], ...] = ()  # (peer, how many rows)
    own: Rows = Rows(0, 0)
    launches: tuple[Launch, ...] = ()

    @property
    def rows(self) -> int:
        """Of the keys that the launches read."""
        return len(self.own) + sum(count for _, count in self.receives)


@dataclass(frozen=True)
class Plan:
    """All steps of one rank. steps[0] has no transfer, and its launches read the rank's own keys.

    merges: launches of later steps meet rows that have a result already.
    """

    steps: tuple[Step, ...]
    rows: int  # local tokens
    merges: bool


def plan(division: Division, rank: int, causal: bool, window: tuple[int, int], dense: bool) -> Plan:
    """The steps of `rank`.

    window: (left, right), -1 unlimited; with `causal`, right is 0 in any case.
    dense: a launch may hold one sequence only, since tensors have a batch dimension.
    """
    left, right = window[0], 0 if causal else window[1]
    if left < 0 and (causal or right < 0):
        return _ring(division, rank, causal)
    return _Halo(division, left, right, dense).plan(rank)


def visible_scores(seqlen_q: int, seqlen_k: int, right: int, left: int) -> int:
    """Pairs (i, j) with i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k - seqlen_q + right."""
    position = np.arange(seqlen_q, dtype=np.int64) + (seqlen_k - seqlen_q)
    low = np.zeros_like(position) if left < 0 else np.maximum(position - left, 0)
    high = np.full_like(position, seqlen_k - 1)
    if right >= 0:
        high = np.minimum(high, position + right)
    return int(np.maximum(high - low + 1, 0).sum())


# ---- ring ---------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """Of one document: which local rows of the queries meet which local rows of the keys."""

    q: Span
    k: Span


def _ring(division: Division, rank: int, causal: bool) -> Plan:
    shares = division.shares[rank]
    rows = division.tokens(rank)
    local: tuple[Launch, ...] = ()
    if rows:
        lengths = tuple(share.tokens for share in shares)
        whole = Rows(0, rows)
        local = (Launch(whole, whole, lengths, lengths, causal, (-1, -1)),)
    steps = [Step(launches=local)]
    for offset in range(1, division.world):
        ahead = (rank + offset) % division.world
        behind = (rank - offset) % division.world
        sent = Rows.of(part.k for part in _parts(division, ahead, rank, causal))
        parts = list(_parts(division, rank, behind, causal))
        count = sum(part.k[1] - part.k[0] for part in parts)
        launches: tuple[Launch, ...] = ()
        if count:
            q_lengths = tuple(part.q[1] - part.q[0] for part in parts)
            k_lengths = tuple(part.k[1] - part.k[0] for part in parts)
            q_rows = Rows.of(part.q for part in parts)
            launch = Launch(q_rows, Rows(0, count), q_lengths, k_lengths, False, (-1, -1))
            launches = (launch,)
        steps.append(
            Step(
                sends=((ahead, sent),) if len(sent) else (),
                receives=((behind, count),) if count else (),
                launches=launches,
            )
        )
    return Plan(tuple(steps), rows, merges=True)


def _parts(division: Division, q_rank: int, k_rank: int, causal: bool) -> Iterator[_Part]:
    """What q_rank sees of another rank's keys; all of these pairs of parts are fully visible.

    Causal, and the keys' rank comes earlier in the document: its first chunk lies before both of
    ours, its second behind both. Later: both of its chunks lie between ours.
    """
    theirs = division.divided[k_rank]
    for document, mine in division.divided[q_rank].items():
        other = theirs.get(document)
        if other is None:
            continue
        part = _Part(_rows(mine), _rows(other))
        if causal and other.place < mine.place:
            part = _Part(part.q, (other.row, other.row + other.first[1] - other.first[0]))
        elif causal:
            part = _Part((mine.row + mine.first[1] - mine.first[0], part.q[1]), part.k)
        if part.q[1] > part.q[0] and part.k[1] > part.k[0]:
            yield part


def _rows(share: Share) -> Span:
    return share.row, share.row + share.tokens


# ---- halo ---------------------------------------------------------------------------------------


class _Need(NamedTuple):
    """A run of queries of one document, and the stretch of keys that it can see."""

    document: int
    q: Span  # positions
    k: Span
    half: int  # 0: of the share's first run, 1: of the second
    here: bool  # all keys are the rank's own, one behind another


_Group = tuple[tuple[int, int], int]
"""(window, half): of sequences that may share a launch."""


@dataclass
class _Sequences:
    """A launch in the making."""

    q: list[Span] = field(default_factory=list)
    k: list[list[Span]] = field(default_factory=list)


class _Halo:
    """Plans with a window; left, right: -1 unlimited."""

    def __init__(self, division: Division, left: int, right: int, dense: bool) -> None:
        self.division = division
        self.left, self.right, self.dense = left, right, dense

    def plan(self, rank: int) -> Plan:
        division = self.division
        sends, receives = [], []
        places: dict[int, list[tuple[Span, int]]] = {}  # of a rank's local rows in what step 1 has
        own = self._spans(rank, rank)
        filled = _place(own, 0, places.setdefault(rank, []))
        for peer in self._peers(rank):
            sent = self._spans(peer, rank)
            if sent:
                sends.append((peer, Rows.of(sent)))
            spans = self._spans(rank, peer)
            if spans:
                before, filled = filled, _place(spans, filled, places.setdefault(peer, []))
                receives.append((peer, filled - before))
        here, brought = self._launches(rank, places)
        last = Step(tuple(sends), tuple(receives), Rows.of(own), brought)
        return Plan((Step(launches=here), last), division.tokens(rank), merges=False)

    def _peers(self, rank: int) -> list[int]:
        documents = self.division.divided[rank]
        return sorted({p for d in documents for p in self.division.ranks[d]} - {rank})

    def _needs(self, rank: int) -> Iterator[_Need]:
        for share in self.division.shares[rank]:
            document, length = share.document, self.division.lengths[share.document]
            if share.tokens == length:
                yield _Need(document, (0, length), (0, length), 0, True)
                continue
            for half, (start, stop) in enumerate((share.first, share.second)):
                if stop > start:
                    yield from self._needs_of(share, half, start, stop, length)

    def _needs_of(
        self, share: Share, half: int, start: int, stop: int, length: int
    ) -> Iterator[_Need]:
        low = 0 if self.left < 0 else max(0, start - self.left)
        high = length if self.right < 0 else min(length, stop + self.right)
        held, held_stop = start, stop
        if share.first[0] < share.first[1] == share.second[0] < share.second[1]:
            held, held_stop = share.first[0], share.second[1]
        if held <= low and high <= held_stop:
            yield _Need(share.document, (start, stop), (low, high), half, True)
        elif self.right == 0 and 0 <= self.left < stop - start:  # the later ones lack nothing
            middle = start + self.left
            yield _Need(share.document, (middle, stop), (start, stop), half, True)
            if middle > start:
                yield _Need(share.document, (start, middle), (low, middle), half, False)
        else:
            yield _Need(share.document, (start, stop), (low, high), half, False)

    def _spans(self, q_rank: int, k_rank: int) -> list[Span]:
        """Local rows of k_rank that step 1 of q_rank reads, ascending, none twice."""
        wanted: dict[int, list[Span]] = {}
        for need in self._needs(q_rank):
            if not need.here:
                wanted.setdefault(need.document, []).append(need.k)
        joined: list[Span] = []
        for document, share in self.division.divided[k_rank].items():
            spans = sorted(
                (share.row_of(max(low, start)), share.row_of(max(low, start)) + size)
                for start, stop in (share.first, share.second)
                for low, high in wanted.get(document, ())
                if (size := min(high, stop) - max(low, start)) > 0
            )
            for start, stop in spans:
                if joined and start <= joined[-1][1]:
                    joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
                else:
                    joined.append((start, stop))
        return joined

    def _launches(
        self, rank: int, places: dict[int, list[tuple[Span, int]]]
    ) -> tuple[tuple[Launch, ...], tuple[Launch, ...]]:
        """Of step 0 and step 1. Sequences of a launch share a window, and no key is in two."""
        shares = {share.document: share for share in self.division.shares[rank]}
        groups: tuple[dict[_Group, _Sequences], ...] = ({}, {})
        for need in self._needs(rank):
            share = shares[need.document]
            window = self._window(need.q[1] - need.k[1])
            row = share.row_of(need.q[0])
            q_span = row, row + need.q[1] - need.q[0]
            if need.here:
                first = share.row_of(need.k[0])
                k_spans = [(first, first + need.k[1] - need.k[0])]
                touching = share.first[1] == share.second[0]  # a key may serve both halves
                key = (window, need.half if self.dense or touching else 0)
            else:
                k_spans = self._found(need, places)
                key = (window, need.half)
            group = groups[not need.here].setdefault(key, _Sequences())
            group.q.append(q_span)
            group.k.append(k_spans)
        here, brought = (
            tuple(_launch(window, found) for (window, _), found in group.items())
            for group in groups
        )
        return here, brought

    def _window(self, behind: int) -> tuple[int, int]:
        """Of a sequence whose last query lies `behind` positions behind its last key: attention
        aligns the two."""
        left = -1 if self.left < 0 else self.left - behind
        right = -1 if self.right < 0 else self.right + behind
        return left, right

    def _found(self, need: _Need, places: dict[int, list[tuple[Span, int]]]) -> list[Span]:
        """Where step 1 has the keys of `need`, in the order of their positions."""
        found: list[tuple[int, Span]] = []
        for peer in self.division.ranks[need.document]:
            share = self.division.divided[peer].get(need.document)
            for start, stop in () if share is None else (share.first, share.second):
                low, high = max(start, need.k[0]), min(stop, need.k[1])
                if share is not None and high > low:
                    row = share.row_of(low)
                    offset = next(
                        at + row - a for (a, b), at in places[peer] if a <= row and row < b
                    )
                    found.append((low, (offset, offset + high - low)))
        return [span for _, span in sorted(found)]


def _place(spans: Sequence[Span], filled: int, into: list[tuple[Span, int]]) -> int:
    """Notes where each span comes to lie behind what is there already; returns the new end."""
    for start, stop in spans:
        into.append(((start, stop), filled))
        filled += stop - start
    return filled


def _launch(window: tuple[int, int], found: _Sequences) -> Launch:
    return Launch(
        Rows.of(found.q),
        Rows.of(span for spans in found.k for span in spans),
        tuple(stop - start for start, stop in found.q),
        tuple(sum(stop - start for start, stop in spans) for spans in found.k),
        False,
        window,
    )
