"""CTAs that wait for each other through global memory, on the simulator and on the GPU."""

from __future__ import annotations

import hopper_probes
import probes
import pytest
import torch
from conftest import Runner
from hopper_probes import hopper
from torch import Tensor

from flash_attn_interface._common.sim import launcher
from flash_attn_interface._common.sim.launcher import SimulatorError

__all__ = ["hopper"]

SIM = Runner("sim", torch.device("cpu"))
THREADS = 64
ROUND, FROM_THE_FIRST, NOBODY_FIRST, BLIND = range(0, 12, 3)
"""Variants of probe_global_wait."""


def take_turns(runner: Runner, grid: int, which: int) -> Tensor:
    out = torch.zeros(grid, THREADS, dtype=torch.int32, device=runner.device)
    counters = torch.zeros(grid, dtype=torch.int32, device=runner.device)
    probes.run(
        runner, "probe_global_wait", counters, out, counters,
        grid=grid, which=which, num_threads=THREADS,
    )  # fmt: skip
    assert counters.tolist() == [grid] * grid
    return out.cpu()


def expected_turns(grid: int, rotated: bool) -> Tensor:
    out = torch.zeros(grid, THREADS, dtype=torch.int32)
    for tile in range(grid):
        for turn in range(grid):
            out[tile] = (
                3 * out[tile] + (tile - turn) % grid + 1 if rotated else 3 * out[tile] + turn + 1
            )
    return out


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("release", [0, 1, 2], ids=["red", "st", "fence"])
@pytest.mark.parametrize("variant", [ROUND, FROM_THE_FIRST], ids=["round", "in-order"])
def test_ctas_take_turns(runner: Runner, variant: int, release: int, seed: int) -> None:
    with launcher.checks(seed=seed):
        out = take_turns(runner, 16, variant + release)
    assert torch.equal(out, expected_turns(16, variant == ROUND))


@pytest.mark.sim
@pytest.mark.parametrize("threads", ["1", "4"])
def test_they_do_on_any_number_of_os_threads(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_INTERFACE_SIM_THREADS", threads)
    for _ in range(3):
        assert torch.equal(take_turns(SIM, 40, ROUND), expected_turns(40, True))


@pytest.mark.sim
def test_who_waits_for_earlier_ctas_only_needs_no_others_beside_it() -> None:
    with launcher.checks(resident_ctas=1):
        assert torch.equal(take_turns(SIM, 5, FROM_THE_FIRST), expected_turns(5, False))


@pytest.mark.sim
def test_a_wait_for_a_cta_that_finds_no_room_is_a_deadlock() -> None:
    deadlock = (
        r"deadlock: all CTAs .* wait for each other, and 2 that have not find no room \(3 at a"
    )
    with launcher.checks(resident_ctas=3), pytest.raises(SimulatorError, match=deadlock):
        take_turns(SIM, 5, ROUND)


@pytest.mark.sim
@pytest.mark.parametrize("seed", [0, 1])
def test_a_deadlock_names_what_each_cta_waits_for(seed: int) -> None:
    with launcher.checks(seed=seed), pytest.raises(SimulatorError) as caught:
        take_turns(SIM, 3, NOBODY_FIRST)
    message = str(caught.value)
    assert "deadlock: all CTAs that have started wait for each other\n" in message
    for cta in range(3):
        assert f" CTA {cta}\n" in message
        assert (
            f"lane 0 waits for the 4 bytes at {4 * cta} of tensor 0, which hold 0, to change, "
            "common/device/global_wait.cuh:" in message
        )
    assert message.count("waits in cta_sync at barrier 0 (1 of 2 warps have arrived)") == 3
    assert "tensor 0: shape (3,)" in message


@pytest.mark.sim
def test_sleeping_without_having_looked_is_a_mistake() -> None:
    with pytest.raises(SimulatorError, match=r"nanosleep\(\) without an acquiring load"):
        take_turns(SIM, 1, BLIND)


def ordered_adds(runner: Runner, which: int, cluster_size: int = 1) -> tuple[Tensor, Tensor]:
    """What the additions give, and what they give in the order of the counters."""
    grid, row = 24, 64
    data = torch.randn(grid, row) * 10.0 ** torch.randint(-3, 4, (grid, row))
    expected = torch.randn(grid, row)
    out = torch.cat([expected.flatten(), torch.zeros(grid)]).to(runner.device)
    hopper_probes.run(
        runner, "probe_ordered_adds", {}, data.to(runner.device), out,
        grid=grid, which=which, num_threads=32, smem_bytes=4 * row, row=row,
        cluster_size=cluster_size,
    )  # fmt: skip
    for turn in range(grid):
        expected += data[(torch.arange(grid) - turn) % grid]
    return out[: grid * row].cpu().view(grid, row), expected


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("cluster_size", [1, 2])
def test_bulk_additions_in_a_fixed_order_are_bitwise(
    hopper: Runner, cluster_size: int, seed: int
) -> None:
    with launcher.checks(seed=seed):
        out, expected = ordered_adds(hopper, 0, cluster_size)
    assert torch.equal(out, expected)


@pytest.mark.sim
def test_an_addition_counted_when_its_source_is_read_comes_too_early() -> None:
    out, expected = ordered_adds(SIM, 1)
    assert not torch.equal(out, expected)
    assert torch.allclose(out, expected, rtol=1e-3, atol=1e-1)


def ordered_reds(runner: Runner, which: int) -> tuple[Tensor, Tensor]:
    """As ordered_adds, of registers; row t of both gets those of CTA 0, 1, ..."""
    grid = 12
    data = torch.randn(grid, 64) * 10.0 ** torch.randint(-3, 4, (grid, 64))
    expected = torch.randn(grid, 64)
    out = torch.cat([expected.flatten(), torch.zeros(grid)]).to(runner.device)
    probes.run(
        runner, "probe_ordered_reds", data.to(runner.device), out,
        grid=grid, which=which, num_threads=64,
    )  # fmt: skip
    for cta in range(grid):
        expected += data[cta]
    return out[: grid * 64].cpu().view(grid, 64), expected


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("which", [0, 1], ids=["release", "fence"])
def test_additions_in_a_fixed_order_are_bitwise(runner: Runner, which: int, seed: int) -> None:
    with launcher.checks(seed=seed, ordered_adds=True):
        out, expected = ordered_reds(runner, which)
    assert torch.equal(out, expected)


UNORDERED = {"no-release": 2, "early-count": 3, "unseen-look": 4, "no-wait": 5, "early-turn": 6}


@pytest.mark.sim
@pytest.mark.parametrize("resident_ctas", [1, 132])
@pytest.mark.parametrize("which", UNORDERED.values(), ids=UNORDERED)
def test_additions_that_nothing_orders_are_found(which: int, resident_ctas: int) -> None:
    """Whether or not this run has them in that order, as with one CTA at a time."""
    unordered = (
        r"this addition is not ordered after the addition by CTA \d+, warp \d, lane \d+ at "
        r"tests/kernels/probe_ordered_reds\.cu:\d+"
    )
    with (
        launcher.checks(resident_ctas=resident_ctas, ordered_adds=True),
        pytest.raises(SimulatorError, match=unordered),
    ):
        ordered_reds(SIM, which)


@pytest.mark.sim
def test_the_order_of_additions_is_looked_at_on_request_only() -> None:
    out, expected = ordered_reds(SIM, UNORDERED["no-release"])
    assert torch.equal(out, expected)
    with pytest.raises(ValueError, match="needs racecheck=True"):
        with launcher.checks(racecheck=False, ordered_adds=True):
            pass
