"""Which rank holds which tokens: a pure function of the lengths, the same on every rank.

`layout.py` wraps it for a process group; `steps.py` derives from it what each rank computes and
sends. Nothing here needs torch, so that benchmarks can plan for a thousand ranks on one machine.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SCHEMES = ("zigzag", "contiguous")

# How much more than the mean a rank may have before one more document is divided.
MAX_WORK_EXCESS = 0.02
MAX_TOKENS_EXCESS = 0.05

Span = tuple[int, int]
"""Positions start <= i < stop."""


class Share(NamedTuple):
    """What one rank holds of one document: two runs of positions, either of which may be empty."""

    document: int
    place: int  # of the rank among the document's ranks
    first: Span
    second: Span  # contiguous: empty. zigzag: its mirror image seen from the document's end
    row: int  # local row of the first token; the tokens of `second` follow those of `first`

    @property
    def tokens(self) -> int:
        return self.first[1] - self.first[0] + self.second[1] - self.second[0]

    def row_of(self, position: int) -> int:
        """Local row of a position that the share holds."""
        if self.first[0] <= position < self.first[1]:
            return self.row + position - self.first[0]
        return self.row + self.first[1] - self.first[0] + position - self.second[0]


@dataclass(frozen=True)
class Division:
    """How documents are divided among ranks.

    A rank's local rows are its shares one after another: first those of documents that several
    ranks divide, then those that it holds alone, each group in the order of the documents.
    """

    lengths: tuple[int, ...]  # tokens of each document
    ranks: tuple[tuple[int, ...], ...]  # of each document, in the order of their chunks
    world: int
    scheme: str

    @classmethod
    def of(
        cls, lengths: Sequence[int], world: int, scheme: str, min_tokens_per_rank: int | None
    ) -> Division:
        """min_tokens_per_rank: None divides every document among all ranks; a number keeps short
        documents whole where the ranks' work and tokens come out even nevertheless.
        """
        if min_tokens_per_rank is None or world == 1:
            ranks = [tuple(range(world))] * len(lengths)
        else:
            ranks = _assign(lengths, world, min_tokens_per_rank)
        return cls(tuple(lengths), tuple(ranks), world, scheme)

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @cached_property
    def shares(self) -> tuple[tuple[Share, ...], ...]:
        """Of each rank, in the order of its local rows; shares without a token are left out."""
        rows = [0] * self.world
        shares: list[list[Share]] = [[] for _ in range(self.world)]
        order = sorted(range(len(self.lengths)), key=lambda d: (len(self.ranks[d]) == 1, d))
        for document in order:
            ranks, length = self.ranks[document], self.lengths[document]
            for place, rank in enumerate(ranks):
                first, second = self._spans(length, place, len(ranks))
                share = Share(document, place, first, second, rows[rank])
                if share.tokens:
                    shares[rank].append(share)
                    rows[rank] += share.tokens
        return tuple(tuple(of_rank) for of_rank in shares)

    def _spans(self, length: int, place: int, places: int) -> tuple[Span, Span]:
        if places == 1:
            return (0, length), (length, length)
        if self.scheme == "contiguous":
            first = place * length // places, (place + 1) * length // places
            return first, (first[1], first[1])
        chunks = 2 * places
        mirror = chunks - 1 - place
        return (
            (place * length // chunks, (place + 1) * length // chunks),
            (mirror * length // chunks, (mirror + 1) * length // chunks),
        )

    @cached_property
    def divided(self) -> tuple[dict[int, Share], ...]:
        """Of each rank: the shares of documents that other ranks hold a part of, by document."""
        return tuple(
            {share.document: share for share in of_rank if len(self.ranks[share.document]) > 1}
            for of_rank in self.shares
        )

    def tokens(self, rank: int) -> int:
        return sum(share.tokens for share in self.shares[rank])

    def positions(self, rank: int) -> NDArray[np.int64]:
        """Position within its document of each local row."""
        spans = [s for share in self.shares[rank] for s in (share.first, share.second)]
        return _concatenated(spans)

    def indices(self, rank: int) -> NDArray[np.int64]:
        """Row in the undivided tensor of each local row."""
        starts = np.concatenate([[0], np.cumsum(self.lengths)]).tolist()
        spans = []
        for share in self.shares[rank]:
            start = starts[share.document]
            spans += [(start + a, start + b) for a, b in (share.first, share.second)]
        return _concatenated(spans)


def _concatenated(spans: Sequence[Span]) -> NDArray[np.int64]:
    runs = [np.arange(start, stop, dtype=np.int64) for start, stop in spans if stop > start]
    return np.concatenate(runs) if runs else np.zeros(0, dtype=np.int64)


def _assign(lengths: Sequence[int], world: int, min_tokens: int) -> list[tuple[int, ...]]:
    """The ranks of each document.

    Documents are dealt out from the longest to the shortest, each to the ranks that have least so
    far. The `count` longest are divided, among as many ranks as leave each at least min_tokens;
    count is the smallest that makes the ranks even, and is found by bisection.
    """
    order = sorted(range(len(lengths)), key=lambda d: (-lengths[d], d))
    divisible = sum(length >= 2 * min_tokens for length in lengths)
    tried: dict[int, tuple[float, list[tuple[int, ...]]]] = {}

    def excess(count: int) -> float:
        if count not in tried:
            tried[count] = _deal(lengths, order, count, world, min_tokens)
        return tried[count][0]

    low, high = 0, divisible if excess(0) > 0.0 else 0  # more divided is mostly, not always, better
    while low < high:
        middle = (low + high) // 2
        if excess(middle) <= 0.0:
            high = middle
        else:
            low = middle + 1
    excess(low)
    even = [count for count, (over, _) in tried.items() if over <= 0.0]
    best = min(even) if even else min(tried, key=lambda count: (tried[count][0], count))
    return tried[best][1]


def _deal(
    lengths: Sequence[int], order: Sequence[int], divided: int, world: int, min_tokens: int
) -> tuple[float, list[tuple[int, ...]]]:
    """(by how much a rank exceeds what it may have, <= 0 if even; the ranks of each document)."""
    all_tokens = max(1, sum(lengths))
    all_work = max(1, sum(n * n for n in lengths))
    work, tokens = [0.0] * world, [0] * world
    heap = [(0.0, rank) for rank in range(world)]  # load, a fraction of work plus one of tokens
    ranks: list[tuple[int, ...]] = [()] * len(lengths)
    for turn, document in enumerate(order):
        length = lengths[document]
        count = 1
        if turn < divided:
            count = min(world, max(1, length // min_tokens))
        chosen = [heapq.heappop(heap) for _ in range(count)]
        ranks[document] = tuple(sorted(rank for _, rank in chosen))
        share, rows = length * length / count, length / count
        for load, rank in chosen:
            work[rank] += share
            tokens[rank] += int(rows)
            heapq.heappush(heap, (load + share / all_work + rows / all_tokens, rank))
    over_work = max(work) * world / all_work - 1.0 - MAX_WORK_EXCESS
    over_tokens = max(tokens) * world / all_tokens - 1.0 - MAX_TOKENS_EXCESS
    return max(over_work, over_tokens), ranks
