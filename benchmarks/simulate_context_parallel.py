"""Predicts the efficiency of context parallelism on 8 to 1024 GPUs from measured parts.

    python benchmarks/simulate_context_parallel.py                         table; needs no GPU
    python benchmarks/simulate_context_parallel.py --plot docs/context_parallel.png
    python benchmarks/simulate_context_parallel.py --measured results.json
        with rates and links of a run of bench_context_parallel.py, whose rows it predicts too

It walks through the very plans that the ranks run (steps.py): each launch takes the time of its
visible scores at the kernels' rate for such sequences, each transfer that of its bytes on its link,
and each addition that of its bytes in memory; a transfer waits for the one before it and for a free
buffer, a launch for the launch before it and its keys. What it leaves out: that transfers slow
kernels down while they run, and waiting for ranks that are late.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import context_parallel_rows as rows
from context_parallel_rows import SHAPES, Row

from flash_attn_interface.context_parallel.division import Division
from flash_attn_interface.context_parallel.keys import SLOTS
from flash_attn_interface.context_parallel.layout import MIN_TOKENS_PER_RANK
from flash_attn_interface.context_parallel.steps import Launch, Plan, plan, visible_scores

ELEMENT_BYTES = 2
SPLIT_OF_OWN_KEYS = 0.5  # in the backward, this part of them comes before all other steps


@dataclass(frozen=True)
class Machine:
    """What is measured, in SI units. Defaults: an H200, eight of which NVLink joins, and a network
    of 400 Gbit/s per GPU.

    A launch whose queries see n keys on average runs at peak x n / (n + half): with `half` keys the
    kernels reach half of their peak.
    """

    forward_flops: float = 650e12
    forward_half: float = 200.0
    backward_flops: float = 480e12
    backward_half: float = 400.0
    launch_seconds: float = 8e-6  # of a launch, until it does anything
    memory_bytes_per_second: float = 3.5e12
    node: int = 8  # GPUs that NVLink joins
    link_bytes_per_second: float = 350e9  # each way at once, per GPU
    link_seconds: float = 25e-6  # of a transfer, until it does anything
    network_bytes_per_second: float = 45e9
    network_seconds: float = 40e-6

    @classmethod
    def measured(cls, results: dict[str, Any]) -> Machine:
        """From the results of bench_context_parallel.py: rates at the shortest and the longest
        sequences, a small and a large transfer."""
        rates = sorted(results["one_gpu"], key=lambda r: r["seqlen"])
        small, large = sorted(results["link"], key=lambda r: r["bytes"])
        per_byte = (large["seconds"] - small["seconds"]) / (large["bytes"] - small["bytes"])
        fitted = {}
        for name in ("forward", "backward"):
            n, m = rates[0]["seqlen"] / 2, rates[-1]["seqlen"] / 2  # keys of a query, causal
            a, b = (rates[i][f"{name}_tflops"] * 1e12 for i in (0, -1))
            # 1 / rate is linear in 1 / n: 1 / peak + half / peak / n
            slope = (1 / a - 1 / b) / (1 / n - 1 / m)
            peak = 1 / (1 / b - slope / m)
            fitted[f"{name}_flops"], fitted[f"{name}_half"] = peak, max(0.0, slope * peak)
        return cls(
            link_bytes_per_second=1 / per_byte,
            link_seconds=max(0.0, small["seconds"] - small["bytes"] * per_byte),
            **fitted,
        )

    def apart(self, rank: int, other: int) -> bool:
        """Whether the network lies between them."""
        return rank // self.node != other // self.node

    def transfer(self, count: float, across_nodes: bool) -> float:
        if not count:
            return 0.0
        if across_nodes:
            return self.network_seconds + count / self.network_bytes_per_second
        return self.link_seconds + count / self.link_bytes_per_second


@dataclass(frozen=True)
class Work:
    """What one token of a row costs."""

    forward_flops: float  # of a visible score, all heads
    backward_flops: float
    query_bytes: float  # of q and out, 16 bits
    key_bytes: float  # of k and v

    @classmethod
    def of(cls, row: Row) -> Work:
        (h, h_kv), (d, d_v) = row.heads, row.head_dims
        return cls(
            2.0 * h * (d + d_v),
            2.0 * h * (3 * d + 2 * d_v),
            float(ELEMENT_BYTES * h * (d + d_v)),
            float(ELEMENT_BYTES * h_kv * (d + d_v)),
        )


def kernel(machine: Machine, work: Work, launches: Sequence[Launch], backward: bool) -> float:
    peak = machine.backward_flops if backward else machine.forward_flops
    half = machine.backward_half if backward else machine.forward_half
    flops = work.backward_flops if backward else work.forward_flops
    total = 0.0
    for launch in launches:
        total += machine.launch_seconds
        for n_q, n_k in zip(launch.q_lengths, launch.k_lengths, strict=True):
            right = 0 if launch.causal else launch.window[1]
            scores = _scores(n_q, n_k, right, launch.window[0])
            total += (scores + half * n_q) * flops / peak
    return total


def _scores(n_q: int, n_k: int, right: int, left: int) -> float:
    """As steps.visible_scores, without a pass over the rows for the masks that occur here."""
    if right < 0 and left < 0:
        return float(n_q * n_k)
    if left < 0 and right == 0 and n_q == n_k:
        return n_q * (n_q + 1) / 2
    return float(visible_scores(n_q, n_k, right, left))


def stepwise(machine: Machine, work: Work, rank: int, steps: Plan) -> float:
    """Seconds of forward and backward of one rank."""
    return _forward(machine, work, rank, steps) + _backward(machine, work, rank, steps)


def _arrivals(machine: Machine, work: Work, rank: int, steps: Plan) -> list[float]:
    """Seconds that each step's keys take on their links, which are used both ways at once."""
    found = []
    for step in steps.steps:
        took = 0.0
        for across in (False, True):
            sent = sum(len(r) for p, r in step.sends if machine.apart(rank, p) == across)
            received = sum(n for p, n in step.receives if machine.apart(rank, p) == across)
            took = max(took, machine.transfer(max(sent, received) * work.key_bytes, across))
        found.append(took)
    return found


def _forward(machine: Machine, work: Work, rank: int, steps: Plan) -> float:
    arrivals = _arrivals(machine, work, rank, steps)
    ends, link = [0.0], 0.0
    now = kernel(machine, work, steps.steps[0].launches, False)
    for number, step in enumerate(steps.steps[1:], 1):
        free = ends[max(0, number - SLOTS)]
        link = max(link, free) + arrivals[number]
        merged = sum(len(launch.q) for launch in step.launches) if steps.merges else 0
        # out is read twice and written once, or half as often with one merge, in 32 bits with more
        traffic = merged * work.query_bytes / 2 * (3 if len(steps.steps) == 2 else 5)
        now = max(now, link) + kernel(machine, work, step.launches, False)
        now += traffic / machine.memory_bytes_per_second
        ends.append(now)
    return now


def _backward(machine: Machine, work: Work, rank: int, steps: Plan) -> float:
    arrivals = _arrivals(machine, work, rank, steps)
    own = kernel(machine, work, steps.steps[0].launches, True)
    transfers = len(steps.steps) > 1
    now = own * (SPLIT_OF_OWN_KEYS if transfers else 1.0)
    ends, link = [0.0], 0.0
    for number, step in enumerate(steps.steps[1:], 1):
        free = ends[max(0, number - SLOTS)]
        link = max(link, free) + arrivals[number]
        now = max(now, link) + kernel(machine, work, step.launches, True)
        ends.append(now)
        rows_q = sum(len(launch.q) for launch in step.launches)
        rows_k = sum(len(r) for _, r in step.sends)
        traffic = (rows_q * work.query_bytes / 2 + rows_k * work.key_bytes) * 4
        now += traffic / machine.memory_bytes_per_second
        link = max(link, now) + arrivals[number]  # gradients travel where keys came from
    if not transfers:
        return now
    return max(now + own * (1 - SPLIT_OF_OWN_KEYS), link)


def all_to_all(machine: Machine, work: Work, row: Row, world: int) -> float:
    """Seconds: q, k, v there and out back, likewise dout and the gradients; nothing overlaps."""
    kernels = 0.0
    for peak, half, flops in (
        (machine.forward_flops, machine.forward_half, work.forward_flops),
        (machine.backward_flops, machine.backward_half, work.backward_flops),
    ):
        scores = sum(n * n / 2 + half * n for n in row.lengths)
        kernels += machine.launch_seconds + scores * flops / world / peak
    local = row.tokens / world
    share = (world - 1) / world
    near = min(world, machine.node) - 1
    there = local * (work.query_bytes + work.key_bytes)
    took = 0.0
    for _ in ("forward", "backward"):
        moved = there * share
        across = moved * (world - 1 - near) / max(1, world - 1)
        took += max(machine.transfer(moved - across, False) * 2, machine.transfer(across, True) * 2)
        took += 4 * 2 * there / machine.memory_bytes_per_second
    return kernels + took


def single(machine: Machine, work: Work, row: Row) -> float:
    division = Division.of(row.lengths, 1, "zigzag", None)
    return stepwise(machine, work, 0, plan(division, 0, True, (-1, -1), False))


def efficiency(machine: Machine, row: Row, world: int, scheme: str) -> float | None:
    """Of the slowest of some ranks; None where heads cannot be dealt out."""
    work = Work.of(row)
    alone = single(machine, work, row)
    if scheme == "all_to_all":
        if row.heads[0] % world or (row.heads[1] % world and world % row.heads[1]):
            return None
        return alone / world / all_to_all(machine, work, row, world)
    least = MIN_TOKENS_PER_RANK if row.packed else None
    division = Division.of(row.lengths, world, scheme, least)
    ranks = range(world) if world <= 16 else sorted({0, 1, world // 2, world - 2, world - 1})
    took = max(
        stepwise(machine, work, rank, plan(division, rank, True, (-1, -1), not row.packed))
        for rank in ranks
    )
    return alone / world / took


WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024)
SCHEMES = {"zigzag": "ring, zigzag", "contiguous": "ring, contiguous", "all_to_all": "all-to-all"}
TOKENS_PER_GPU = 16384


def studies() -> dict[str, Any]:
    """What is shown: name -> the row of so many GPUs."""
    mha, gqa = SHAPES["(128,128) 16 heads"], SHAPES["(128,128) 32 over 4"]
    return {
        "16 heads, 16k tokens per GPU": lambda n: Row("", (TOKENS_PER_GPU * n,), *mha),
        "32 heads over 4, 16k tokens per GPU": lambda n: Row("", (TOKENS_PER_GPU * n,), *gqa),
        "16 heads, 1M tokens in all": lambda n: Row("", (1 << 20,), *mha),
        "16 heads, documents of 128 to 32k, 16k per GPU": lambda n: Row(
            "", rows.long_tailed(TOKENS_PER_GPU * n), *mha
        ),
    }


def table(machine: Machine, worlds: Sequence[int]) -> dict[str, dict[str, dict[int, float]]]:
    found: dict[str, dict[str, dict[int, float]]] = {}
    for name, row_of in studies().items():
        found[name] = {}
        for scheme, label in SCHEMES.items():
            values = {n: efficiency(machine, row_of(n), n, scheme) for n in worlds}
            found[name][label] = {n: e for n, e in values.items() if e is not None}
    return found


def print_table(found: dict[str, dict[str, dict[int, float]]], worlds: Sequence[int]) -> None:
    for name, by_scheme in found.items():
        print(f"\n{name}\n{'GPUs':18s}" + "".join(f"{n:8d}" for n in worlds))
        for label, values in by_scheme.items():
            cells = (f"{values[n]:8.3f}" if n in values else " " * 8 for n in worlds)
            print(f"{label:18s}" + "".join(cells))


def draw(path: Path, found: dict[str, dict[str, dict[int, float]]], subtitle: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(found), figsize=(4.0 * len(found), 3.6), sharey=True, layout="constrained"
    )
    for axis, (name, by_scheme) in zip(axes, found.items(), strict=True):
        for label, values in by_scheme.items():
            if values:
                axis.plot(list(values), list(values.values()), "o-", label=label, ms=3)
        axis.set_title(name, fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_ylim(0, 1.02)
        axis.set_xlabel("GPUs")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("efficiency")
    axes[0].legend(loc="lower left", fontsize=8)
    figure.suptitle(
        f"Predicted efficiency of context parallelism, causal, forward with backward\n{subtitle}",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


def compare(machine: Machine, results: dict[str, Any]) -> None:
    """The prediction of each measured row beside the measurement."""
    world = results["gpus"]
    by_name = {row.name: row for row in rows.rows_for(world)}
    print(f"\n{'row':32s} {'method':12s} {'measured':>9s} {'predicted':>10s}")
    for record in results["records"]:
        scheme = {"ring": "zigzag", "all_to_all": "all_to_all"}.get(record["implementation"])
        if scheme is None or record["row"] not in by_name:
            continue
        predicted = efficiency(machine, by_name[record["row"]], world, scheme)
        assert predicted is not None
        print(
            f"{record['row']:32s} {record['implementation']:12s} {record['efficiency']:9.3f} "
            f"{predicted:10.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measured", type=Path, default=None, help="results.json of the benchmark")
    parser.add_argument("--network", type=float, default=None, help="GB/s per GPU across nodes")
    parser.add_argument("--plot", type=Path, default=None, help="picture to write")
    parser.add_argument("--gpus", default=",".join(map(str, WORLDS)))
    options = parser.parse_args()
    machine, subtitle = Machine(), "rates and links of an H200, assumed"
    if options.measured is not None:
        results = json.loads(options.measured.read_text(encoding="utf-8"))
        machine = Machine.measured(results)
        subtitle = f"rates and links measured on {results['machine']['gpu']}"
        compare(machine, results)
    if options.network is not None:
        machine = replace(machine, network_bytes_per_second=options.network * 1e9)
    subtitle += f", {machine.network_bytes_per_second / 1e9:.0f} GB/s per GPU between nodes"
    worlds = [int(n) for n in options.gpus.split(",")]
    found = table(machine, worlds)
    print(subtitle)
    print_table(found, worlds)
    if options.plot is not None:
        draw(options.plot, found, subtitle)


if __name__ == "__main__":
    main()
