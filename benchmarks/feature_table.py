"""Runs what features.py lists; the --features mode of bench_forward.py."""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import features
import harness
import report
import torch
from features import BESIDE, IMPLEMENTATIONS, Inputs, Problem, Row
from harness import Contestant

WRONG_MEAN = 0.02  # as in bench_forward.py
BURST_US = 5000.0
FORCE_BACKEND = "FLASH_ATTN_INTERFACE_FORCE_BACKEND"

Record = dict[str, Any]


def rows_of(options: argparse.Namespace) -> list[Row]:
    """--dims: pairs among the usual ones keep their features, others are taken for odd ones."""
    if options.dims is None:
        return list(features.make_rows(features.DIMS, features.ODD_PAIRS))
    pairs = harness.parse_dims(options.dims)
    odd = [pair for pair in pairs if pair not in features.NAMED_PAIRS]
    return list(features.make_rows([pair for pair in pairs if pair not in odd], odd))


def compile_all(rows: Sequence[Row], dtype: torch.dtype) -> None:
    """Compiles our kernels of all rows in parallel, before anything is measured."""
    started = time.perf_counter()
    problems = list(dict.fromkeys(p for row in rows for p in (row.problem, row.beside) if p))

    def first_call(problem: Problem) -> None:
        try:
            harness.run_once(features.make_ours(problem, features.draw(problem, dtype)))
        except Exception as error:  # reported again, beside its row, by measure_row
            print(f"{problem}: {error}", flush=True)

    with ThreadPoolExecutor(max_workers=min(14, os.cpu_count() or 1)) as pool:
        list(pool.map(first_call, problems))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    print(f"kernels ready after {time.perf_counter() - started:.1f} s", flush=True)


def checked(
    key: str, problem: Problem, x: Inputs, oracle: features.Oracle
) -> tuple[Contestant, torch.Tensor, harness.Accuracy]:
    """One implementation, after a call that gave what it should. Raises what it raises."""
    contestant = IMPLEMENTATIONS[key][1](problem, x)
    torch.manual_seed(features.SEED)
    out = harness.run_once(contestant)
    torch.cuda.synchronize()  # a fault is this implementation's
    accuracy = oracle.check(out)
    if problem.dropout_p and key != "ours":  # its mask is its own
        if not bool(torch.isfinite(out).all()):
            raise ArithmeticError("not finite")
    elif not accuracy.good:
        bound = f"bound 2 x {accuracy.pytorch_error:.2e}"
        raise ArithmeticError(f"wrong: error {accuracy.error:.2e}, {bound}")
    return contestant, out, accuracy


def measure_row(row: Row, keys: Sequence[str], dtype: torch.dtype, rounds: int) -> list[Record]:
    """Checks, then times. What is absent, fails or is wrong gets a note instead."""
    problem = row.problem
    x = features.draw(problem, dtype)
    oracle = features.Oracle(problem, x)
    notes: dict[str, str] = {}
    contestants: list[Contestant] = []
    accuracies: dict[str, harness.Accuracy] = {}
    agreed: torch.Tensor | None = None
    for key in keys:
        try:
            contestant, out, accuracies[key] = checked(key, problem, x, oracle)
            if not problem.dropout_p:
                if agreed is not None and harness.mean_difference(out, agreed) > WRONG_MEAN:
                    raise ArithmeticError("wrong: differs from ours outside the checked rows")
                agreed = out if agreed is None else agreed
        except Exception as error:  # a peer may refuse in any way; ours is reported as failed
            notes[key] = harness.brief(error)
            continue
        contestants.append(contestant)
    del agreed
    if row.beside and "ours" not in notes:
        beside = features.make_ours(row.beside, features.draw(row.beside, dtype))
        contestants.append(Contestant(BESIDE, beside.call))
    timings, failures = harness.measure_guarded(contestants, rounds, BURST_US)
    notes |= failures

    def rate(key: str, of: Problem) -> float | None:
        return of.flops / timings[key].median_us * 1e-6 if key in timings else None

    ours, plainer = rate("ours", problem), rate(BESIDE, row.beside or problem)
    records = []
    for key in keys:
        timing, tflops = timings.get(key), rate(key, problem)
        accuracy = accuracies.get(key)
        records.append(
            {
                "head_dim_qk": problem.head_dim_qk,
                "head_dim_v": problem.head_dim_v,
                "feature": row.feature,
                "num_heads": ",".join(map(str, problem.num_heads)),
                "sequences": len(problem.lengths),
                "tokens": sum(problem.lengths),
                "visible": round(problem.visible / sum(n * n for n in problem.lengths), 4),
                "implementation": key,
                "tflops": None if tflops is None else round(tflops, 1),
                "beside": row.beside_name,
                "beside_tflops": None if plainer is None else round(plainer, 1),
                "ratio": round(ours / plainer, 2) if ours and plainer else None,
                "median_us": None if timing is None else round(timing.median_us, 2),
                "fastest_us": None if timing is None else round(timing.fastest_us, 2),
                "slowest_us": None if timing is None else round(timing.slowest_us, 2),
                "calls": 0 if timing is None else timing.calls,
                "max_error": None if accuracy is None else accuracy.error,
                "pytorch_error": oracle.pytorch_error,
                "note": notes.get(key, ""),
            }
        )
    return records


def print_row(records: Sequence[Record]) -> None:
    ours = records[0]
    dims = f"({ours['head_dim_qk']},{ours['head_dim_v']})"
    rates = (f"{r['implementation']} {r['tflops'] or '-':>6}" for r in records)
    line = f"{dims:>10} {ours['feature']:<16} {'  '.join(rates)}"
    if ours["ratio"]:
        line += f"   {ours['ratio']:.2f} of {ours['beside']} ({ours['beside_tflops']})"
    print(line, flush=True)


def run(options: argparse.Namespace) -> int:
    keys = ["ours", *(p for p in options.peers.split(",") if p)]
    dtype = harness.DTYPES[options.dtype]
    layout = report.Layout(
        title="What features of the forward cost",
        formula="2 x visible scores x (head_dim_qk + head_dim_v) / time",
        row=("head_dim_qk", "head_dim_v", "feature"),
        panel=("feature",),
        x="head_dim_qk",
        value="tflops",
        unit="TFLOP/s",
        labels={key: IMPLEMENTATIONS[key][0].label for key in keys},
        more={"beside": "beside", "beside_tflops": "its rate", "ratio": "ours / it"},
    )
    machine = harness.describe_machine(options.commit)
    machine["tree"] = tree = os.environ.get(FORCE_BACKEND) or _tree()
    rows = rows_of(options)
    print(f"{machine['gpu']}, torch {machine['torch']}, {tree}, {len(rows)} rows, {options.dtype}")
    print(f"{layout.unit} = {layout.formula}", flush=True)
    torch.manual_seed(0)
    started = time.perf_counter()
    compile_all(rows, dtype)
    records: list[Record] = []
    for done, row in enumerate(rows):
        if done and time.perf_counter() - started > options.seconds:
            print(f"out of time: {len(rows) - done} rows are left out, see --seconds")
            break
        records += measure_row(row, keys, dtype, options.rounds)
        print_row(records[-len(keys) :])
        if not harness.gpu_answers():
            print(f"a kernel of this row failed: {len(rows) - done - 1} rows are left out")
            break
        gc.collect()

    for note in dict.fromkeys(f"{r['implementation']}: {r['note']}" for r in records if r["note"]):
        print(f"note: {note}")
    folder = options.out or harness.default_folder(f"{tree}-features")
    for path in report.write(folder, machine, records, layout, with_plot=False):
        print(f"wrote {path}")
    print(f"{time.perf_counter() - started:.0f} s in all")
    return int(any(r["implementation"] == "ours" and r["note"] for r in records))


def _tree() -> str:
    """Name of the tree that serves by default."""
    from flash_attn_interface import explain

    make = partial(torch.empty, 1, 128, 2, 128, device="cuda", dtype=torch.bfloat16)
    return explain(make(), make(), make()).backend or "none"
