"""Context parallelism on two GPUs and more, over NCCL. CPU tests have all the cases; these have the
kernels, streams and sizes that only GPUs have.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import context_parallel_cases as cases
import context_parallel_jobs as jobs
import pytest
import torch
from context_parallel_cases import CASES, Case
from ranks import Ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

DIMS = {"heads": (8, 4, 2), "head_dims": (64, 128)}
LENGTHS = (700, 3, 1, 1300, 64, 0, 129, 33, 260)
LARGE = {
    "dense": Case(2048, **DIMS),
    "dense-full": Case(1500, causal=False, **DIMS),
    "dense-ragged-batch": Case(1031, batch=2, **DIMS),
    "dense-contiguous": Case(1031, batch=2, scheme="contiguous", **DIMS),
    "dense-sinks-softcap": Case(1500, sinks=True, softcap=15.0, **DIMS),
    "dense-window": Case(2048, window=(200, 0), **DIMS),
    "dense-192-128": Case(1024, heads=(4, 4, 4), head_dims=(192, 128)),
    "packed": Case(lengths=LENGTHS, min_tokens=128, **DIMS),
    "packed-tiny-parts": Case(lengths=LENGTHS, min_tokens=1, **DIMS),
    "packed-window": Case(lengths=LENGTHS, window=(100, 0), min_tokens=64, **DIMS),
    "packed-window-both": Case(
        lengths=LENGTHS, window=(70, 20), causal=False, min_tokens=64, **DIMS
    ),
    "packed-sinks": Case(lengths=LENGTHS, sinks=True, min_tokens=64, **DIMS),
}


@pytest.fixture(scope="module")
def gpus() -> Iterator[Ranks]:
    started = Ranks(min(8, torch.cuda.device_count()), "nccl")
    yield started
    started.close()


def seed() -> int:
    return int(torch.randint(1 << 30, ()))


def worlds() -> list[int]:
    return [n for n in (2, 3, 4, 8) if n <= torch.cuda.device_count()] or [2]


@pytest.mark.parametrize("world", worlds())
@pytest.mark.parametrize("name", LARGE)
def test_ring_is_as_exact_as_one_gpu(gpus: Ranks, name: str, world: int) -> None:
    gpus.run(world, cases.compare_rounded, LARGE[name], seed(), "cuda")


@pytest.mark.parametrize("world", worlds())
@pytest.mark.parametrize("name", LARGE)
def test_all_to_all_is_as_exact_as_one_gpu(gpus: Ranks, name: str, world: int) -> None:
    case = replace(LARGE[name], heads=(24, 1, 24), head_dims=(64, 96), method="all_to_all")
    gpus.run(world, cases.compare_rounded, case, seed(), "cuda")


@pytest.mark.parametrize("name", [n for n in CASES if "no-token" not in n])
def test_small_cases(gpus: Ranks, name: str) -> None:
    """Lengths below the number of ranks, empty documents, one token."""
    case = replace(CASES[name], head_dims=(16, 24))
    gpus.run(2, cases.compare_rounded, case, seed(), "cuda")


@pytest.mark.parametrize("name", ["dense", "packed", "dense-window"])
def test_own_keys_in_two_parts_by_heads(gpus: Ranks, name: str) -> None:
    gpus.run(2, cases.compare_rounded_in_two_parts, LARGE[name], seed(), "cuda")


@pytest.mark.parametrize("method", ["ring", "all_to_all"])
@pytest.mark.parametrize("name", ["dense", "packed", "packed-window"])
def test_deterministic_calls_in_a_row_give_the_same_bits(
    gpus: Ranks, name: str, method: str
) -> None:
    """Without a synchronisation in between, on a stream of the caller's, beside other layouts:
    a buffer that is used again too early would show.
    """
    case = replace(LARGE[name], heads=(8, 4, 4), deterministic=True, method=method)
    gpus.run(worlds()[-1] if method == "ring" else 2, cases.repeat_bits, case, seed(), 30)


@pytest.mark.parametrize(("name", "value"), [("causal", False), ("window_size", (3, 0))])
def test_options_that_differ_are_an_error_on_every_rank(
    gpus: Ranks, name: str, value: object
) -> None:
    for error, afterwards in gpus.run(2, jobs.disagree_on_gpus, 1, name, value):
        assert error.startswith("ValueError: ranks of the group disagree"), error
        assert name in error and not afterwards


def test_cpu_tensors_in_a_group_of_nccl_are_an_error_on_every_rank(gpus: Ranks) -> None:
    for error in gpus.run(2, jobs.refused_alike, (4, 2, 2), {}):
        assert error.startswith("ValueError: q is on cpu, but the group's backends are"), error
