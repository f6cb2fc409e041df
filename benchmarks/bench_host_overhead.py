"""What a call costs on the host: microseconds per warm eager call, and the price of a first call.

Warm: median over many calls, without gradients, on a problem so small that the GPU always waits for
the host. SDPA runs on the same tensors with its backend selected outside the timed region.
Cold: two processes after each other share a new cache folder. The first one compiles, the second
one reads the kernel from disk.

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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
import peers
import report
import torch
from harness import Contestant

BATCH, SEQLEN, NUM_HEADS = 1, 64, 2
CALLS_PER_SYNC = 200  # the GPU's launch queue holds about 1000: never measure a full queue
CACHE_DIR = "FLASH_ATTN_INTERFACE_CACHE_DIR"

Record = dict[str, Any]


def small_tensor(head_dim: int) -> torch.Tensor:
    return torch.randn(BATCH, SEQLEN, NUM_HEADS, head_dim, device="cuda", dtype=torch.bfloat16)


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


def varlen_call(head_dim_qk: int, head_dim_v: int, causal: bool) -> Callable[[], torch.Tensor]:
    from flash_attn_interface import flash_attn_varlen_func

    q, k, v = (small_tensor(d)[0] for d in (head_dim_qk, head_dim_qk, head_dim_v))
    cu_seqlens = torch.tensor([0, SEQLEN], device="cuda", dtype=torch.int32)
    arguments = (q, k, v, cu_seqlens, cu_seqlens, SEQLEN, SEQLEN)
    return partial(flash_attn_varlen_func, *arguments, causal=causal)


def contestants(head_dim_qk: int, head_dim_v: int, causal: bool) -> list[Contestant]:
    q, k, v = (small_tensor(d) for d in (head_dim_qk, head_dim_qk, head_dim_v))
    found = [Contestant("ours_varlen", varlen_call(head_dim_qk, head_dim_v, causal))]
    for implementation in (peers.OURS, *peers.PEERS.values()):
        try:
            contestant = implementation.make(q, k, v, causal)
            harness.run_once(contestant)
            found.append(contestant)
        except Exception as error:  # a peer may refuse in any way
            print(f"note: {implementation.key}: {error}".splitlines()[0])
    # What no implementation can go below: allocating the output.
    found.append(Contestant("torch.empty", partial(torch.empty_like, v)))
    return found


def bench_warm(calls: int) -> list[Record]:
    records = []
    for head_dim_qk, head_dim_v, causal in ((64, 64, False), (64, 64, True), (64, 128, True)):
        everyone = contestants(head_dim_qk, head_dim_v, causal)
        samples: dict[str, list[float]] = {c.name: [] for c in everyone}
        rounds = 5
        for _ in range(rounds):
            for contestant in everyone:
                samples[contestant.name] += call_times_us(contestant, calls // rounds)
        for name, us in samples.items():
            ordered = sorted(us)
            records.append(
                {
                    "head_dim_qk": head_dim_qk,
                    "head_dim_v": head_dim_v,
                    "causal": causal,
                    "implementation": name,
                    "median_us": round(statistics.median(ordered), 2),
                    "tenth_us": round(ordered[len(ordered) // 10], 2),
                    "ninetieth_us": round(ordered[len(ordered) * 9 // 10], 2),
                    "calls": len(ordered),
                }
            )
    return records


def child(head_dim_qk: int, head_dim_v: int) -> None:
    """One fresh process: prints how long importing and the first call took, as JSON."""
    started = time.perf_counter()
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    context = time.perf_counter()
    from flash_attn_interface import flash_attn_func

    imported = time.perf_counter()
    q, k, v = (small_tensor(d) for d in (head_dim_qk, head_dim_qk, head_dim_v))
    torch.cuda.synchronize()
    ready = time.perf_counter()
    with torch.no_grad():
        flash_attn_func(q, k, v, causal=True)
    torch.cuda.synchronize()
    first = time.perf_counter() - ready
    seconds = {
        "context_s": context - started,
        "import_s": imported - context,
        "first_call_s": first,
    }
    print(json.dumps(seconds))


def bench_cold(head_dim_qk: int, head_dim_v: int) -> dict[str, dict[str, float]]:
    """first: compiles into an empty cache folder. second: a new process that finds it there."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o700)
        command = [sys.executable, __file__, "--child", f"{head_dim_qk}x{head_dim_v}"]
        for name in ("first", "second"):
            answer = subprocess.run(
                command,
                env={**os.environ, CACHE_DIR: folder},
                capture_output=True,
                text=True,
                check=False,
            )
            if answer.returncode != 0:
                raise SystemExit(f"the {name} process failed:\n{answer.stderr}")
            results[name] = json.loads(answer.stdout.splitlines()[-1])
    return results


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=2000, help="warm calls per implementation")
    parser.add_argument("--skip-cold", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="folder for the results")
    parser.add_argument("--commit", default=None, help="for the record, where git is not at hand")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    options = parse_arguments()
    harness.require_gpu()
    if options.child:
        child(*harness.parse_dims(options.child)[0])
        return 0
    machine = harness.describe_machine(options.commit)
    print(f"{machine['gpu']}, {machine['processor']}, torch {machine['torch']}")
    records = bench_warm(options.calls)
    names = [r["implementation"] for r in records if r["implementation"] != "ours"]
    layout = report.Layout(
        title="Host time of one eager call without gradients",
        formula="median of host microseconds from call to return, warm",
        row=("head_dim_qk", "head_dim_v", "causal"),
        panel=("head_dim_qk", "head_dim_v", "causal"),
        x="head_dim_qk",
        value="median_us",
        unit="us",
        labels={name: name for name in ("ours", *names)},
        digits=1,
    )
    print(report.markdown_table(records, layout))
    if not options.skip_cold:
        machine["cold_start_64x128_causal"] = cold = bench_cold(64, 128)
        for name, seconds in cold.items():
            cells = ", ".join(f"{what} {value:.3f}" for what, value in seconds.items())
            print(f"{name} process: {cells}")
    folder = options.out or harness.default_folder("host-overhead")
    for path in report.write(folder, machine, records, layout, with_plot=False):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
