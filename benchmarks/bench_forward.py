"""Forward speed in TFLOP/s beside SDPA flash, SDPA cuDNN and, where it is found, FA3.

16k tokens in all: batch = 16384 / seqlen, num_heads = 2048 / head_dim_qk (rounded down).
Every result is checked against float32 attention before it is timed.

    python benchmarks/bench_forward.py                       all rows: under 4 minutes on an H100
    python benchmarks/bench_forward.py --quick               three lengths, fewer rounds
    python benchmarks/bench_forward.py --dims 64x128,128 --seqlens 1024,16384 --causal yes
    python benchmarks/bench_forward.py --features   masks, heads, packing, odd head dims: 1 minute

The tree that serves is chosen as for any call: FLASH_ATTN_INTERFACE_FORCE_BACKEND=flash2 measures
the Ampere kernels on a GPU that has others too. What --features measures is in features.py.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import feature_table
import harness
import peers
import report
import torch
from harness import Contestant, Oracle
from torch import Tensor

TOKENS = 16384
HIDDEN = 2048
DIMS = "64,128,256,32x64,64x128,96x192,128x256,192x128"
SEQLENS = "512,1024,2048,4096,8192,16384"
WRONG_MEAN = 0.02  # relative mean difference between two correct 16-bit results is below 0.01

Row = dict[str, Any]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", action="store_true", help="what features cost, at 16k")
    parser.add_argument("--dims", default=None, help=f"QK or QKxV, comma-separated; {DIMS}")
    parser.add_argument("--seqlens", default=None, help=f"default {SEQLENS}")
    parser.add_argument("--causal", choices=["both", "yes", "no"], default="both")
    parser.add_argument("--dtype", choices=list(harness.DTYPES), default="bf16")
    parser.add_argument("--peers", default=",".join(peers.PEERS), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=None, help="default 5")
    parser.add_argument("--quick", action="store_true", help="lengths 1024, 4096, 16384; 3 rounds")
    parser.add_argument("--seconds", type=float, default=120.0, help="limit, with --features")
    parser.add_argument("--out", type=Path, default=None, help="folder for the results")
    parser.add_argument("--commit", default=None, help="for the record, where git is not at hand")
    options = parser.parse_args(arguments)
    options.seqlens = options.seqlens or ("1024,4096,16384" if options.quick else SEQLENS)
    options.rounds = options.rounds or (3 if options.quick or options.features else 5)
    unknown = set(filter(None, options.peers.split(","))) - set(peers.PEERS)
    if unknown:
        parser.error(f"unknown peers {sorted(unknown)}; known: {', '.join(peers.PEERS)}")
    return options


def make_rows(options: argparse.Namespace) -> list[Row]:
    causal = {"both": (False, True), "yes": (True,), "no": (False,)}[options.causal]
    seqlens = [int(s) for s in options.seqlens.split(",")]
    return [
        {
            "dtype": options.dtype,
            "head_dim_qk": head_dim_qk,
            "head_dim_v": head_dim_v,
            "causal": is_causal,
            "seqlen": seqlen,
            "batch": max(1, TOKENS // seqlen),
            "num_heads": max(1, HIDDEN // head_dim_qk),
        }
        for (head_dim_qk, head_dim_v), is_causal, seqlen in itertools.product(
            harness.parse_dims(options.dims or DIMS), causal, seqlens
        )
    ]


def draw_inputs(row: Row) -> tuple[Tensor, Tensor, Tensor]:
    shape = (row["batch"], row["seqlen"], row["num_heads"])
    dims = (row["head_dim_qk"], row["head_dim_qk"], row["head_dim_v"])
    dtype = harness.DTYPES[row["dtype"]]
    q, k, v = (torch.randn(*shape, dim, device="cuda", dtype=dtype) for dim in dims)
    return q, k, v


def compile_all(rows: Sequence[Row]) -> None:
    """Compiles our kernels of all rows in parallel, before anything is measured."""
    started = time.perf_counter()

    def first_call(row: Row) -> None:
        try:
            harness.run_once(peers.OURS.make(*draw_inputs(row), row["causal"]))
        except Exception as error:  # reported again, beside its row, by bench_row
            print(f"{row}: {error}", flush=True)

    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(first_call, rows))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    print(f"kernels ready after {time.perf_counter() - started:.1f} s", flush=True)


def bench_row(row: Row, implementations: Sequence[peers.Implementation], rounds: int) -> list[Row]:
    """Checks, then times. What is absent, fails or is wrong gets a note instead."""
    q, k, v = draw_inputs(row)
    oracle = Oracle(q, k, v, row["causal"])
    notes: dict[str, str] = {}
    accuracies: dict[str, harness.Accuracy] = {}
    contestants: list[Contestant] = []
    agreed: Tensor | None = None  # a whole output that passed: the others are held against it
    for implementation in reversed(implementations):  # peers first, ours last
        key = implementation.key
        try:
            contestant = implementation.make(q, k, v, row["causal"])
            out = harness.run_once(contestant)
        except Exception as error:  # a peer may refuse in any way; ours is reported as failed
            notes[key] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        accuracies[key] = accuracy = oracle.check(out)
        if not accuracy.good:
            bound = f"bound 2 x {accuracy.pytorch_error:.2e}"
            notes[key] = f"wrong: error {accuracy.error:.2e}, {bound}"
        elif agreed is not None and harness.mean_difference(out, agreed) > WRONG_MEAN:
            notes[key] = "wrong: differs from a peer outside the sampled heads"
        else:
            agreed = out if agreed is None else agreed
            contestants.insert(0, contestant)
    timings = harness.measure(contestants, rounds) if contestants else {}
    records = []
    for key in (i.key for i in implementations):
        timing, accuracy = timings.get(key), accuracies.get(key)
        tflops = harness.flops_forward(row) / timing.median_us * 1e-6 if timing else None
        records.append(
            row
            | {
                "implementation": key,
                "tflops": None if tflops is None else round(tflops, 1),
                "median_us": None if timing is None else round(timing.median_us, 2),
                "fastest_us": None if timing is None else round(timing.fastest_us, 2),
                "slowest_us": None if timing is None else round(timing.slowest_us, 2),
                "calls": 0 if timing is None else timing.calls,
                "max_error": None if accuracy is None else accuracy.error,
                "pytorch_error": oracle.pytorch_error,
                "kernel": peers.our_kernel(q, k, v, row["causal"]) if key == "ours" else "",
                "note": notes.get(key, ""),
            }
        )
    return records


def print_row(records: Sequence[Row]) -> None:
    row = records[0]
    dims = f"({row['head_dim_qk']},{row['head_dim_v']})"
    cells = [
        f"{r['implementation']} {r['tflops']:7.1f}" if r["tflops"] else f"{r['implementation']} -"
        for r in records
    ]
    kind = "causal" if row["causal"] else "full"
    print(f"{dims:>10} {kind:<6} S={row['seqlen']:<6} {'   '.join(cells)}", flush=True)


def main() -> int:
    options = parse_arguments()
    harness.require_gpu()
    peers.prepare(options.peers.split(","))
    if options.features:
        return feature_table.run(options)
    implementations = [peers.OURS, *(peers.PEERS[p] for p in options.peers.split(",") if p)]
    layout = report.Layout(
        title="Attention forward",
        formula="2 B S^2 H (head_dim_qk + head_dim_v) / time, halved when causal",
        row=("head_dim_qk", "head_dim_v", "causal", "seqlen"),
        panel=("head_dim_qk", "head_dim_v", "causal"),
        x="seqlen",
        value="tflops",
        unit="TFLOP/s",
        labels={i.key: i.label for i in implementations},
    )
    machine = harness.describe_machine(options.commit)
    rows = make_rows(options)
    print(f"{machine['gpu']}, torch {machine['torch']}, {len(rows)} rows, {options.dtype}")
    print(f"{layout.unit} = {layout.formula}", flush=True)
    torch.manual_seed(0)
    started = time.perf_counter()
    compile_all(rows)
    records: list[Row] = []
    for row in rows:
        records += bench_row(row, implementations, options.rounds)
        print_row(records[-len(implementations) :])

    for note in dict.fromkeys(f"{r['implementation']}: {r['note']}" for r in records if r["note"]):
        print(f"note: {note}")
    for path in report.write(
        options.out or harness.default_folder("forward"), machine, records, layout
    ):
        print(f"wrote {path}")
    print(report.summary(records, layout))
    print(f"{time.perf_counter() - started:.0f} s in all")
    failed = [r for r in records if r["implementation"] == "ours" and r["note"]]
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
