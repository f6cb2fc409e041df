"""Attention divided among gloo processes equals attention in one, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import context_parallel_cases as cases
import pytest
import torch
from context_parallel_cases import CASES, Case
from ranks import Ranks


def seed() -> int:
    return int(torch.randint(1 << 30, ()))


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_ring_equals_one_process(ranks: Ranks, name: str, world: int) -> None:
    ranks.run(world, cases.compare_exactly, CASES[name], seed())


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_all_to_all_equals_one_process(ranks: Ranks, name: str, world: int) -> None:
    """12 query heads for 2 to 4 ranks; 1 and 12 heads of k and v: shared by ranks, or divided."""
    case = replace(CASES[name], method="all_to_all", heads=(12, 1, 12))
    ranks.run(world, cases.compare_exactly, case, seed())


@pytest.mark.parametrize("name", ["dense-ragged-batch", "packed", "packed-window"])
def test_one_rank_is_a_group_too(ranks: Ranks, name: str) -> None:
    ranks.run(1, cases.compare_exactly, CASES[name], seed())


@pytest.mark.parametrize("name", ["dense-ragged-batch", "packed-sinks-softcap", "dense-window"])
def test_own_keys_in_two_parts_by_heads(ranks: Ranks, name: str) -> None:
    """As on a GPU where they have enough rows; see SPLIT_FROM in ring.py."""
    case = replace(CASES[name], heads=(12, 6, 3))
    ranks.run(3, cases.compare_in_two_parts, case, seed())


@pytest.mark.parametrize("method", ["ring", "all_to_all"])
@pytest.mark.parametrize("name", ["dense-sinks", "packed", "packed-window"])
def test_bf16_stays_within_the_rounding_of_one_process(
    ranks: Ranks, name: str, method: str
) -> None:
    """Four ranks: results of several steps are added up."""
    case = replace(CASES[name], heads=(8, 4, 4), head_dims=(16, 24), method=method)
    ranks.run(4, cases.compare_rounded, case, seed(), "cpu")


@pytest.mark.sim
@pytest.mark.parametrize("name", ["dense-ragged-batch", "packed-sinks-softcap", "packed-window"])
def test_kernels_in_the_simulator(ranks: Ranks, name: str) -> None:
    """The same calls that a GPU gets: strides, row selections, merged out and softmax_lse."""
    case = replace(CASES[name], head_dims=(16, 24), deterministic=True)
    ranks.run(2, cases.compare_simulated, case, seed())


def test_gathering_undoes_sharding(ranks: Ranks) -> None:
    for name in ("dense-ragged-batch", "packed", "packed-contiguous", "dense-no-token"):
        ranks.run(3, cases.check_gathering, CASES[name], seed())


def test_positions_and_indices_of_local_rows(ranks: Ranks) -> None:
    ranks.run(3, cases.check_positions, Case(lengths=(5, 12, 1, 9)))
