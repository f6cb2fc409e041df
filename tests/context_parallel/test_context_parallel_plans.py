"""Plans of context parallelism, for more ranks than a test can start: pure functions."""

from __future__ import annotations

import random

import numpy as np
import pytest
from inputs import SEEDS

from flash_attn_interface.context_parallel.division import Division
from flash_attn_interface.context_parallel.steps import Launch, Plan, plan, visible_scores

WINDOWS = {
    "full": (False, (-1, -1)),
    "causal": (True, (-1, -1)),
    "causal-window": (True, (7, 0)),
    "wide-causal-window": (True, (60, 0)),
    "self": (True, (0, 0)),
    "window": (False, (5, 9)),
    "left": (False, (6, -1)),
    "right": (False, (-1, 6)),
}


def division_of(world: int, scheme: str, dense: bool, draw: random.Random) -> Division:
    if dense:
        return Division.of([draw.choice([0, 1, world, 97, 160])], world, scheme, None)
    lengths = [draw.choice([0, 1, 2, draw.randrange(30), draw.randrange(150)]) for _ in range(9)]
    return Division.of(lengths, world, scheme, draw.choice([1, 4, 16]))


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "packed"])
@pytest.mark.parametrize("scheme", ["zigzag", "contiguous"])
@pytest.mark.parametrize("world", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("name", WINDOWS)
def test_every_visible_pair_is_in_one_launch(
    name: str, world: int, scheme: str, dense: bool
) -> None:
    """And no other pair is. Masks are evaluated as attention aligns them: at the sequence's end."""
    causal, window = WINDOWS[name]
    division = division_of(world, scheme, dense, random.Random(SEEDS.random()))
    document = np.repeat(np.arange(len(division.lengths)), division.lengths)
    position = np.concatenate([np.arange(n) for n in (0, *division.lengths)])
    distance = position[None, :] - position[:, None]  # of the key from the query
    left, right = window[0], 0 if causal else window[1]
    visible = document[None, :] == document[:, None]
    visible &= (distance >= -left) | (left < 0)
    visible &= (distance <= right) | (right < 0)
    plans = [plan(division, rank, causal, window, dense) for rank in range(world)]
    counted = np.zeros(visible.shape, dtype=np.int64)
    for rank, steps in enumerate(plans):
        for number in range(len(steps.steps)):
            keys = brought(division, plans, rank, number)
            for launch in steps.steps[number].launches:
                assert not dense or len(launch.q_lengths) == 1
                count_pairs(counted, launch, division.indices(rank), keys)
    assert np.array_equal(counted, visible.astype(np.int64))


def brought(division: Division, plans: list[Plan], rank: int, number: int) -> np.ndarray:
    """Global rows of the keys that step `number` of `rank` reads, from what the peers send."""
    own = division.indices(rank)
    if number == 0:
        return own
    step = plans[rank].steps[number]
    parts = [taken(own, step.own)]
    for peer, count in step.receives:
        (sent,) = [rows for to, rows in plans[peer].steps[number].sends if to == rank]
        assert len(sent) == count > 0
        parts.append(taken(division.indices(peer), sent))
    for peer in {p for other in range(division.world) for p in [other] if other != rank}:
        sends = [to for to, _ in plans[peer].steps[number].sends]
        assert sends.count(rank) == [p for p, _ in step.receives].count(peer)
    return np.concatenate(parts)


def taken(array: np.ndarray, rows) -> np.ndarray:  # type: ignore[no-untyped-def]
    return array[rows.start : rows.stop] if rows.index is None else array[rows.index]


def count_pairs(counted: np.ndarray, launch: Launch, queries: np.ndarray, keys: np.ndarray) -> None:
    q_rows, k_rows = taken(queries, launch.q), taken(keys, launch.k)
    assert len(q_rows) == sum(launch.q_lengths) and len(k_rows) == sum(launch.k_lengths)
    assert len(set(k_rows.tolist())) == len(k_rows), "gradients of a key twice in one launch"
    right = 0 if launch.causal else launch.window[1]
    q_start = k_start = scores = 0
    for n_q, n_k in zip(launch.q_lengths, launch.k_lengths, strict=True):
        i = np.arange(n_q)[:, None] + n_k - n_q
        j = np.arange(n_k)[None, :]
        seen = np.ones((n_q, n_k), dtype=bool)
        seen &= (j <= i + right) | (right < 0)
        seen &= (j >= i - launch.window[0]) | (launch.window[0] < 0)
        block = np.ix_(q_rows[q_start : q_start + n_q], k_rows[k_start : k_start + n_k])
        counted[block] += seen
        scores += int(seen.sum())
        q_start, k_start = q_start + n_q, k_start + n_k
    assert launch.scores == scores


@pytest.mark.parametrize("world", [2, 8, 64])
def test_zigzag_gives_every_rank_the_same_work_in_every_step(world: int) -> None:
    division = Division.of([world * 512], world, "zigzag", None)
    plans = [plan(division, rank, True, (-1, -1), True) for rank in range(world)]
    for number in range(world):
        work = {sum(x.scores for x in p.steps[number].launches) for p in plans}
        assert len(work) == 1, f"step {number}: {work}"


def test_keys_that_no_query_sees_stay_where_they_are() -> None:
    """Causal: of ranks that come earlier only the first chunk is sent, half of the rows. With a
    window, ranks that hold nothing visible send nothing.
    """
    division = Division.of([8 * 512], 8, "zigzag", None)
    steps = plan(division, 5, True, (-1, -1), True).steps[1:]
    received = {peer: count for step in steps for peer, count in step.receives}
    assert received == {peer: 256 if peer < 5 else 512 for peer in range(8) if peer != 5}
    division = Division.of([8 * 512], 8, "contiguous", None)
    assert plan(division, 0, True, (-1, -1), True).steps[1].receives == ()
    windowed = plan(division, 5, True, (100, 0), True).steps
    assert windowed[1].receives == ((4, 100),) and windowed[1].sends[0][0] == 6
    assert len(windowed) == 2


@pytest.mark.parametrize("world", [2, 4, 8, 32])
def test_documents_are_dealt_out_evenly(world: int) -> None:
    """Long-tailed lengths; work counts as tokens squared."""
    draw = random.Random(SEEDS.random())
    lengths = [int(128 * 256 ** (draw.random() ** 3)) for _ in range(40 * world)]
    division = Division.of(lengths, world, "zigzag", 256)
    assert sum(division.tokens(r) for r in range(world)) == sum(lengths)
    work = [0.0] * world
    for document, ranks in enumerate(division.ranks):
        for rank in ranks:
            work[rank] += lengths[document] ** 2 / len(ranks)
    assert max(work) * world / sum(work) <= 1.15
    assert max(map(division.tokens, range(world))) * world / sum(lengths) <= 1.15
    for document, ranks in enumerate(division.ranks):
        assert len(ranks) == 1 or lengths[document] >= 256 * len(ranks)


def test_documents_stay_whole_where_that_is_even() -> None:
    division = Division.of([4096] * 16, 8, "zigzag", 256)
    assert all(len(ranks) == 1 for ranks in division.ranks)
    assert {division.tokens(rank) for rank in range(8)} == {8192}


def test_a_rank_without_a_token_of_a_document_has_no_part_in_it() -> None:
    division = Division.of([600, 600, 600], 4, "zigzag", 256)
    for rank in range(4):
        held = {share.document for share in division.shares[rank]}
        for step in plan(division, rank, True, (-1, -1), False).steps:
            for launch in step.launches:
                assert len(launch.q_lengths) <= len(held)
            for peer, _ in (*step.receives, *step.sends):
                assert held & {share.document for share in division.shares[peer]}


def test_one_long_document_is_divided_among_all_ranks_and_the_others_are_not() -> None:
    division = Division.of([1 << 17, *[512] * 64], 8, "zigzag", 256)
    assert division.ranks[0] == tuple(range(8))
    assert all(len(ranks) == 1 for ranks in division.ranks[1:])


def test_documents_are_divided_among_neighbours() -> None:
    """Two of half of the work each: no rank has to do with both."""
    division = Division.of([1 << 16, 1 << 16], 8, "zigzag", 256)
    assert sorted(division.ranks) == [(0, 1, 2, 3), (4, 5, 6, 7)]


@pytest.mark.parametrize(
    ("n_q", "n_k", "right", "left"),
    [(5, 5, 0, -1), (3, 8, 0, -1), (8, 3, 0, -1), (6, 6, 1, 2), (4, 4, -1, -1), (7, 5, -1, 1)],
)
def test_visible_scores(n_q: int, n_k: int, right: int, left: int) -> None:
    counted = sum(
        (right < 0 or j <= i + n_k - n_q + right) and (left < 0 or j >= i + n_k - n_q - left)
        for i in range(n_q)
        for j in range(n_k)
    )
    assert visible_scores(n_q, n_k, right, left) == counted
