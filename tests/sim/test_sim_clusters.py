"""CTAs of a cluster: the wrappers on the simulator and on Hopper, and the mistakes it finds."""

from __future__ import annotations

import re
from pathlib import Path

import hopper_probes
import pytest
import torch
from conftest import Runner
from hopper_probes import hopper, random_words

from flash_attn_interface._common.runtime.spec import KernelSpec
from flash_attn_interface._common.sim import launcher
from flash_attn_interface._common.sim.launcher import SimulatorError

__all__ = ["hopper"]

SOURCE = Path(__file__).parents[1] / "kernels" / "probe_cluster_misuse.cu"
LINES = [
    (int(which), number)
    for number, line in enumerate(SOURCE.read_text(encoding="utf-8").splitlines(), 1)
    for which in re.findall(r"BAD (\d+)", line)
]
SIM = Runner("sim", torch.device("cpu"))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_go_round_a_cluster(hopper: Runner, size: int, seed: int) -> None:
    if size == 1 and hopper.name == "sim":
        pytest.skip("copies of a CTA to itself are not simulated without a cluster")
    rounds, row, clusters = 7, 100, 3
    grid = size * clusters
    data = random_words(hopper, clusters, size, rounds, row)
    out = random_words(hopper, data.numel() + grid)
    with launcher.checks(seed=seed):
        hopper_probes.run(
            hopper, "probe_cluster", {}, data, out, grid=grid, which=rounds,
            num_threads=64, smem_bytes=16 * row + 32, row=row, cluster_size=size,
        )  # fmt: skip
    received, ranks = out.split([data.numel(), grid])
    assert torch.equal(received.view(data.shape), data.roll(1, dims=1))
    assert ranks.tolist() == list(range(size)) * clusters


def misuse(which: int) -> None:
    """Runs the kernel's case `which`."""
    hopper_probes.run(
        SIM, "probe_cluster_misuse", {}, None, None, grid=2, which=which,
        num_threads=64, smem_bytes=2 * 256 + 64, cluster_size=2,
    )  # fmt: skip


RACE = r"this {} is not ordered after the {}"
MISTAKES = {
    0: r"mapa to rank 2 in a cluster of 2",
    1: r"mapa of an address of the cluster: it takes one of the own CTA",
    2: r"shared memory read of 4 bytes out of bounds.*this is an address of mapa",
    3: r"mbarrier_arrive_cluster on an mbarrier whose thread has not called fence_mbarrier_init",
    4: r"is not ordered after its mbarrier_init by thread 0|where no mbarrier was initialised",
    5: r"nothing orders that after this access to its shared memory by another CTA"
    r"|in the shared memory of CTA 1, whose threads have all returned",
    7: r"waits at the cluster's barrier without having arrived there",
    8: r"arrives at the cluster's barrier twice without waiting",
    10: r"bulk_copy_to_cluster signals an mbarrier of another CTA than it copies to",
    11: r"bulk_copy_to_cluster of 24 bytes: a bulk copy moves whole units of 16",
    12: r"shared memory bulk_copy_to_cluster of 64 bytes misaligned",
    13: r"shared memory bulk_copy_to_cluster of 512 bytes out of bounds",
    14: r"while this copy from CTA 0 to its shared memory is in flight"
    r"|returns from the kernel while this TMA load is in flight"
    r"|whose threads have all returned|nothing orders that after",
    15: r"in the shared memory of CTA 0, whose threads have all returned|nothing orders that after",
    16: r"mbarrier_arrive of 8 bytes out of bounds.*this is an address of mapa",
    30: RACE.format("copy to a peer", r"write, without fence_proxy_async_shared\(\)"),
    32: RACE.format("write", "copy to a peer not yet waited for by thread 0"),
    34: RACE.format("(read|TMA load)", "(read by thread 0 of CTA 1|TMA load not yet waited for)"),
    36: RACE.format("(write|TMA load)", "(write by thread 0 of CTA 1|TMA load not yet waited for)"),
    40: RACE.format("TMA load", "(read by thread 0 of CTA 1|TMA load not yet waited for)"),
}
RIGHT = [6, 31, 33, 35, 37, 41]


def test_every_marked_mistake_is_tested() -> None:
    assert {which for which, _ in LINES} == set(MISTAKES)


@pytest.mark.sim
@pytest.mark.parametrize("which", MISTAKES)
@pytest.mark.parametrize("seed", range(4))
def test_mistake_is_found_and_placed_in_any_schedule(which: int, seed: int) -> None:
    with launcher.checks(seed=seed), pytest.raises(SimulatorError, match=MISTAKES[which]) as caught:
        misuse(which)
    message = str(caught.value)
    place = re.search(r"at tests/kernels/probe_cluster_misuse\.cu:(\d+) in ", message)
    assert place and (which, int(place.group(1))) in LINES, message


@pytest.mark.sim
@pytest.mark.parametrize("which", RIGHT)
@pytest.mark.parametrize("seed", range(4))
def test_right_order_passes(which: int, seed: int) -> None:
    with launcher.checks(seed=seed):
        misuse(which)


@pytest.mark.sim
def test_a_deadlock_names_the_waits_of_all_ctas() -> None:
    with pytest.raises(SimulatorError, match="deadlock: no thread can run") as caught:
        misuse(9)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert [line.partition(",")[0] for line in lines[1:7]] == [
        "CTA 0",
        "warp 0: waits at the cluster's barrier",
        "warp 1: waits at the cluster's barrier",
        "CTA 1",
        "warp 0: waits at the cluster's barrier",
        "warp 1: all lanes wait for phase 0 (parity 0) of the mbarrier at smem_base() + 520: "
        "1 of 1 arrivals and 0 bytes are missing",
    ]


@pytest.mark.sim
def test_clusters_without_race_detector_still_end() -> None:
    with launcher.checks(racecheck=False):
        misuse(41)
        with pytest.raises(SimulatorError, match=MISTAKES[5]):
            misuse(5)


@pytest.mark.sim
def test_spec_and_kernel_agree_on_the_cluster() -> None:
    spec = KernelSpec.make(
        "tests/kernels/probe_bulk.cu", "probe_bulk", "HopperProbeParams", "sm_90a",
        num_threads=64, min_ctas_per_sm=1, smem_bytes=4 * (16 + 8), row=4, cluster_size=2,
    )  # fmt: skip
    with pytest.raises(SimulatorError, match="declares clusters of 1 CTAs .* KernelSpec says 2"):
        launcher.SimKernel(spec)


@pytest.mark.sim
def test_a_grid_has_whole_clusters() -> None:
    with pytest.raises(ValueError, match="a grid of 3 CTAs is not one of whole clusters of 2"):
        hopper_probes.run(
            SIM, "probe_cluster_misuse", {}, None, None, grid=3,
            num_threads=64, smem_bytes=2 * 256 + 64, cluster_size=2,
        )  # fmt: skip


@pytest.mark.parametrize(("arch", "size"), [("sm_90a", 9), ("sm_90a", 0), ("sm_80", 2)])
def test_clusters_that_the_architecture_lacks_are_refused(arch: str, size: int) -> None:
    with pytest.raises(ValueError, match=f"cluster_size={size}, sm_.. has clusters of up to"):
        KernelSpec.make(
            "flash2/fwd.cu", "x", "X", arch,
            num_threads=64, min_ctas_per_sm=1, smem_bytes=0, cluster_size=size,
        )  # fmt: skip
