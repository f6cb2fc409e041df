"""From the autotuner's results to tables of tiles: of this GPU, and derived for other archs.

`common/tiles/tuned_tiles.py` reads them at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from .._common.ask.problem import Problem
from .._common.runtime.spec import KernelSpec
from .._common.tiles import tuned_tiles
from .._common.tiles.tuned_tiles import Entry, Table, as_record
from .._common.tiles.tuning import Tile, Tunable
from .compile import Report, together
from .search import TIE, Result

Row = tuple[Tunable, Mapping[int, Problem], Result]
"""What was tuned, the problems that were timed by seqlen, and what came of it."""

CompileAll = Callable[[Sequence[KernelSpec], str], Mapping[KernelSpec, Report]]


def entry(result: Result) -> Entry | None:
    """What a table keeps of a result; None if what is in use stays."""
    if result.best is None:
        return None
    return Entry(
        as_record(result.best),
        {
            "speedup": round(result.speedup, 3),
            "us": {str(seqlen): round(us, 1) for seqlen, us in result.best_us.items()},
            "us_before": {str(seqlen): round(us, 1) for seqlen, us in result.shipped_us.items()},
            **{name: fact for name, fact in result.facts.items() if name != "gpu"},
        },
    )


def entries(path: Path, results: Iterable[Result]) -> dict[str, Entry | None]:
    """What results change in the table at `path`. Where what is in use stays, and it is what the
    table says (the package's own), nothing; else None.
    """
    table = tuned_tiles.read(path)
    found: dict[str, Entry | None] = {}
    for result in results:
        before = None if table is None else table.entries.get(result.key)
        in_use = [as_record(tile) for tile in result.shipped.values()]
        if result.best is not None or before is None or dict(before.tile) not in in_use:
            found[result.key] = entry(result)
    return found


def update_table(
    path: Path, gpu: str, arch: str, origin: str, found: Mapping[str, Entry | None]
) -> Table:
    """Lays entries over the table at `path`; None takes one out, since the choice without it is as
    good. A table of another GPU that happens to be there is replaced.
    """
    arch = tuned_tiles.plain(arch)
    table = tuned_tiles.read(path)
    if table is None or (table.gpu, table.arch) != (gpu, arch):
        table = Table(gpu, arch, origin)
    laid_over = {**table.entries, **found}
    kept = {key: value for key, value in laid_over.items() if value is not None}
    table = replace(table, origin=origin, entries=kept)
    if kept or path.exists():
        tuned_tiles.write(path, table)
    tuned_tiles.forget()
    return table


def derive(
    arch: str,
    rows: Sequence[Row],
    compile_all: CompileAll,
) -> dict[str, Entry | None]:
    """Entries for an architecture that is not at hand: of the tiles timed on this one, the fastest
    that fits there and does not spill when compiled for it, where that beats the tree's own choice
    there by the times of this GPU. None where nothing does.
    """
    found: dict[str, Entry | None] = {}
    left: dict[str, list[tuple[Tile, float, tuple[KernelSpec, ...]]]] = {}
    for tunable, problems, result in rows:
        problem = next(iter(problems.values()))
        builtin, times = tunable.builtin(problem, arch), dict(result.screened)
        if builtin not in times:
            continue  # nothing to compare with
        found[result.key] = None
        left[result.key] = [
            (tile, times[builtin] / us, tunable.specs(problem, arch, tile))
            for tile, us in sorted(times.items(), key=lambda item: item[1])
            if us < times[builtin] / (1 + TIE) and tunable.refuses(tile, problem, arch) is None
        ]
    while any(left.values()):  # the fastest left of every key at once, until one does not spill
        asked = {key: candidates.pop(0) for key, candidates in left.items() if candidates}
        specs = [spec for _, _, specs in asked.values() for spec in specs]
        reports = compile_all(specs, f"compile for {arch}")
        for key, (tile, gain, specs_of_tile) in asked.items():
            if together(reports[spec] for spec in specs_of_tile).clean:
                found[key] = Entry(as_record(tile), {"speedup_where_timed": round(gain, 3)})
                left[key] = []
    return found


def write_results(folder: Path, arch: str, results: Iterable[Result]) -> None:
    """Into the table of the GPU model that they were measured on."""
    for result in results:
        gpu = result.facts["gpu"]
        path = folder / tuned_tiles.file_name(arch, gpu)
        update_table(path, gpu, arch, f"measured on {gpu}", entries(path, [result]))


def write_derived(
    folder: Path, arch: str, others: Sequence[str], rows: Sequence[Row], compile_all: CompileAll
) -> None:
    """Tables for all GPUs of architectures. arch: of the GPU that the rows were timed on, whose
    other models get the same tiles.
    """
    if not rows:
        return
    gpu = rows[0][2].facts["gpu"]
    for other in map(tuned_tiles.plain, others):
        path = folder / tuned_tiles.file_name(other)
        if other == tuned_tiles.plain(arch):
            found = entries(path, [result for _, _, result in rows])
            origin = f"for all of {other}; measured on {gpu}"
        else:
            of_flash2 = [row for row in rows if row[0].tree == "flash2"]
            found = derive(other, of_flash2, compile_all)
            origin = (
                f"derived for {other}, not measured there: of the tiles that fit there without "
                f"spilling, the fastest on {gpu}"
            )
        update_table(path, "", other, origin, found)
