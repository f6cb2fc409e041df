"""What the autotuner shows: progress, the table of before and after, the compiler's report."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence

from .._common.ask.problem import Problem
from .._common.tiles.tuned_tiles import as_record
from .._common.tiles.tuning import Tile, Tunable
from .compile import Report
from .search import Result


class Progress:
    """A bar on a terminal; elsewhere a line at each quarter. One at a time, on stderr."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._begin = time.perf_counter()
        self._moves = sys.stderr.isatty()
        self._quarter = -1
        self._show()

    def advance(self) -> None:
        self._done += 1
        self._show()

    def _show(self) -> None:
        if self._total == 0:
            return
        share = self._done / self._total
        seconds = time.perf_counter() - self._begin
        counter = f"{self._title:<20}{self._done:>5}/{self._total}  {seconds:5.0f} s"
        if self._moves:
            filled = int(24 * share)
            end = "\n" if self._done == self._total else ""
            sys.stderr.write(f"\r[{'#' * filled}{'.' * (24 - filled)}] {counter}{end}")
        elif int(4 * share) > self._quarter:
            self._quarter = int(4 * share)
            sys.stderr.write(f"{counter}\n")
        sys.stderr.flush()


def short(tile: Tile) -> str:
    """A tile in one cell: its fields, without those that are off."""
    parts = []
    for name, value in as_record(tile).items():
        if value is True:
            parts.append(name)
        elif value is not False:
            parts.append(f"{name} {value}")
    return ", ".join(parts)


def rate(direction: str, problem: Problem, us: float) -> str:
    """TFLOP/s: 2 B S^2 H (dqk + dv) forward, 2 B S^2 H (3 dqk + 2 dv) backward, halved when causal;
    of decoding GB/s of the cache.
    """
    p = problem
    qk, v = p.head_dim_qk, p.head_dim_v
    if direction == "decode":
        cache_bytes = 2.0 * p.batch * p.seqlen_k * (p.num_heads_k * qk + p.num_heads_v * v)
        return f"{cache_bytes / us / 1e3:.0f} GB/s"
    columns = 3 * qk + 2 * v if direction == "bwd" else qk + v
    flops = 2.0 * p.batch * p.seqlen_q * p.seqlen_k * p.num_heads_q * columns
    return f"{flops / (2 if p.causal else 1) / us / 1e6:.0f} TFLOP/s"


def before_and_after(rows: Sequence[tuple[Tunable, Mapping[int, Problem], Result]]) -> str:
    """Markdown, one line per key and seqlen."""
    lines = [
        "| key | seqlen | before, us | after, us | gain |",
        "| --- | --- | --- | --- | --- |",
    ]
    for tunable, problems, result in rows:
        for seqlen, problem in problems.items():
            before, after = result.shipped_us[seqlen], result.best_us[seqlen]
            old, new = (
                f"{us:.0f} ({rate(tunable.direction, problem, us)})" for us in (before, after)
            )
            gain = "kept" if result.best is None else f"{before / after:.3f}x"
            lines.append(f"| {result.key} | {seqlen} | {old} | {new} | {gain} |")
    return "\n".join(lines) + "\n"


def tiles_found(rows: Sequence[tuple[Tunable, Mapping[int, Problem], Result]]) -> str:
    """Markdown, one line per key: tiles, and what became of the candidates."""
    lines = [
        "| key | tile before | tile after | timed | left out |",
        "| --- | --- | --- | --- | --- |",
    ]
    for _, _, result in rows:
        after = "the same" if result.best is None else short(result.best)
        out = ", ".join(f"{n} {reason}" for reason, n in sorted(result.rejected.items())) or "none"
        before = "; ".join(dict.fromkeys(map(short, result.shipped.values())))
        lines.append(f"| {result.key} | {before} | {after} | {len(result.screened)} | {out} |")
    return "\n".join(lines) + "\n"


def compile_table(title: str, reports: Sequence[tuple[Tile, Report]], best: int = 8) -> str:
    """What can be said without a GPU: how many compile cleanly, and the first of them."""
    clean = [(tile, report) for tile, report in reports if report.clean]
    spilling = sum(report.resources is not None and not report.clean for _, report in reports)
    failed = sum(report.resources is None for _, report in reports)
    lines = [
        f"{title}: {len(clean)} of {len(reports)} candidates may run, {spilling} spill, "
        f"{failed} do not compile"
    ]
    for tile, report in clean[:best]:
        assert report.resources is not None
        lines.append(f"  {report.resources.registers:>3} registers  {short(tile)}")
    lines += [f"  {short(tile)}: {r.error}" for tile, r in reports if r.resources is None]
    return "\n".join(lines)
