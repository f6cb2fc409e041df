"""Parts of the benchmarks that need no GPU: what they count, check and keep going through."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import cold_start
import context_parallel_rows
import features
import harness
import simulate_context_parallel
from features import Inputs, Oracle, Problem
from harness import Contestant, Timing
from simulate_context_parallel import Machine

SMALL = Problem(16, 24, (4, 2, 2), (50, 50))
VARIANTS = {
    "plain": SMALL,
    "causal": replace(SMALL, causal=True),
    "window": replace(SMALL, window=(7, 3)),
    "left window": replace(SMALL, window=(7, 0)),
    "softcap": replace(SMALL, softcap=2.0, num_heads=(4, 1, 2)),
    "alibi": replace(SMALL, alibi=True),
    "dropout": replace(SMALL, dropout_p=0.3),
    "packed": replace(SMALL, lengths=(5, 70, 33), packed=True, causal=True),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_visible_scores_are_counted(name: str) -> None:
    problem = VARIANTS[name]
    left, right = problem.window[0], 0 if problem.causal else problem.window[1]
    counted = sum(
        (left < 0 or j >= i - left) and (right < 0 or j <= i + right)
        for n in problem.lengths
        for i in range(n)
        for j in range(n)
    )
    assert problem.visible == counted


@pytest.mark.parametrize("name", VARIANTS)
def test_the_features_oracle_agrees_with_the_reference(name: str) -> None:
    """The public functions on CPU tensors; a wrong element is noticed."""
    problem = VARIANTS[name]
    x = draw_on_cpu(problem)
    oracle = Oracle(problem, x)
    torch.manual_seed(features.SEED)
    with torch.no_grad():
        out = features.make_ours(problem, x).call()
    assert oracle.check(out).good
    b, head, rows = oracle.samples[-1]
    oracle._sequence(out, b)[rows[-1], head] += 0.5
    assert not oracle.check(out).good


def draw_on_cpu(problem: Problem) -> Inputs:
    real = torch.randn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", lambda *shape, device, dtype: real(*shape).to(dtype))
        return features.draw(problem, torch.bfloat16)


def test_packed_sequences_stand_beside_as_many_flops() -> None:
    packed = features.plain(128, 128, lengths=features.long_tailed_lengths(), packed=True)
    dense = features.dense_like(packed)
    assert min(packed.lengths) == 128 and max(packed.lengths) == 8192 and len(packed.lengths) == 64
    assert dense.flops == pytest.approx(packed.flops, rel=0.05)
    assert sum(dense.lengths) == pytest.approx(sum(packed.lengths), rel=0.05)


@pytest.mark.parametrize(
    ("pair", "named"),
    [((80, 80), (128, 128)), ((112, 48), (128, 128)), ((160, 224), (256, 256)),
     ((40, 72), (64, 128)), ((24, 40), (32, 64))],
)  # fmt: skip
def test_the_next_named_pair(pair: tuple[int, int], named: tuple[int, int]) -> None:
    assert features.next_named_pair(*pair) == named


def test_a_peer_that_fails_late_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(contestants: list[Contestant], rounds: int, burst_us: float) -> dict[str, Timing]:
        return {c.name: (c.call(), Timing(1.0, 1.0, 1.0, 3))[1] for c in contestants}

    def broken() -> torch.Tensor:
        raise RuntimeError("CUDA error: of the peer\nand a page more")

    monkeypatch.setattr(harness, "measure", measure)
    good = Contestant("ours", lambda: torch.zeros(1))
    timings, notes = harness.measure_guarded([good, Contestant("peer", broken)], 3, 1.0)
    assert set(timings) == {"ours"} and notes == {"peer": "RuntimeError: CUDA error: of the peer"}
    assert harness.measure_guarded([]) == ({}, {})


def test_stages_of_a_cold_start_count_their_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(cold_start, "_clock", lambda: now[0])
    stages = cold_start.Stages()

    def takes(seconds: float, *inner: object) -> None:
        now[0] += seconds
        for call in inner:
            call()  # type: ignore[operator]

    load = stages.timed("load", lambda: takes(2.0))
    fetch = stages.timed("fetch", lambda: takes(3.0, load))
    stages.timed("other", lambda: takes(10.0, fetch, load))()
    assert stages.seconds == {"load": 4.0, "fetch": 3.0, "other": 10.0}


def test_the_simulation_recovers_what_was_measured() -> None:
    machine = Machine(forward_flops=6e14, forward_half=300.0, link_bytes_per_second=2e11)
    rates = [
        {
            "seqlen": float(n),
            "forward_tflops": machine.forward_flops * n / 2 / (n / 2 + machine.forward_half) / 1e12,
            "backward_tflops": machine.backward_flops / (1 + 2 * machine.backward_half / n) / 1e12,
        }
        for n in (2048, 8192, 32768)
    ]
    links = [{"bytes": float(n), "seconds": machine.transfer(n, False)} for n in (1 << 20, 1 << 26)]
    found = Machine.measured({"one_gpu": rates, "link": links})
    for name, value in vars(machine).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("world", [2, 8])
def test_the_simulation_predicts_every_row_of_the_benchmark(world: int) -> None:
    """Efficiencies are below 1, longer sequences and zigzag are better; without costs it is 1."""
    free = Machine(
        forward_half=0.0, backward_half=0.0, launch_seconds=0.0, memory_bytes_per_second=1e30,
        link_bytes_per_second=1e30, link_seconds=0.0,
    )  # fmt: skip
    efficiency = simulate_context_parallel.efficiency
    for row in context_parallel_rows.rows_for(world):
        zigzag = efficiency(Machine(), row, world, "zigzag")
        contiguous = efficiency(Machine(), row, world, "contiguous")
        assert zigzag is not None and contiguous is not None
        assert 0.5 < zigzag <= 1.001 and contiguous <= zigzag + 1e-9, row.name
        ideal = efficiency(free, row, world, "zigzag")
        assert ideal == pytest.approx(1.0, abs=0.1 if row.packed else 1e-3), row.name
    short, long = (
        efficiency(
            Machine(), context_parallel_rows.Row("", (n,), (16, 16), (128, 128)), 8, "zigzag"
        )
        for n in (1 << 16, 1 << 18)
    )
    assert short is not None and long is not None and short < long


def test_documents_of_the_context_parallel_benchmark_are_long_tailed() -> None:
    lengths = context_parallel_rows.long_tailed(1 << 18)
    assert sum(lengths) == 1 << 18 and all(n % 128 == 0 for n in lengths)
    assert min(lengths) < 512 and max(lengths) > 16384
