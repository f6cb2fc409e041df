"""What a call costs on the host: microseconds per warm eager call, and the price of a first call.

Warm: median over many calls, without gradients, on a problem so small that the GPU always waits for
the host. SDPA runs on the same tensors with its backend selected outside the timed region.
Cold: processes after each other share a new cache folder. The first one compiles, the later ones
read the kernel from disk; cold_start.py is what they run.

    python benchmarks/bench_host_overhead.py [--calls 2000] [--skip-cold]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import decode_peers
import harness
import peers
import report
import torch
from harness import Contestant
from torch import Tensor

SEQLEN = 64
FORWARD_US, DECODE_US, START_MS = 20.0, 25.0, 50.0  # what we allow ourselves
CALLS_PER_SYNC = 200  # the GPU's launch queue holds about 1000: never measure a full queue
CACHE_DIR = "FLASH_ATTN_INTERFACE_CACHE_DIR"
FORCE_BACKEND = "FLASH_ATTN_INTERFACE_FORCE_BACKEND"
WARM_STARTS = 3
FLOOR = "torch.empty"
# Fields of cold_start.py's answer that are no stages of the first call.
STARTS = ("import_torch", "cuda_context", "import_package")
CALLS = ("first_call", "warm_call")

Record = dict[str, Any]


def call_times_us(contestant: Contestant, calls: int) -> list[float]:
    """Host microseconds from the call to its return, one number a call."""
    samples = []
    clock, call = time.perf_counter_ns, contestant.call
    with torch.no_grad(), contestant.scope():
        for _ in range(CALLS_PER_SYNC):
            call()
        for _ in range(0, calls, CALLS_PER_SYNC):
            torch.cuda.synchronize()
            for _ in range(CALLS_PER_SYNC):
                started = clock()
                call()
                samples.append((clock() - started) * 1e-3)
    torch.cuda.synchronize()
    return samples


def tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def forward_rows() -> Iterator[tuple[str, list[Contestant]]]:
    """(what, those who do it), ours first."""
    import flash_attn
    import flash_attn_interface as interface

    for head_dim_qk, head_dim_v, causal in ((64, 64, False), (64, 64, True), (64, 128, True)):
        q, k, v = (tensor(1, SEQLEN, 2, d) for d in (head_dim_qk, head_dim_qk, head_dim_v))
        name = f"forward ({head_dim_qk},{head_dim_v}){' causal' if causal else ''}"
        implementations = (peers.OURS, *peers.PEERS.values())
        yield name, _present(name, [partial(i.make, q, k, v, causal) for i in implementations])
    q, k, v = tensor(SEQLEN, 2, 64), tensor(SEQLEN, 2, 64), tensor(SEQLEN, 2, 128)
    lengths = torch.tensor([0, SEQLEN], device="cuda", dtype=torch.int32)
    packed = (q, k, v, lengths, lengths, SEQLEN, SEQLEN)
    q, k, v = tensor(1, SEQLEN, 8, 128), tensor(1, SEQLEN, 2, 128), tensor(1, SEQLEN, 2, 128)
    for name, call in (
        ("forward packed", partial(interface.flash_attn_varlen_func, *packed, causal=True)),
        ("forward GQA 8:2", partial(interface.flash_attn_func, q, k, v, causal=True)),
        ("forward window", partial(interface.flash_attn_func, q, k, v, window_size=(32, 0))),
        ("forward, FA2's function", partial(flash_attn.flash_attn_func, q, k, v, causal=True)),
        ("f3b2", partial(interface.flash_attn_f3b2_func, q, k, v, causal=True)),
    ):
        yield name, [Contestant("ours", call)]
    # What no implementation can go below: allocating the output.
    yield FLOOR, [Contestant("ours", partial(torch.empty_like, q))]


def decode_rows() -> Iterator[tuple[str, list[Contestant]]]:
    """One token for each of four sequences, 32 query heads and 8 of keys and values."""
    from flash_attn_interface import flash_attn_with_kvcache

    batch, capacity, heads = 4, 512, 8
    q, k, v = tensor(batch, 1, 32, 128), tensor(batch, 1, heads, 128), tensor(batch, 1, heads, 128)
    lengths = torch.full((batch,), capacity - 1, device="cuda", dtype=torch.int32)
    angles = tensor(capacity, 64)
    new, rotary = {"k": k, "v": v}, {"rotary_cos": angles, "rotary_sin": angles}
    for page_size in (0, 16):
        table = None
        leading = (batch, capacity)
        if page_size:
            leading = (batch * capacity // page_size, page_size)
            table = torch.arange(leading[0], device="cuda", dtype=torch.int32).view(batch, -1)
        caches = (tensor(*leading, heads, 128), tensor(*leading, heads, 128))
        decode = decode_peers.Decode(q, [caches], table, lengths)
        kind = f"page size {page_size}" if page_size else "fixed"
        name = f"decode, {kind}"
        makers = [partial(decode_peers.make_ours, decode), partial(decode_peers.make_fa3, decode)]
        yield name, _present(name, makers)
        for what, more in (("append", new), ("append and rotary", new | rotary)):
            call = partial(
                flash_attn_with_kvcache, q, *caches, cache_seqlens=lengths, page_table=table,
                causal=True, **more,
            )  # fmt: skip
            yield f"decode, {kind}, {what}", [Contestant("ours", call)]


def _present(what: str, makers: Sequence[Callable[[], Contestant]]) -> list[Contestant]:
    found = []
    for make in makers:
        try:
            contestant = make()
            harness.run_once(contestant)
            torch.cuda.synchronize()
            found.append(contestant)
        except Exception as error:  # a peer may refuse in any way
            print(f"note: {what}: {type(error).__name__}: {error}".splitlines()[0])
    return found


def bench_warm(calls: int, rounds: int = 10) -> list[Record]:
    """All rows in rounds, so that a busy moment of the host is everybody's; compiled before."""
    rows = [(what, FORWARD_US, found) for what, found in forward_rows()]
    rows += [(what, DECODE_US, found) for what, found in decode_rows()]
    samples: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds + 1):  # the first one compiles
        for what, _, contestants in rows:
            for contestant in contestants:
                us = call_times_us(contestant, calls // rounds)
                if turn > 0:
                    samples.setdefault((what, contestant.name), []).extend(us)
    records = []
    for what, budget_us, contestants in rows:
        for name in (c.name for c in contestants):
            ordered = sorted(samples[what, name])
            records.append(
                {
                    "what": what,
                    "implementation": name,
                    "median_us": round(statistics.median(ordered), 2),
                    "tenth_us": round(ordered[len(ordered) // 10], 2),
                    "ninetieth_us": round(ordered[len(ordered) * 9 // 10], 2),
                    "budget_us": None if what == FLOOR else budget_us,
                    "calls": len(ordered),
                }
            )
        print_row([r for r in records if r["what"] == what])
    return records


def over_budget(record: Record) -> bool:
    return record["budget_us"] is not None and record["median_us"] > record["budget_us"]


def print_row(records: Sequence[Record]) -> None:
    cells = [f"{r['implementation']} {r['median_us']:5.1f} ({r['tenth_us']:.1f})" for r in records]
    ours = records[0]
    late = ours["implementation"] == "ours" and over_budget(ours)
    over = f"   OVER its budget of {ours['budget_us']:g}" if late else ""
    print(f"{ours['what']:<38} {'   '.join(cells)}{over}", flush=True)


def bench_cold(dims: str) -> dict[str, dict[str, float]]:
    """Seconds of processes after each other. first: compiles into an empty cache folder; second:
    finds the kernel, and the bytecode of all modules, where the first one left them (the median of
    several by their first call)."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o700)
        environment = {**os.environ, CACHE_DIR: folder}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        command = [sys.executable, str(Path(__file__).with_name("cold_start.py")), dims]
        for _ in range(1 + WARM_STARTS):
            answer = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )
            if answer.returncode != 0:
                raise SystemExit(f"a new process failed:\n{answer.stderr}")
            results.append(json.loads(answer.stdout.splitlines()[-1]))
    second = sorted(results[1:], key=lambda seconds: seconds["first_call"])[WARM_STARTS // 2]
    return {"first": results[0], "second": second}


def print_cold(dims: str, cold: Mapping[str, Mapping[str, float]]) -> None:
    for name, seconds in cold.items():
        stages = {k: v for k, v in seconds.items() if k not in ("modules", *STARTS, *CALLS)}
        print(f"{name} process, ({dims}) causal, milliseconds")
        for what, names in (("its own start", STARTS), ("calls", CALLS), ("first call", stages)):
            print(f"  {what:<14}", ", ".join(f"{n} {1e3 * seconds[n]:.1f}" for n in names))
    second = cold["second"]
    kernel = sum(second.get(name, 0.0) for name in ("fetch_kernel", "load_module", "launch"))
    whole = second["first_call"] - second["warm_call"]
    print(
        f"from the disk cache: the kernel {1e3 * kernel:.1f} ms (file, module, launch), "
        f"the whole first call {1e3 * whole:.1f} ms more than the second; {START_MS:g} ms allowed"
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=2000, help="warm calls per implementation")
    parser.add_argument("--skip-cold", action="store_true")
    parser.add_argument("--skip-warm", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="folder for the results")
    parser.add_argument("--commit", default=None, help="for the record, where git is not at hand")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse_arguments()
    harness.require_gpu()
    peers.prepare(["fa3"])
    machine = harness.describe_machine(options.commit)
    machine["tree"] = os.environ.get(FORCE_BACKEND, "the one chosen for this GPU")
    machine["load_average"] = load = round(os.getloadavg()[0], 1)
    machine["cpus"] = cpus = len(os.sched_getaffinity(0))
    print(f"{machine['gpu']}, {machine['processor']}, torch {machine['torch']}, {machine['tree']}")
    if load > cpus / 4:
        print(f"note: this host is busy, load {load} on {cpus} CPUs: the tenth percentiles count")
    if not options.skip_cold:
        machine["cold_start_seconds_64x128_causal"] = cold = bench_cold("64x128")
        print_cold("64x128", cold)
    if options.skip_warm:
        return 0
    print("median (tenth percentile) of host microseconds a call", flush=True)
    records = bench_warm(options.calls)
    names = dict.fromkeys(r["implementation"] for r in records)
    layout = report.Layout(
        title="Host time of one eager call without gradients",
        formula="median of host microseconds from call to return, warm",
        row=("what",),
        panel=("what",),
        x="what",
        value="median_us",
        unit="us",
        labels={name: name for name in names},
        digits=1,
        more={"tenth_us": "ours, tenth percentile", "budget_us": "budget"},
    )
    folder = options.out or harness.default_folder("host-overhead")
    for path in report.write(folder, machine, records, layout, with_plot=False):
        print(f"wrote {path}")
    late = [r["what"] for r in records if r["implementation"] == "ours" and over_budget(r)]
    print(f"over budget: {', '.join(late) or 'nothing'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
