"""Backward, and forward with backward, in TFLOP/s beside SDPA flash, SDPA cuDNN and, where it is at
hand, FA4; our deterministic mode as a column.

16k tokens in all, as bench_forward.py. A peer that takes equal head dims only gets q, k, v padded,
and padding and its gradient are inside the timing, as its users pay them. Gradients are checked
against float32 before anything is timed.

    python benchmarks/bench_backward.py                      all rows
    python benchmarks/bench_backward.py --dims 32x64,64x128,128x256 --pass both
                                                             the speed-up over padding

Beside the tables that every benchmark writes: speedup_over_padding.csv and .png, forward with
backward of the pairs of unequal head dims over padded SDPA flash.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import harness
import peers
import report
import torch
from bench_forward import DIMS, HIDDEN, SEQLENS, TOKENS, draw_inputs
from harness import Contestant
from torch import Tensor

PASSES = ("backward", "both")
IMPLEMENTATIONS = {
    i.key: i
    for i in (peers.OURS, peers.OURS_DETERMINISTIC, peers.SDPA_FLASH, peers.SDPA_CUDNN, peers.FA4)
}
GRADIENT_RATIO = 3  # our error may be this multiple of PyTorch's in the same dtype

Row = dict[str, Any]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dims", default=DIMS, help="QK or QKxV, comma-separated")
    parser.add_argument("--seqlens", default=SEQLENS)
    parser.add_argument("--pass", dest="passes", choices=[*PASSES, "all"], default="all")
    parser.add_argument("--dtype", choices=list(harness.DTYPES), default="bf16")
    parser.add_argument(
        "--implementations", default=",".join(IMPLEMENTATIONS), help="comma-separated, ours first"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="folder for the results")
    parser.add_argument("--commit", default=None, help="for the record, where git is not at hand")
    return parser.parse_args()


def make_rows(options: argparse.Namespace) -> list[Row]:
    return [
        {
            "dtype": options.dtype,
            "head_dim_qk": head_dim_qk,
            "head_dim_v": head_dim_v,
            "causal": causal,
            "seqlen": seqlen,
            "batch": max(1, TOKENS // seqlen),
            "num_heads": max(1, HIDDEN // head_dim_qk),
        }
        for (head_dim_qk, head_dim_v), causal, seqlen in itertools.product(
            harness.parse_dims(options.dims), (False, True), map(int, options.seqlens.split(","))
        )
    ]


def flops(row: Row, which: str) -> float:
    """Backward: 2 B S^2 H (3 head_dim_qk + 2 head_dim_v), halved when causal."""
    qk, v = row["head_dim_qk"], row["head_dim_v"]
    forward = harness.flops_forward(row)
    backward = forward * (3 * qk + 2 * v) / (qk + v)
    return backward if which == "backward" else forward + backward


class Training:
    """One implementation on inputs that require gradients: output kept for the backward alone."""

    def __init__(
        self, implementation: peers.Implementation, inputs: Sequence[Tensor], causal: bool
    ):
        self.inputs = tuple(x.detach().requires_grad_() for x in inputs)
        self.forward = implementation.make(*self.inputs, causal)
        with torch.enable_grad(), self.forward.scope():
            self.out = self.forward.call()

    def gradients(self, dout: Tensor) -> tuple[Tensor, ...]:
        with self.forward.scope():
            return torch.autograd.grad(self.out, self.inputs, dout, retain_graph=True)

    def contestant(self, key: str, which: str, dout: Tensor) -> Contestant:
        def both() -> Tensor:
            with torch.enable_grad():
                return torch.autograd.grad(self.forward.call(), self.inputs, dout)[0]

        def backward() -> Tensor:
            return torch.autograd.grad(self.out, self.inputs, dout, retain_graph=True)[0]

        calls: dict[str, Callable[[], Tensor]] = {"backward": backward, "both": both}
        return Contestant(key, calls[which], self.forward.scope)


def sampled_gradients(
    inputs: Sequence[Tensor], dout: Tensor, causal: bool, dtype: torch.dtype
) -> list[Tensor]:
    """dq, dk, dv of the last head of the last batch entry, in the given dtype."""
    q, k, v, grad = (x[-1, :, -1].detach().to(dtype) for x in (*inputs, dout))
    for x in (q, k, v):
        x.requires_grad_()
    scores = q @ (k * q.shape[-1] ** -0.5).T
    if causal:
        hidden = torch.ones(scores.shape, dtype=torch.bool, device=q.device).triu_(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    out = torch.softmax(scores, -1) @ v
    return [x.float() for x in torch.autograd.grad(out, (q, k, v), grad)]


def wrong(gradients: Sequence[Tensor], exact: Sequence[Tensor], rough: Sequence[Tensor]) -> str:
    """What is wrong with our gradients; empty if nothing."""
    for name, ours, want, low in zip(("dq", "dk", "dv"), gradients, exact, rough, strict=True):
        if not bool(torch.isfinite(ours).all()):
            return f"{name} is not finite"
        error = float((ours[-1, :, -1].float() - want).abs().max())
        bound = GRADIENT_RATIO * float((low - want).abs().max()) + 1e-5
        if error > bound:
            return f"{name}: error {error:.2e}, bound {bound:.2e}"
    return ""


def bench_row(
    row: Row,
    passes: Sequence[str],
    rounds: int,
    implementations: Sequence[peers.Implementation],
) -> list[Row]:
    inputs = draw_inputs(row)
    dout = torch.randn_like(inputs[2])
    exact, rough = (
        sampled_gradients(inputs, dout, row["causal"], dtype)
        for dtype in (torch.float32, inputs[0].dtype)
    )
    ready: dict[str, Training] = {}
    notes: dict[str, str] = {}
    for implementation in implementations:
        key = implementation.key
        try:
            training = Training(implementation, inputs, row["causal"])
            problem = wrong(training.gradients(dout), exact, rough)
        except Exception as error:  # a peer may refuse in any way; ours is reported as failed
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        if problem:
            notes[key] = problem
        else:
            ready[key] = training
    records = []
    for which in passes:
        contestants = [t.contestant(key, which, dout) for key, t in ready.items()]
        timings = harness.measure(contestants, rounds) if contestants else {}
        for key in (i.key for i in implementations):
            timing = timings.get(key)
            tflops = round(flops(row, which) / timing.median_us * 1e-6, 1) if timing else None
            records.append(
                {"pass": which, **row, "implementation": key, "tflops": tflops}
                | {"median_us": round(timing.median_us, 2) if timing else None}
                | {"calls": timing.calls if timing else 0, "note": notes.get(key, "")}
            )
    return records


def print_row(records: Sequence[Row]) -> None:
    row = records[0]
    cells = [f"{r['implementation']} {r['tflops'] or '-'}" for r in records]
    kind = "causal" if row["causal"] else "full"
    dims = f"({row['head_dim_qk']},{row['head_dim_v']})"
    print(
        f"{row['pass']:<9}{dims:>10} {kind:<6} S={row['seqlen']:<6} {'  '.join(cells)}", flush=True
    )


def compile_all(rows: Sequence[Row]) -> None:
    """Compiles our kernels of all rows in parallel, before anything is measured."""

    def first_call(row: Row) -> None:
        small = row | {"batch": 1, "num_heads": 1, "seqlen": 128}
        inputs = draw_inputs(small)
        try:
            Training(peers.OURS, inputs, row["causal"]).gradients(torch.randn_like(inputs[2]))
        except Exception as error:  # reported again, beside its row, by bench_row
            print(f"{row}: {error}", flush=True)

    distinct = {(r["head_dim_qk"], r["head_dim_v"], r["causal"]): r for r in rows}
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(first_call, distinct.values()))
    torch.cuda.synchronize()


def speedups_over_padding(records: Sequence[Row]) -> list[Row]:
    """Forward with backward, ours over SDPA flash; only where the head dims are unequal."""
    fields = ("head_dim_qk", "head_dim_v", "causal", "seqlen")
    tflops: dict[tuple[Any, ...], dict[str, float]] = {}
    for record in records:
        unequal = record["head_dim_qk"] != record["head_dim_v"]
        if unequal and record["pass"] == "both" and record["tflops"] is not None:
            row = tflops.setdefault(tuple(record[name] for name in fields), {})
            row[record["implementation"]] = record["tflops"]
    ours, padded = peers.OURS.key, peers.SDPA_FLASH.key
    return [
        dict(zip(fields, row, strict=True))
        | {"implementation": f"({row[0]}, {row[1]})", "speedup": round(of[ours] / of[padded], 3)}
        for row, of in tflops.items()
        if ours in of and padded in of
    ]


def write_speedups(folder: Path, machine: Row, records: Sequence[Row]) -> list[Path]:
    """Writes the figure that this family of kernels is known by, and adds it to the folder's page.
    Nothing without unequal head dims.
    """
    speedups = speedups_over_padding(records)
    if not speedups:
        return []
    layout = report.Layout(
        title="Forward with backward, times faster than padded FA2",
        formula="time of SDPA flash on q, k, v padded to the larger head dim / ours",
        row=("causal", "seqlen"),
        panel=("causal",),
        x="seqlen",
        value="speedup",
        unit="speed-up",
        labels={name: name for name in dict.fromkeys(s["implementation"] for s in speedups)},
    )
    table, picture = folder / "speedup_over_padding.csv", folder / "speedup_over_padding.png"
    report.write_csv(table, speedups)
    subtitle = f"{machine['gpu']}, {machine['date']}, torch {machine['torch']}"
    drawn = report.plot(picture, speedups, layout, subtitle)
    with (folder / "README.md").open("a", encoding="utf-8") as page:
        page.write(f"\n## {layout.title}\n\n{layout.formula}; rows in {table.name}\n")
        page.write(f"\n![speed-up over padding]({picture.name})\n" if drawn else "")
    return [table, *([picture] if drawn else [])]


def main() -> int:
    options = parse_arguments()
    harness.require_gpu()
    passes = PASSES if options.passes == "all" else (options.passes,)
    implementations = [IMPLEMENTATIONS[key] for key in options.implementations.split(",")]
    peers.prepare(i.key for i in implementations)
    layout = report.Layout(
        title="Attention backward, and forward with backward",
        formula="backward 2 B S^2 H (3 head_dim_qk + 2 head_dim_v) / time, both + "
        "2 B S^2 H (head_dim_qk + head_dim_v); halved when causal",
        row=("pass", "head_dim_qk", "head_dim_v", "causal", "seqlen"),
        panel=("pass", "head_dim_qk", "head_dim_v", "causal"),
        x="seqlen",
        value="tflops",
        unit="TFLOP/s",
        labels={i.key: i.label for i in implementations},
    )
    machine = harness.describe_machine(options.commit)
    rows = make_rows(options)
    print(f"{machine['gpu']}, torch {machine['torch']}, {len(rows)} rows, {options.dtype}")
    torch.manual_seed(0)
    compile_all(rows)
    records: list[Row] = []
    for row in rows:
        new = bench_row(row, passes, options.rounds, implementations)
        for which in passes:
            print_row([r for r in new if r["pass"] == which])
        records += new
    for note in dict.fromkeys(f"{r['implementation']}: {r['note']}" for r in records if r["note"]):
        print(f"note: {note}")
    folder = options.out or harness.default_folder("backward")
    paths = report.write(folder, machine, records, layout)
    for path in [*paths, *write_speedups(folder, machine, records)]:
        print(f"wrote {path}")
    print(report.summary(records, layout))
    return 1 if any(r["implementation"] == "ours" and r["note"] for r in records) else 0


if __name__ == "__main__":
    raise SystemExit(main())
