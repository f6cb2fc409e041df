"""The simulator finds each mistake and names its place; what is right passes."""

from __future__ import annotations

import re
from pathlib import Path

import probes
import pytest
import torch
from conftest import Runner
from torch import Tensor

from flash_attn_interface._common.runtime import spec as spec_module
from flash_attn_interface._common.sim import build, launcher
from flash_attn_interface._common.sim.launcher import SimKernel, SimulatorError

pytestmark = pytest.mark.sim

SOURCE = Path(__file__).parents[1] / "kernels" / "probe_misuse.cu"
MARKED = re.compile(r"// BAD (\d+)")
LINES = [
    (int(match.group(1)), number)
    for number, line in enumerate(SOURCE.read_text(encoding="utf-8").splitlines(), 1)
    if (match := MARKED.search(line))
]
SIM = Runner("sim", torch.device("cpu"))


def misuse(which: int, *, aux: Tensor | None = None, grid: int = 1, threads: int = 64) -> Tensor:
    """Runs the kernel's case `which`; returns its out."""
    # Views into larger tensors: the neighbours exist, yet they aren't the kernel's.
    data, out = (torch.full((256,), -7, dtype=torch.int32)[64:128] for _ in range(2))
    data.copy_(torch.arange(64))
    probes.run(
        SIM, "probe_misuse", data, out, aux,
        which=which, grid=grid, num_threads=threads, smem_bytes=1024,
    )  # fmt: skip
    return out


MISTAKES = {
    0: r"global read of 4 bytes out of bounds.*nearest is tensor 0, passed by 4 bytes",
    1: r"global write of 4 bytes out of bounds.*nearest is tensor 1, which begins 4 bytes later",
    2: r"global read of 16 bytes misaligned",
    3: r"global write of 16 bytes out of bounds.*tensor 2, passed by 8 bytes",
    4: r"shared memory write of 4 bytes out of bounds: smem_base\(\) \+ 1024, .* has 1024 bytes",
    5: r"shared memory write of 4 bytes out of bounds: smem_base\(\) \+ -1024",
    6: r"shared memory write of 8 bytes misaligned: smem_base\(\) \+ 4",
    7: r"shared memory read by ldmatrix of 16 bytes misaligned: smem_base\(\) \+ 4",
    8: r"shared memory read by ldmatrix of 16 bytes out of bounds",
    9: r"cp_async_16 with valid_bytes = 17",
    10: r"global read by cp.async of 8 bytes out of bounds",
    11: r"shared memory write by cp.async of 16 bytes misaligned",
    12: r"cp_async_8 from a misaligned global address",
    13: r"global reduction of 4 bytes out of bounds",
    14: r"global atomic add of 4 bytes out of bounds",
    15: r"global read of 4 bytes out of bounds, address 0x0;",
    16: r"global atomic add of 8 bytes out of bounds",
    17: r"global read of 8 bytes misaligned",
    20: r"warp_sync needs all lanes|while lanes 0-15 of its warp wait in warp_sync",
    21: r"different operations: this one at vote_any, lanes 0-15 at shfl_xor",
    22: r"mma_m16n8k16_f16 needs all lanes|while lanes 0-2 of its warp wait in mma_m16n8k16_f16",
    23: r"different operations: this one at warp_sync, lanes 0-15 at cta_sync",
    24: r"shfl_idx with operand 32",
    25: r"different operations: this one at vote_ballot, lanes 0-15 at vote_ballot",
    26: r"barrier id 0 is not in 1..15",
    27: r"barrier 1 for 40 threads",
    28: r"barrier 1 for 32 threads, but the first warp .* said 64",
    29: r"lanes of a warp name different barriers",
    30: r"arrives at barrier 3 twice",
    40: r"this (read|write) is not ordered after the (read|write) by thread \d+ at .*:\d+",
    42: r"this (read|write) is not ordered after the (read|write) by thread \d+ at .*:\d+",
    44: r"this read is not ordered after the write by thread \d",
    46: r"this ldmatrix is not ordered after the write by thread",
    48: r"this read is not ordered after the cp.async not yet waited for by thread 0",
    50: r"this (read|cp.async) is not ordered after the (read|write) by thread",
    52: r"this read is not ordered after the cp.async not yet waited for",
    53: r"this read is not ordered after the cp.async not yet waited for",
    55: r"this cp.async is not ordered after the cp.async not yet waited for",
    56: r"this (read|cp.async) is not ordered after the (read|cp.async not yet waited for) by",
    58: r"this (read|write) is not ordered after the (read|write) by thread",
    61: r"this (read|write) is not ordered after the (read|write) by thread",
}  # fmt: skip


def test_every_marked_mistake_is_tested() -> None:
    assert {which for which, _ in LINES} == set(MISTAKES)


@pytest.mark.parametrize("which", MISTAKES)
def test_mistake_is_found_and_placed(which: int) -> None:
    with pytest.raises(SimulatorError, match=MISTAKES[which]) as caught:
        misuse(which, aux=torch.zeros(6, dtype=torch.int32) if which == 3 else None)
    message = str(caught.value)
    assert message.startswith("probe_misuse, CTA 0: ")
    assert re.search(r"thread \d+ \(warp \d+, lane \d+\)", message)
    assert "num_threads=64" in message  # the kernel's whole description
    place = re.search(r"at tests/kernels/probe_misuse\.cu:(\d+) in ", message)
    assert place, message
    assert (which, int(place.group(1))) in LINES, message


@pytest.mark.parametrize("which", [32, 41, 43, 45, 47, 49, 51, 54, 57, 59, 60])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_right_order_passes(which: int, seed: int) -> None:
    with launcher.checks(seed=seed):
        misuse(which)


@pytest.mark.parametrize("which", [40, 42, 44, 46, 50, 56, 58, 61])
def test_races_are_found_in_any_schedule(which: int) -> None:
    for seed in range(1, 9):
        with launcher.checks(seed=seed), pytest.raises(SimulatorError, match="not ordered after"):
            misuse(which)


def test_deadlock_lists_who_waits_where() -> None:
    with pytest.raises(SimulatorError) as caught:
        misuse(31)
    message = str(caught.value)
    assert "deadlock: no thread can run" in message
    where = r"at barrier {} \(1 of 2 warps have arrived\), tests/kernels/probe_misuse\.cu:\d+"
    assert re.search("warp 0: waits in named_barrier_sync " + where.format(2), message)
    assert re.search("warp 1: waits in cta_sync " + where.format(0), message)


def test_shared_memory_starts_as_nan() -> None:
    assert (misuse(70) == -1).all()


def test_copies_arrive_no_earlier_than_waited_for() -> None:
    """Without the race detector too: the destination holds NaN until the wait."""
    with launcher.checks(racecheck=False):
        assert (misuse(71) == -1).all()


def test_racecheck_can_be_switched_off() -> None:
    with launcher.checks(racecheck=False):
        misuse(40)


def test_seeds_shuffle_the_schedule_reproducibly() -> None:
    def order(seed: int) -> list[int]:
        with launcher.checks(seed=seed):
            return misuse(72, aux=torch.zeros(1, dtype=torch.int32), threads=256)[:8].tolist()

    assert order(0) == list(range(8))
    shuffled = [order(seed) for seed in range(1, 6)]
    assert len({tuple(o) for o in shuffled}) > 1
    assert all(sorted(o) == list(range(8)) for o in shuffled)
    assert shuffled == [order(seed) for seed in range(1, 6)]


@pytest.mark.parametrize("threads", ["1", "4"])
def test_first_failing_cta_is_reported(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_INTERFACE_SIM_THREADS", threads)
    for _ in range(5):
        with pytest.raises(SimulatorError, match="probe_misuse, CTA 5: global read"):
            misuse(73, grid=20)


def test_an_error_leaves_the_simulator_usable() -> None:
    for _ in range(3):
        with pytest.raises(SimulatorError):
            misuse(48)  # leaves a copy in flight
        misuse(49)


def test_error_describes_the_tensor() -> None:
    with pytest.raises(
        SimulatorError, match=r"tensor 0: shape \(64,\), strides \(1,\), torch\.int"
    ):
        misuse(0)


def test_tensors_on_other_devices_are_refused() -> None:
    kernel = SimKernel(probes.probe_spec("probe_misuse", num_threads=64, smem_bytes=1024))
    with pytest.raises(ValueError, match="runs on CPU tensors, got one on meta"):
        kernel.launch(1, probes.LAYOUT.block().address, [torch.empty(3, device="meta")])


def test_missing_compiler_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SimulatorError, match=r"(?s)'no-such-compiler'.*Install g\+\+ 11.*CXX"):
        build.kernel(probes.probe_spec("probe_math"))


def test_compile_error_shows_the_log() -> None:
    broken = spec_module.KernelSpec.make(
        "tests/kernels/probe_mma.cu", "probe_mma", "ProbeParams", "sm_80",
        num_threads=32, min_ctas_per_sm=1, smem_bytes=0,
    )  # fmt: skip
    with pytest.raises(SimulatorError, match=r"(?s)cannot compile simulated-probe-mma.*kBf16"):
        SimKernel(broken)
