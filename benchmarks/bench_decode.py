"""Decoding speed: TB/s of cache that one new token per sequence makes a kernel read.

32 query heads, every key valid, beside SDPA and, where it is found (see peers.py), FA3; then rows
of absorbed latent attention: qv, head dims 64 and 512, one key head, 16, 32 and 128 query heads.
The figure to compare with is the machine's own copy rate, which is measured first. Every result is
checked against float32 attention before it is timed. Caches below 200 MB are used in turn with
copies of themselves, so that none is found in L2.

    python benchmarks/bench_decode.py                  up to 90 seconds, compilation included
    python benchmarks/bench_decode.py --seconds 600    all rows, however slow the machine
    python benchmarks/bench_decode.py --quick          fewer shapes and page sizes
    python benchmarks/bench_decode.py --dims 64x128 --heads 8,1 --shapes 64x8192 --pages 0,16
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import decode_peers
import harness
import peers
import report
import torch
from bench_host_overhead import call_times_us
from decode_peers import Decode
from harness import Contestant
from torch import Tensor

NUM_HEADS_Q = 32
LATENT_HEADS, LATENT_DIMS, LATENT_PAGES = "16,32,128", (64, 512), (0, 64)
DIMS = "128,64x128,192x128"
HEADS = "8,4,1"
SHAPES = "1x65536,16x8192,64x8192,128x2048"
PAGES = "0,16,64,256"
QUICK_SHAPES, QUICK_PAGES = "1x65536,64x8192", "0,16"
COLD_BYTES = 200e6
COPY_BYTES = 2 << 30
SAMPLED_SEQUENCES = 2

Row = dict[str, Any]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dims", default=DIMS, help="QK or QKxV, comma-separated")
    parser.add_argument("--heads", default=HEADS, help="key and value heads")
    parser.add_argument(
        "--latent-heads", default=LATENT_HEADS, help="query heads of the rows with qv; %(default)s"
    )
    parser.add_argument("--shapes", default=None, help=f"BATCHxKEYS, default {SHAPES}")
    parser.add_argument("--pages", default=None, help=f"page sizes, 0 = contiguous; {PAGES}")
    parser.add_argument("--dtype", choices=list(harness.DTYPES), default="bf16")
    parser.add_argument("--peers", default=",".join(decode_peers.PEERS), help="%(default)s")
    parser.add_argument(
        "--seconds", type=float, default=90.0, help="then no further row is begun; %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=None, help="default 3")
    parser.add_argument("--quick", action="store_true", help="two shapes, page sizes 0 and 16")
    parser.add_argument("--out", type=Path, default=None, help="folder for the results")
    parser.add_argument("--commit", default=None, help="for the record, where git is not at hand")
    options = parser.parse_args(arguments)
    options.shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
    options.pages = options.pages or (QUICK_PAGES if options.quick else PAGES)
    options.rounds = options.rounds or (2 if options.quick else 3)
    unknown = set(filter(None, options.peers.split(","))) - set(decode_peers.PEERS)
    if unknown:
        parser.error(f"unknown peers {sorted(unknown)}; known: {', '.join(decode_peers.PEERS)}")
    return options


def make_rows(options: argparse.Namespace) -> list[Row]:
    """Those of --quick first, since the time may not suffice for all."""
    shapes = [tuple(map(int, text.split("x"))) for text in options.shapes.split(",")]
    pages = [int(text) for text in options.pages.split(",")]
    heads_k = [int(text) for text in options.heads.split(",")]
    latent_heads = [int(text) for text in options.latent_heads.split(",") if text]
    latent_pages = [n for n in LATENT_PAGES if n in pages]
    combinations = [
        *itertools.product(
            harness.parse_dims(options.dims), [False], [NUM_HEADS_Q], heads_k, shapes, pages
        ),
        *itertools.product([LATENT_DIMS], [True], latent_heads, [1], shapes, latent_pages),
    ]
    rows: list[Row] = [
        {
            "dtype": options.dtype,
            "head_dim_qk": head_dim_qk,
            "head_dim_v": head_dim_v,
            "qv": qv,
            "num_heads_q": num_heads_q,
            "num_heads_k": num_heads_k,
            "batch": batch,
            "seqlen": seqlen,
            "page_size": page_size,
        }
        for (head_dim_qk, head_dim_v), qv, num_heads_q, num_heads_k, (batch, seqlen), page_size in (
            combinations
        )
    ]
    return sorted(
        rows,
        key=lambda row: (
            f"{row['batch']}x{row['seqlen']}" not in QUICK_SHAPES.split(",")
            or str(row["page_size"]) not in QUICK_PAGES.split(",")
        ),
    )


def cache_bytes(row: Row) -> int:
    """Keys and values that have to be read, once."""
    per_token = row["num_heads_k"] * (row["head_dim_qk"] + row["head_dim_v"])
    return int(row["batch"] * row["seqlen"] * per_token * harness.DTYPES[row["dtype"]].itemsize)


def draw(row: Row, cold: bool = True) -> Decode:
    """cold: with as many copies of a small cache as it takes."""
    batch, seqlen, page_size = row["batch"], row["seqlen"], row["page_size"]
    dtype = harness.DTYPES[row["dtype"]]

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    leading, table = (batch, seqlen), None
    if page_size:
        pages = batch * seqlen // page_size
        leading = (pages, page_size)
        table = torch.randperm(pages, device="cuda", dtype=torch.int32).view(batch, -1)
    k = tensor(*leading, row["num_heads_k"], row["head_dim_qk"])
    v = tensor(*leading, row["num_heads_k"], row["head_dim_v"])
    copies = int(COLD_BYTES / cache_bytes(row)) if cold else 0
    heads_q = row["num_heads_q"]
    return Decode(
        tensor(batch, 1, heads_q, row["head_dim_qk"]),
        [(k, v), *((k.clone(), v.clone()) for _ in range(copies))],
        table,
        torch.full((batch,), seqlen, device="cuda", dtype=torch.int32),
        tensor(batch, 1, heads_q, row["head_dim_v"]) if row["qv"] else None,
    )


class Oracle:
    """float32 attention of all heads of a few sequences."""

    def __init__(self, problem: Decode) -> None:
        batch, _, num_heads_q, _ = problem.q.shape
        self.samples = sorted({0, batch // 2, batch - 1})[-SAMPLED_SEQUENCES:]
        self.expected, self.pytorch_error = [], 0.0
        for b in self.samples:
            k, v = problem.caches[0]
            if problem.page_table is None:
                k, v = k[b], v[b]
            else:
                k, v = (x[problem.page_table[b].long()].flatten(0, 1) for x in (k, v))
            group, q = num_heads_q // k.shape[1], problem.q[b, 0]
            if problem.qv is not None:
                q, k = torch.cat([q, problem.qv[b, 0]], -1), torch.cat([k, v], -1)
            inputs = [q.unflatten(0, (-1, group)), k.transpose(0, 1), v.transpose(0, 1)]
            exact = _attention(*(x.float() for x in inputs), problem.softmax_scale)
            rounded = _attention(*inputs, problem.softmax_scale)
            self.expected.append(exact)
            self.pytorch_error = max(self.pytorch_error, _largest(rounded.float() - exact))

    def check(self, out: Tensor) -> harness.Accuracy:
        """out: (batch, 1, num_heads_q, head_dim_v). Non-finite anywhere counts as wrong."""
        errors = [
            _largest(out[b, 0].float() - exact)
            for b, exact in zip(self.samples, self.expected, strict=True)
        ]
        finite = bool(torch.isfinite(out).all())
        return harness.Accuracy(max(errors) if finite else float("inf"), self.pytorch_error)


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q (heads_k, group, dim), k and v (heads_k, keys, dim) -> (num_heads_q, head_dim_v)."""
    return (torch.softmax((q @ k.mT) * scale, -1) @ v).flatten(0, 1)


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def copy_rate() -> float:
    """TB/s that torch's copy reads and writes in all."""
    source = torch.empty(COPY_BYTES, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = Contestant("copy", lambda: target.copy_(source))
    return 2 * COPY_BYTES / harness.measure([copy])["copy"].median_us * 1e-6


def compile_all(rows: Sequence[Row]) -> None:
    """Compiles our kernels of all rows in parallel, before anything is measured.

    Page sizes share their kernels. As many at once as have room for their tensors.
    """
    paged = next((row["page_size"] for row in rows if row["page_size"]), 0)
    rows = [row for row in rows if row["page_size"] in (0, paged)]
    largest = max(map(cache_bytes, rows))
    free, _ = torch.cuda.mem_get_info()
    workers = max(1, min(os.cpu_count() or 1, 16, int(free / (1.5 * largest))))
    started = time.perf_counter()

    def first_call(row: Row) -> None:
        try:
            harness.run_once(decode_peers.OURS.make(draw(row, cold=False)))
        except Exception as error:  # reported again, beside its row, by bench_row
            print(f"{row}: {error}", flush=True)

    with ThreadPoolExecutor(max_workers=workers) as pool:
        list(pool.map(first_call, rows))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    print(f"kernels ready after {time.perf_counter() - started:.1f} s", flush=True)


def bench_row(
    row: Row, implementations: Sequence[decode_peers.Implementation], rounds: int, copied: float
) -> list[Row]:
    """Checks, then times. What is absent, fails or is wrong gets a note instead."""
    notes: dict[str, str] = {}
    accuracies: dict[str, harness.Accuracy] = {}
    contestants: list[Contestant] = []
    problem = oracle = None
    try:
        problem = draw(row)
        oracle = Oracle(problem)
    except torch.cuda.OutOfMemoryError:
        notes = dict.fromkeys((i.key for i in implementations), "this GPU has too little memory")
    for implementation in implementations:
        if problem is None or oracle is None:
            break
        key = implementation.key
        try:
            contestant = implementation.make(problem)
            out = harness.run_once(contestant)
            torch.cuda.synchronize()  # a fault is this implementation's
            accuracies[key] = accuracy = oracle.check(out)
        except Exception as error:  # a peer may refuse in any way; ours is reported as failed
            notes[key] = harness.brief(error)
            continue
        if accuracy.good:
            contestants.append(contestant)
        else:
            bound = f"bound 2 x {accuracy.pytorch_error:.2e}"
            notes[key] = f"wrong: error {accuracy.error:.2e}, {bound}"
    timings, failures = harness.measure_guarded(contestants, rounds, burst_us=4000.0)
    notes |= failures
    records = []
    for key in (i.key for i in implementations):
        timing, accuracy = timings.get(key), accuracies.get(key)
        rate = cache_bytes(row) / timing.median_us * 1e-6 if timing else None
        records.append(
            row
            | {
                "implementation": key,
                "tb_per_s": None if rate is None else round(rate, 3),
                "percent_of_copy": None if rate is None else round(100 * rate / copied, 1),
                "median_us": None if timing is None else round(timing.median_us, 2),
                "fastest_us": None if timing is None else round(timing.fastest_us, 2),
                "slowest_us": None if timing is None else round(timing.slowest_us, 2),
                "calls": 0 if timing is None else timing.calls,
                "cache_mb": round(cache_bytes(row) / 1e6, 1),
                "copies": None if problem is None else len(problem.caches),
                "max_error": None if accuracy is None else accuracy.error,
                "pytorch_error": None if oracle is None else oracle.pytorch_error,
                "note": notes.get(key, ""),
            }
        )
    return records


def host_times(implementations: Sequence[decode_peers.Implementation]) -> dict[str, float]:
    """Median host microseconds of a warm eager call, the GPU having next to nothing to do."""
    from flash_attn_interface import flash_attn_with_kvcache

    row: Row = {"dtype": "bf16", "head_dim_qk": 128, "head_dim_v": 128, "qv": False,
                "num_heads_q": NUM_HEADS_Q, "num_heads_k": 8,
                "batch": 4, "seqlen": 512, "page_size": 16}  # fmt: skip
    found = {}
    for implementation in implementations:
        for page_size in (16, 0):
            try:
                contestant = implementation.make(draw(row | {"page_size": page_size}, cold=False))
                times = call_times_us(contestant, 2000)
            except Exception as error:
                print(f"host time of {implementation.key}: {error}".splitlines()[0])
                continue
            found[f"{implementation.key}, page size {page_size}"] = statistics.median(times)
    problem = draw(row, cold=False)
    k_cache, v_cache = problem.caches[0]
    k, v = k_cache[:4, :1].clone(), v_cache[:4, :1].clone()
    table = torch.ones(512, 64, device="cuda", dtype=torch.bfloat16)
    lengths = problem.cache_seqlens - 1

    def append(**rotary: Tensor) -> Tensor:
        out = flash_attn_with_kvcache(
            problem.q, k_cache, v_cache, k, v, cache_seqlens=lengths,
            page_table=problem.page_table, causal=True, **rotary,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    for name, rotary in (
        ("ours, append", {}),
        ("ours, append and rotary", {"rotary_cos": table, "rotary_sin": table}),
    ):
        times = call_times_us(Contestant(name, partial(append, **rotary)), 2000)
        found[name] = statistics.median(times)
    return {name: round(value, 1) for name, value in found.items()}


def print_row(records: Sequence[Row]) -> None:
    row = records[0]
    ours = row["tb_per_s"]
    cells = [f"ours {ours:5.2f} TB/s {row['percent_of_copy']:5.1f} % of copy" if ours else "ours -"]
    for r in records[1:]:
        name, peer = r["implementation"], r["tb_per_s"]
        ratio = f"{ours / peer:4.2f}" if ours and peer else "   -"
        cells.append(f"{name} {peer:5.2f} TB/s ours/{name} {ratio}" if peer else f"{name} -")
    dims = f"({row['head_dim_qk']},{row['head_dim_v']})"
    shape = f"{row['batch']}x{row['seqlen']}"
    pages = f"page {row['page_size']}" if row["page_size"] else "contiguous"
    heads = f"{row['num_heads_q']}/{row['num_heads_k']}{' qv' if row['qv'] else ''}"
    print(f"{dims:>9} {heads:<8}  {shape:<8} {pages:<10}  {'   '.join(cells)}",
          flush=True)  # fmt: skip


def main() -> int:
    options = parse_arguments()
    harness.require_gpu()
    peers.prepare(options.peers.split(","))
    chosen = [decode_peers.PEERS[p] for p in options.peers.split(",") if p]
    implementations = [decode_peers.OURS, *chosen]
    panel = ("head_dim_qk", "head_dim_v", "num_heads_q", "num_heads_k", "page_size")
    layout = report.Layout(
        title="Decoding: one token a sequence over a cache",
        formula="bytes of valid keys and values / time",
        row=(*panel, "batch", "seqlen"),
        panel=panel,
        x="batch",
        value="tb_per_s",
        unit="TB/s",
        labels={i.key: i.label for i in implementations},
        digits=2,
        more={"percent_of_copy": "% of copy"},
    )
    machine = harness.describe_machine(options.commit)
    rows = make_rows(options)
    started = time.perf_counter()
    torch.manual_seed(0)
    copied = copy_rate()
    print(f"{machine['gpu']}, torch {machine['torch']}, {len(rows)} rows, {options.dtype}")
    print(f"torch copies {copied:.2f} TB/s (read and written); TB/s = {layout.formula}", flush=True)
    compile_all(rows)
    machine["host_us_per_call"] = host_times(implementations)
    machine["copy_tb_per_s"] = round(copied, 3)
    for name, value in machine["host_us_per_call"].items():  # type: ignore[attr-defined]
        print(f"host {value:6.1f} us: {name}")
    records: list[Row] = []
    for done, row in enumerate(rows):
        if time.perf_counter() - started > options.seconds and done > 0:
            print(f"out of time: {len(rows) - done} rows are left out, see --seconds")
            break
        records += bench_row(row, implementations, options.rounds, copied)
        print_row(records[-len(implementations) :])
        if not harness.gpu_answers():
            print(f"a kernel of this row failed: {len(rows) - done - 1} rows are left out")
            break
        torch.cuda.empty_cache()

    for note in dict.fromkeys(f"{r['implementation']}: {r['note']}" for r in records if r["note"]):
        print(f"note: {note}")
    folder = options.out or harness.default_folder("decode")
    for path in report.write(folder, machine, records, layout):
        print(f"wrote {path}")
    print(report.summary(records, layout))
    print(f"{time.perf_counter() - started:.0f} s in all")
    failed = [r for r in records if r["implementation"] == "ours" and r["note"]]
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
