"""The simulator finds mistakes with mbarriers, TMA and wgmma and names their place."""

from __future__ import annotations

import re
from pathlib import Path

import hopper_probes
import pytest
import torch
from conftest import Runner
from torch import Tensor

from flash_attn_interface._common.params import TENSOR_MAP_BYTES
from flash_attn_interface._common.sim import launcher
from flash_attn_interface._common.sim.launcher import SimulatorError

pytestmark = pytest.mark.sim

SOURCE = Path(__file__).parents[1] / "kernels" / "probe_hopper_misuse.cu"
LINES = [
    (int(which), number)
    for number, line in enumerate(SOURCE.read_text(encoding="utf-8").splitlines(), 1)
    for which in re.findall(r"BAD (\d+)", line)
]
SIM = Runner("sim", torch.device("cpu"))
TILE_BYTES = 64 * 128


def misuse(which: int) -> tuple[Tensor, Tensor]:
    """Runs the kernel's case `which`; returns what map_b stores to, and out."""
    source, target = (torch.randn(128, 64).to(torch.bfloat16)[32:96] for _ in range(2))
    larger = torch.as_strided(source, (80, 64), (64, 1))
    out = torch.zeros(256)
    maps = {
        "map_a": hopper_probes.encode(SIM, source, (64, 64), 128),
        "map_b": hopper_probes.encode(SIM, target, (64, 64), 128),
        "map_c": hopper_probes.encode(SIM, larger, (64, 80), 128),
        "map_d": bytes(TENSOR_MAP_BYTES),
        "map_e": hopper_probes.encode(SIM, target[:, :60], (64, 64), 128),
    }
    hopper_probes.run(
        SIM, "probe_hopper_misuse", maps, None, out, (source, target),
        which=which, num_threads=256, smem_bytes=2 * TILE_BYTES + 64,
    )  # fmt: skip
    return target, out


RACE = r"this {} is not ordered after the {}"
ANY = r"(read|write|TMA load|TMA store|wgmma)"
MISTAKES = {
    0: r"mbarrier_arrive on smem_base\(\) \+ \d+, where no mbarrier was initialised",
    1: r"mbarrier_init with count = 0",
    2: r"is initialised twice",
    3: r"is not ordered after its mbarrier_init by thread 0|where no mbarrier was initialised",
    5: r"mbarrier_try_wait_parity with parity = 2",
    6: RACE.format("read", "mbarrier_init of the barrier that lives there by thread 0"),
    7: RACE.format("write", "mbarrier_init of the barrier that lives there by thread 0"),
    8: r"gets more than its 1 arrivals in a phase that still waits for 16 bytes",
    11: r"completes phase 1 before this thread has seen the end of phase 0|deadlock",
    12: RACE.format("(read|write)", "(write|read) by thread"),
    14: r"shared memory write by stmatrix of 16 bytes misaligned",
    15: RACE.format("read", "write by thread"),
    20: r"TMA load on an mbarrier whose thread has not called fence_mbarrier_init",
    21: r"shared memory write by a TMA load of 8192 bytes misaligned",
    22: r"shared memory write by a TMA load of 8192 bytes out of bounds",
    23: r"global read by a TMA load of 16 bytes out of bounds",
    24: r"of 5 dims with a tensor map of 4",
    25: r"the tensor map was not encoded for the simulator",
    26: RACE.format("read", "TMA load not yet waited for"),
    28: RACE.format("read", "TMA load not yet waited for"),
    30: RACE.format(ANY, ANY),
    32: r"the last thread returns from the kernel while this TMA load is in flight",
    33: RACE.format("TMA load", r"write, without fence_proxy_async_shared\(\)"),
    40: RACE.format("TMA store", r"write, without fence_proxy_async_shared\(\)"),
    43: RACE.format("(TMA store|write)", "(write|TMA store not yet waited for) by thread"),
    44: RACE.format("write", "TMA store not yet waited for by thread 0"),
    46: r"returns from the kernel without waiting for its TMA store",
    47: RACE.format("write", "TMA store not yet waited for by thread 0"),
    48: r"global write by a TMA store of 16 bytes out of bounds",
    50: r"TMA store at -8 in dim 1: only boxes to load may begin before the tensor",
    51: r"TMA store to rows of 120 bytes: it writes whole units of 16",
    61: RACE.format("wgmma", r"write, without fence_proxy_async_shared\(\)"),
    62: RACE.format("wgmma", "TMA load not yet waited for"),
    63: r"descriptor of A begins at byte 112 of an atom",
    64: r"threads of a warpgroup disagree on the operands",
    65: r"threads of a warpgroup disagree on the operands",
    66: r"this warp returns from the kernel, others of its warpgroup went on to wgmma_wait_group",
    67: r"wgmma without a wgmma_fence\(\)",
    68: r"element 1 of this wgmma's accumulator was written before its wgmma_wait_group",
    69: r"wgmma_hold on an accumulator in flight",
    70: r"this warp returns from the kernel while its wgmma is in flight",
    71: r"must execute the same operations: this one is at wgmma_\w+, another was at wgmma_\w+",
    72: RACE.format("(write|wgmma)", "(wgmma not yet waited for|write|read) by thread"),
    74: r"wgmma without a wgmma_fence\(\)",
    80: r"bulk_load of 24 bytes: a bulk copy moves whole units of 16",
    81: r"bulk_load misaligned in global memory",
    82: r"global bulk_load of 512 bytes out of bounds.* passed by 256 bytes",
    83: r"shared memory bulk_load of 64 bytes misaligned",
    84: RACE.format("read", "TMA load not yet waited for"),
    86: r"bulk_load on an mbarrier whose thread has not called fence_mbarrier_init",
    87: r"bulk_reduce_add_f32 of 0 bytes: a bulk copy moves whole units of 16",
    88: r"bulk_reduce_add_f32 misaligned in global memory",
    89: r"global bulk_reduce_add_f32 of 512 bytes out of bounds.* passed by 256 bytes",
    90: r"shared memory bulk_reduce_add_f32 of 8192 bytes out of bounds",
    91: RACE.format("TMA store", r"write, without fence_proxy_async_shared\(\)"),
    93: RACE.format("write", "TMA store not yet waited for by thread 0"),
    95: r"returns from the kernel without waiting for its TMA store",
}  # fmt: skip
DEADLOCKS = {
    9: r"warp 2: lane 0 wait for phase 0 \(parity 0\) of the mbarrier at smem_base\(\) \+ 16384: "
    r"1 of 1 arrivals and 0 bytes are missing",
    10: r"0 of 1 arrivals and 100 bytes are missing",
    29: r"0 of 1 arrivals and -4096 bytes are missing",
}
RIGHT = [4, 13, 16, 27, 31, 34, 41, 42, 45, 49, 60, 73, 85, 92, 94]
# Errors in two helpers of the kernel, which other cases call too.
ELSEWHERE = {20, 32, 46}


def test_every_marked_mistake_is_tested() -> None:
    assert {which for which, _ in LINES} == (set(MISTAKES) | set(DEADLOCKS)) - ELSEWHERE


@pytest.mark.parametrize("which", MISTAKES)
def test_mistake_is_found_and_placed(which: int) -> None:
    with pytest.raises(SimulatorError, match=MISTAKES[which]) as caught:
        misuse(which)
    message = str(caught.value)
    if "deadlock" in message:
        return
    place = re.search(r"at tests/kernels/probe_hopper_misuse\.cu:(\d+) in ", message)
    assert place, message
    assert which in ELSEWHERE or (which, int(place.group(1))) in LINES, message


@pytest.mark.parametrize("which", DEADLOCKS)
def test_waiting_forever_is_a_deadlock_that_names_the_waits(which: int) -> None:
    with pytest.raises(SimulatorError, match=DEADLOCKS[which]) as caught:
        misuse(which)
    message = str(caught.value)
    assert "deadlock: no thread can run" in message
    places = re.findall(r"probe_hopper_misuse\.cu:(\d+)", message)
    assert {(which, int(place)) for place in places} & set(LINES), message


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("which", RIGHT)
def test_right_order_passes(which: int, seed: int) -> None:
    with launcher.checks(seed=seed):
        target, out = misuse(which)
    if which in (41, 42, 45, 49):
        assert (target == 1).all()
    assert not out.isnan().any()


@pytest.mark.parametrize("which", [3, 12, 26, 28, 30, 33, 40, 43, 44, 61, 62, 68, 72, 84, 91, 93])
def test_mistakes_are_found_in_any_schedule(which: int) -> None:
    for seed in range(1, 7):
        with launcher.checks(seed=seed), pytest.raises(SimulatorError, match=MISTAKES[which]):
            misuse(which)


def test_a_store_reads_its_source_when_it_is_waited_for() -> None:
    """Also where nobody looks for races, a source overwritten early shows in what lands."""
    with launcher.checks(racecheck=False):
        assert (misuse(44)[0].flatten()[:2] == 0).all()
        assert (misuse(45)[0] == 1).all()


@pytest.mark.parametrize("seed", range(3))
def test_bulk_additions_are_in_memory_once_they_are_waited_for(seed: int) -> None:
    """Not when their sources have been read: a release in between comes too early."""
    with launcher.checks(seed=seed):
        _, out = misuse(94)
    sums, after_reading, after_completion = out.split([64, 64, 128])
    assert (sums == 1).all()
    assert (after_reading == 0).all()
    assert (after_completion[:64] == 1).all()


# What a launch does that need not wait for the one before it to end.
EARLY_MISTAKES = {
    1: r"global read is not ordered after a griddepcontrol_wait\(\), and an earlier launch writes",
    2: r"global write is not ordered after a griddepcontrol_wait\(\), and an earlier launch writes",
    3: r"no thread of a programmatic launch called griddepcontrol_wait\(\)",
    4: r"global read is not ordered after a griddepcontrol_wait\(\), and an earlier launch writes",
}


def launch_after_another(which: int, programmatic: bool) -> None:
    a, b, c = torch.zeros(3, 2 * 64, dtype=torch.int32)
    for data, out, mistake, early in ((a, b, 0, False), (b, c, which, programmatic)):
        hopper_probes.run(
            SIM, "probe_griddepcontrol", {}, data, out,
            grid=2, which=mistake, num_threads=64, programmatic=early,
        )  # fmt: skip


@pytest.mark.parametrize("which", EARLY_MISTAKES)
def test_what_comes_before_a_grid_wait_is_found(which: int) -> None:
    with pytest.raises(SimulatorError, match=EARLY_MISTAKES[which]) as caught:
        launch_after_another(which, programmatic=True)
    place = re.search(r"at (tests/kernels/\w+\.cu):(\d+) in ", str(caught.value))
    if which != 3:
        assert place
        lines = (SOURCE.parent.parent.parent / place.group(1)).read_text("utf-8").splitlines()
        assert f"BAD {which}:" in lines[int(place.group(2)) - 1]
    launch_after_another(which, programmatic=False)  # an ordinary launch may


def test_a_programmatic_launch_may_overlap_all_since_the_last_ordinary_one() -> None:
    a, b, c, d = torch.zeros(4, 64, dtype=torch.int32)
    for data, out, early in ((a, b, False), (c, d, True)):
        hopper_probes.run(
            SIM, "probe_griddepcontrol", {}, data, out, num_threads=64, programmatic=early
        )
    with pytest.raises(SimulatorError, match=EARLY_MISTAKES[1]):
        hopper_probes.run(
            SIM, "probe_griddepcontrol", {}, b, c, which=1, num_threads=64, programmatic=True
        )
