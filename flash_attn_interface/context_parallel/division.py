"""Which rank holds which tokens: a pure function of the lengths, the same on every rank.

`layout.py` wraps it for a process group; `steps.py` derives from it what each rank computes and
sends. Nothing here needs torch, so that benchmarks can plan for a thousand ranks on one machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SCHEMES = ("zigzag", "contiguous")

# What a further rank costs each token of a document that it has a part of, in keys that one query
# could see in that time: sending and adding up its keys' gradients, merging results.
KEYS_PER_RANK = 1024
NODE = 8  # neighbours that a fast link joins; blocks of more ranks pay for the network
KEYS_PER_DISTANT_RANK = 8192

# A rank may have this much more than the mean before finer parts of documents are tried.
GOOD_ENOUGH = 1.02

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

    A rank that all others equal has a load of 1, in work as in tokens. Documents are cut into parts
    of at most a certain load, 1, 1/2, 1/4 and so on; the best of these is taken, which the costs of
    dividing decide: the finest parts make ranks equal, but have most to send.
    """
    work = sum(n * n for n in lengths)
    loads = [max(n / max(1, sum(lengths)), n * n / max(1, work)) * world for n in lengths]
    most = [_parts(world, n // min_tokens, world) for n in lengths]
    finest = 1.0
    best: tuple[float, list[tuple[int, ...]]] = (math.inf, [])
    while True:
        parts = [_parts(load / finest, m, world) for load, m in zip(loads, most, strict=True)]
        best = min(best, _deal(lengths, parts, world), key=lambda found: found[0])
        if best[0] <= GOOD_ENOUGH or parts == most:
            return best[1]
        finest /= 2


def _parts(wanted: float, most: int, world: int) -> int:
    """A power of two, or all ranks."""
    if most >= world and wanted > world / 2:
        return world
    limit = max(1, min(most, world))
    parts = 1
    while parts < wanted - 1e-9 and 2 * parts <= limit:
        parts *= 2
    return parts


def _deal(
    lengths: Sequence[int], parts: Sequence[int], world: int
) -> tuple[float, list[tuple[int, ...]]]:
    """(the most that a rank has, as a multiple of the mean; the ranks of each document).

    From the longest document to the shortest, each goes to the block of neighbouring ranks that has
    least so far. Blocks of a size begin at its multiples, so that a rank shares documents with few
    others, and those are near.
    """
    work, tokens, load = np.zeros(world), np.zeros(world), np.zeros(world)
    all_work = max(1, sum(n * n for n in lengths)) / world
    all_tokens = max(1, sum(lengths)) / world
    ranks: list[tuple[int, ...]] = [()] * len(lengths)
    for document in sorted(range(len(lengths)), key=lambda d: (-lengths[d], d)):
        length, count = lengths[document], parts[document]
        starts = np.append(np.arange(0, world - count + 1, count), world - count)
        blocks = starts[:, None] + np.arange(count)
        start = int(starts[np.argmin(load[blocks].max(1))])
        block = slice(start, start + count)
        ranks[document] = tuple(range(start, start + count))
        further = (count - 1) * (KEYS_PER_RANK if count <= NODE else KEYS_PER_DISTANT_RANK)
        keys = length + 2 * further  # twice the mean of a query, if causal
        work[block] += length * keys / count / all_work
        tokens[block] += length / count / all_tokens
        load[block] = np.maximum(work[block], tokens[block])
    return float(max(work.max(), tokens.max())), ranks
