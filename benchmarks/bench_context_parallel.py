"""Context parallelism: efficiency = time on one GPU / (GPUs x time on all of them).

Forward with backward, causal, bf16; the same tokens on one GPU and divided among all. Starts one
process per GPU itself. Beside ring-flash-attn's zigzag over the same kernels, where importable.

    python benchmarks/bench_context_parallel.py                    all rows on all GPUs
    python benchmarks/bench_context_parallel.py --rows 16k,packed  whose name holds one of these
    python benchmarks/bench_context_parallel.py --out FOLDER       results.json and README.md there
    python benchmarks/bench_context_parallel.py --trace FOLDER     and a profile of each row's ring

Before a row is timed, out and gradients of every method of ours are compared with one GPU's. The
time is the slowest rank's median over rounds, in which the implementations take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import context_parallel_rows as rows
import harness
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from context_parallel_rows import PEER, SHAPES, Row, Step
from torch import Tensor

from flash_attn_interface import flash_attn_func
from flash_attn_interface.context_parallel import Layout

ROUNDS = 3
BURST_SECONDS = 0.4  # of one implementation in one round
LINK_BYTES = (1 << 20, 1 << 26)
MAX_ERROR = 0.02  # of the root mean square of one GPU's result


def seconds(step: Step, calls: int) -> float:
    """Per call, of this rank; all ranks start together."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    dist.barrier()
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def slowest(value: float) -> float:
    tensor = torch.tensor([value], dtype=torch.float64, device="cuda")
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def measure(steps: dict[str, Step]) -> dict[str, list[float]]:
    """Seconds per call of every implementation and round, of the slowest rank."""
    calls = {}
    for name, step in steps.items():
        step()  # compiles
        once = slowest(seconds(step, 1))
        calls[name] = max(1, min(20, round(BURST_SECONDS / once)))
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(ROUNDS):
        names = list(steps)
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(slowest(seconds(steps[name], calls[name])))
    return samples


def largest_error(layout: Layout, got: tuple[Tensor, ...], whole: tuple[Tensor, ...]) -> float:
    """Root mean square of the difference over that of the result, the worst of all tensors."""
    worst = 0.0
    for mine, all_rows in zip(got, whole, strict=True):
        expected = layout.shard(all_rows).float()
        difference = (mine.float() - expected).square().mean().sqrt()
        worst = max(worst, float(difference / expected.square().mean().sqrt()))
    return slowest(worst)


def run_row(row: Row, group: dist.ProcessGroup, trace: Path | None) -> list[dict[str, Any]]:
    tensors = rows.draw(row)
    layout = rows.layout_of(row, group)
    world = layout.world
    steps = {"one GPU": rows.one_gpu(row, tensors), "ring": rows.ours(layout, tensors, "ring")}
    if row.heads[0] % world == 0 and not (row.heads[1] % world and world % row.heads[1]):
        steps["all_to_all"] = rows.ours(layout, tensors, "all_to_all")
    errors = {}
    whole = steps["one GPU"]()
    for name in [n for n in steps if n != "one GPU"]:
        errors[name] = largest_error(layout, steps[name](), whole)
    del whole
    notes = {}
    try:
        found = rows.peer(row, group, tensors)
        if found is not None:
            found()
            steps[PEER] = found
    except Exception as error:  # the same on every rank: it knows no shapes that only some have
        notes[PEER] = harness.brief(error)
    samples = measure(steps)
    single = statistics.median(samples["one GPU"])
    if trace is not None and dist.get_rank() == 0:
        trace.mkdir(parents=True, exist_ok=True)
    if trace is not None:
        profile(steps["ring"], trace / f"{row.name.replace(' ', '-')}-rank{dist.get_rank()}.json")
    return [
        {
            "row": row.name,
            "implementation": name,
            "gpus": 1 if name == "one GPU" else world,
            "tokens": row.tokens,
            "documents": len(row.lengths),
            "seconds": statistics.median(times),
            "fastest": min(times),
            "slowest": max(times),
            "tflops_per_gpu": row.flops
            / statistics.median(times)
            / (1 if name == "one GPU" else world)
            / 1e12,
            "efficiency": None if name == "one GPU" else single / world / statistics.median(times),
            "error": errors.get(name),
            "wrong": errors.get(name, 0.0) > MAX_ERROR,
        }
        for name, times in samples.items()
    ] + [{"row": row.name, "implementation": n, "note": note} for n, note in notes.items()]


def profile(step: Step, path: Path) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        step()
        torch.cuda.synchronize()
    recorded.export_chrome_trace(str(path))


def link() -> list[dict[str, float]]:
    """Bytes per second that a rank receives from its neighbour while it sends as many."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found = []
    for size in LINK_BYTES:
        out, into = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))

        def exchange(out: Tensor = out, into: Tensor = into) -> tuple[Tensor, ...]:
            works = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, out, (rank + 1) % world),
                    dist.P2POp(dist.irecv, into, (rank - 1) % world),
                ]
            )
            for work in works:
                work.wait()
            return ()

        exchange()
        took = slowest(min(seconds(exchange, 20) for _ in range(3)))
        found.append({"bytes": float(size), "seconds": took, "bytes_per_second": size / took})
    return found


def one_gpu_rates(row: Row) -> dict[str, float]:
    """Of the forward alone, and of forward with backward: what the simulation needs."""
    tensors = rows.draw(row)
    *inputs, _ = tensors
    forward: Step = lambda: (flash_attn_func(*inputs, causal=True),)  # noqa: E731
    samples = measure({"forward": forward, "both": rows.one_gpu(row, tensors)})
    took = {name: statistics.median(times) for name, times in samples.items()}
    (d, d_v), heads = row.head_dims, row.heads[0]
    scores = sum(n * n for n in row.lengths) / 2 * heads
    backward = took["both"] - took["forward"]
    return {
        "seqlen": float(row.tokens),
        "head_dim_qk": float(d),
        "head_dim_v": float(d_v),
        "forward_tflops": 2.0 * scores * (d + d_v) / took["forward"] / 1e12,
        "backward_tflops": 2.0 * scores * (3 * d + 2 * d_v) / backward / 1e12,
    }


def run(rank: int, world: int, store: str, options: argparse.Namespace) -> None:
    torch.cuda.set_device(rank)
    nccl = dist.ProcessGroupNCCL.Options()
    nccl.is_high_priority_stream = (
        not options.normal_priority
    )  # as docs/context_parallel.md advises
    dist.init_process_group(
        "nccl",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        device_id=torch.device("cuda", rank),
        pg_options=nccl,
    )
    wanted = options.rows.split(",") if options.rows else [""]
    records: list[dict[str, Any]] = []
    for row in rows.rows_for(world):
        if not any(part in row.name for part in wanted):
            continue
        found = run_row(row, dist.group.WORLD, options.trace)
        records += found
        if rank == 0:
            print_row(row, found)
        torch.cuda.empty_cache()
    heads, dims = SHAPES["(128,128) 16 heads"]
    rates = [one_gpu_rates(Row("", (n,), heads, dims)) for n in (2048, 4096, 8192, 16384, 32768)]
    links = link()
    if rank == 0:
        print("one GPU, (128,128) 16 heads, causal:")
        for rate in rates:
            print(
                f"  S = {rate['seqlen']:6.0f}: forward {rate['forward_tflops']:5.0f} TFLOP/s, "
                f"backward {rate['backward_tflops']:5.0f} TFLOP/s"
            )
        for one in links:
            print(f"link, {one['bytes'] / 2**20:.0f} MiB: {one['bytes_per_second'] / 1e9:.0f} GB/s")
        write(options, world, records, rates, links)
    dist.destroy_process_group()
    if any(record.get("wrong") for record in records):
        raise SystemExit("a result differs from one GPU's by more than rounding explains")


HEADER = (
    f"{'row':32s} {'implementation':16s} {'ms':>9s} {'efficiency':>11s} {'TFLOP/s/GPU':>12s}  error"
)


def print_row(row: Row, records: list[dict[str, Any]]) -> None:
    print(HEADER)
    for r in records:
        if "note" in r:
            print(f"{row.name:32s} {r['implementation']:16s} {r['note']}")
            continue
        efficiency = "" if r["efficiency"] is None else f"{r['efficiency']:.3f}"
        error = "" if r["error"] is None else f"{r['error']:.1e}{' WRONG' * r['wrong']}"
        print(
            f"{row.name:32s} {r['implementation']:16s} {r['seconds'] * 1e3:9.2f} {efficiency:>11s} "
            f"{r['tflops_per_gpu']:12.0f}  {error}",
            flush=True,
        )


def write(
    options: argparse.Namespace,
    world: int,
    records: list[dict[str, Any]],
    rates: list[dict[str, float]],
    links: list[dict[str, float]],
) -> None:
    folder = options.out or harness.default_folder(f"context-parallel-{world}-gpus")
    folder.mkdir(parents=True, exist_ok=True)
    machine = harness.describe_machine(options.commit)
    content = {
        "machine": machine,
        "gpus": world,
        "formula": "efficiency = time on one GPU / (GPUs x time on all), forward with backward",
        "records": records,
        "one_gpu": rates,
        "link": links,
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    lines = [
        f"# Context parallelism on {world} GPUs",
        "",
        *(f"- {name}: {value}" for name, value in machine.items()),
        f"- {content['formula']}, causal, bf16",
        "",
        "| row | implementation | ms | efficiency | TFLOP/s per GPU |",
        "|---|---|---|---|---|",
    ]
    for r in records:
        if "note" in r:
            lines.append(f"| {r['row']} | {r['implementation']} | {r['note']} | | |")
            continue
        efficiency = "" if r["efficiency"] is None else f"{r['efficiency']:.3f}"
        lines.append(
            f"| {r['row']} | {r['implementation']} | {r['seconds'] * 1e3:.2f} | {efficiency} | "
            f"{r['tflops_per_gpu']:.0f} |"
        )
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"written to {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, default=None, help="how many; default: all")
    parser.add_argument("--rows", default="", help="parts of names, comma-separated; default: all")
    parser.add_argument("--out", type=Path, default=None, help="folder for the results")
    parser.add_argument("--trace", type=Path, default=None, help="folder for profiles")
    parser.add_argument(
        "--normal-priority", action="store_true", help="of NCCL's stream; default: high"
    )
    parser.add_argument("--commit", default=None, help="for the record, where git is not at hand")
    options = parser.parse_args()
    harness.require_gpu()
    world = options.gpus or torch.cuda.device_count()
    if not 2 <= world <= torch.cuda.device_count():
        print(f"This benchmark needs two GPUs or more: {torch.cuda.device_count()} here.")
        raise SystemExit(2)
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))
        mp.spawn(run, (world, store, options), nprocs=world)


if __name__ == "__main__":
    main()
