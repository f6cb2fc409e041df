"""`python -m flash_attn_interface tune`: find better tiles for head dims on the present GPU.

For each kernel tree, direction, dtype and mask it compiles candidate tiles in parallel, leaves out
those that spill registers or compute something wrong, times the rest beside the tile in use, and
writes what is faster into this user's table for this GPU model, which the next process uses. It
never makes a choice worse, and it goes on where an earlier run was interrupted. Without a GPU it
compiles the candidates for --arch and stops there. docs/autotuner.md has the details.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import torch

from .. import command_line
from .._common.ask.problem import Problem, Target
from .._common.launch import driver
from .._common.prebuild import build as prebuild
from .._common.runtime import compiler, trust
from .._common.runtime.spec import KernelSpec
from .._common.tiles import tuned_tiles
from .._common.tiles.tuning import Tunable
from .._flash2.tuning import backward_problem, cache_problem
from ..call.backends import Backend
from ..call.selection import Device, device_of, installed_backends, target_for
from ..call.simulation import capability_of
from . import compile as tune_compile
from . import report as tune_report
from . import tables as tune_tables
from .compile import Report
from .journal import Journal
from .measure import DTYPES, FEATURES, cuda_clock, make_problem
from .search import DeviceLostError, Result, Search, Settings, run
from .tables import Row

# Of the check against the reference: several tiles each way, and a ragged end of every size.
CHECK_SIZES = {"batch": 2, "heads": 2, "seqlen_q": 300, "seqlen_k": 333, "window": 100}
# 2048 columns of Q in all, as in docs/performance/.
Q_COLUMNS = 2048
# Of decoding: one query row, four query heads for each head of a cache of so many tokens.
DECODE_TOKENS, DECODE_HEADS = 131072, {"heads": 32, "heads_kv": 8}

MODULE = "flash_attn_interface.tune"
CompileAll = Callable[[Iterable[KernelSpec], str], Mapping[KernelSpec, Report]]


@dataclass(frozen=True)
class Subject:
    """One key to tune."""

    tunable: Tunable
    target: Target
    settings: Settings

    @property
    def problem(self) -> Problem:
        return next(iter(self.settings.problems.values()))

    @property
    def key(self) -> str:
        return self.tunable.key(self.problem)


@command_line.guarded
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status: 0 done, 1 some keys failed, 2 wrong usage."""
    options = parser().parse_args(arguments)
    has_gpu = torch.cuda.is_available() and options.arch is None
    if not has_gpu and options.arch is None:
        print("No GPU here: name one to compile for, for instance --arch sm_80.", file=sys.stderr)
        return 2
    device = _device(options) if has_gpu else Device(capability_of(options.arch))
    found = subjects(options, device)
    if not found:
        print(f"No kernel of {', '.join(options.tree or ['any tree'])} can be tuned for this.")
        return 2
    if options.output is not None:
        command_line.make_folder(options.output)
    journal = Journal(None if options.fresh else _journal_path(options))

    def compile_all(specs: Iterable[KernelSpec], title: str) -> Mapping[KernelSpec, Report]:
        distinct = list(dict.fromkeys(specs))
        advance = tune_report.Progress(title, len(distinct)).advance
        return tune_compile.compile_all(distinct, options.jobs, journal, advance)

    if not has_gpu and options.derive:
        return derive_only(options, device, found, journal, compile_all)
    if not has_gpu or options.compile_only:
        compile_only(found, compile_all)
        return 0
    try:
        return tune(options, device, found, journal, compile_all)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return command_line.INTERRUPTED
    except DeviceLostError as error:
        print(f"{error}\nThe GPU cannot be used after that in this process.", file=sys.stderr)
        if arguments is not None or journal.path is None:
            return 1
        print("Starting again without this candidate.", file=sys.stderr, flush=True)
        os.execv(sys.executable, [sys.executable, "-m", MODULE, *sys.argv[1:]])


def tune(
    options: argparse.Namespace,
    device: Device,
    found: Sequence[Subject],
    journal: Journal,
    compile_all: CompileAll,
) -> int:
    """Searches all keys; writes each result as soon as it is known."""
    facts = {"gpu": device.gpu, "driver": _driver_version(), "date": _today()}
    machine = f"{device.gpu}, {facts['driver']}, torch {torch.__version__}"
    searches = [Search(s.tunable, s.target, s.settings, journal, machine, facts) for s in found]
    folder, arch = _table_folder(options), target_for("flash2", device).arch
    rows: dict[int, Row] = {}

    def done(i: int, result: Result) -> None:
        rows[i] = (found[i].tunable, found[i].settings.problems, result)
        if folder is not None:
            tune_tables.write_results(folder, arch, [result])

    with torch.cuda.device(device.index):
        failures = run(
            searches,
            compile_all,
            cuda_clock,
            lambda title, total: tune_report.Progress(title, total).advance,
            done,
            options.seconds,
        )
    in_order = [row for _, row in sorted(rows.items())]
    text = f"{tune_report.before_and_after(in_order)}\n{tune_report.tiles_found(in_order)}"
    print(text)
    if options.report is not None:
        command = shlex.join(["python", "-m", MODULE, *sys.argv[1:]])
        head = f"{machine}, {compiler.loaded_version()}, {_today()}\n\n```bash\n{command}\n```\n\n"
        options.report.write_text(head + text, encoding="utf-8")
    if folder is not None:
        tune_tables.write_derived(folder, arch, options.derive, in_order, compile_all)
        print(f"Tables are in {folder}")
    _discard_losers(searches, rows)
    for failure in failures.values():
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _discard_losers(searches: Sequence[Search], rows: Mapping[int, Row]) -> None:
    kept: set[KernelSpec] = set()
    lost: set[KernelSpec] = set()
    for i, search in enumerate(searches):
        best = rows[i][2].best if i in rows else None
        for tile in search.waved:
            wanted = tile == best or tile in search.shipped.values()
            (kept if wanted else lost).update(search.specs(tile))
    tune_compile.discard(lost - kept)


def derive_only(
    options: argparse.Namespace,
    device: Device,
    found: Sequence[Subject],
    journal: Journal,
    compile_all: CompileAll,
) -> int:
    """Derived tables from what the journal holds of a run on a GPU of --arch."""
    folder = _table_folder(options)
    latest = {fact["key"]: fact for fact in journal.all("result")}
    rows = [
        (s.tunable, s.settings.problems, Result.from_fact(s.tunable.kind, latest[s.key]))
        for s in found
        if s.key in latest
    ]
    print(f"{len(rows)} of {len(found)} keys have results in {journal.path}")
    if folder is None or not rows:
        return 2
    arch = target_for("flash2", device).arch
    tune_tables.write_derived(folder, arch, options.derive, rows, compile_all)
    print(f"Tables are in {folder}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command_line.Parser(
        prog="python -m flash_attn_interface tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    add(
        "--dims",
        nargs=2,
        type=command_line.positive,
        action="append",
        required=True,
        metavar=("QK", "V"),
        help="head dims; repeat for more pairs",
    )
    add("--direction", nargs="+", choices=("fwd", "bwd", "decode"), help="default: all there are")
    add("--tree", nargs="+", choices=("flash2", "hopper"), help="default: all that serve this GPU")
    add("--dtype", nargs="+", choices=tuple(DTYPES), default=["bf16"])
    add("--causal", choices=("both", "yes", "no"), default="both")
    add("--features", nargs="+", choices=FEATURES, default=[],
        help="tune the kernels with these switched on, instead of plain attention")  # fmt: skip
    add("--seqlen", nargs="+", type=command_line.positive, default=[1024, 4096, 16384],
        help="lengths to time; the winner is nowhere slower than the tile in use")  # fmt: skip
    add("--tokens", type=command_line.positive, default=16384, help="batch is so many / seqlen")
    add(
        "--max-candidates",
        type=command_line.positive,
        default=48,
        metavar="N",
        help="tiles of the first wave",
    )
    add(
        "--max-neighbours",
        type=command_line.positive,
        default=16,
        metavar="N",
        help="of the second and third",
    )
    add(
        "--seconds",
        type=command_line.not_negative,
        default=inf,
        metavar="S",
        help="be done by about then: no further wave after half of it, no finals after it",
    )
    add(
        "--jobs",
        type=command_line.positive,
        default=prebuild.jobs(),
        help="kernels compiled at once",
    )
    add("--device", type=int, help="CUDA ordinal; default: the current one")
    add("--compile-only", action="store_true", help="compile, report registers, run nothing")
    add("--arch", help="compile for this architecture, GPU or not, and run nothing")
    add(
        "--apply",
        choices=("user", "packaged", "none"),
        default="user",
        help="whose table to write: this user's, the one in the installed package, none",
    )
    add("--output", type=Path, metavar="FOLDER", help="write the tables there instead")
    add(
        "--derive",
        nargs="+",
        default=[],
        metavar="ARCH",
        help="also write tables for these architectures: the fastest tiles that fit there",
    )
    add(
        "--also-for",
        nargs="+",
        metavar="ARCH",
        help="time tiles that fit these, too, for a later --derive; default: those of --derive",
    )
    add("--report", type=Path, metavar="FILE", help="write the before-and-after table there")
    add("--journal", type=Path, metavar="FILE", help="default: beside this user's tables")
    add("--fresh", action="store_true", help="ignore the journal")
    return p


def subjects(options: argparse.Namespace, device: Device) -> list[Subject]:
    """Every key that the command names and an installed tree can tune."""
    found = []
    for backend in reversed(installed_backends(device, None)):
        if options.tree and backend.name not in options.tree:
            continue
        target = target_for(backend.name, device)
        for tunable in backend.tunables():
            if options.direction and tunable.direction not in options.direction:
                continue
            if tunable.direction == "decode" and "dropout" in options.features:
                continue
            for dims in options.dims:
                for dtype in options.dtype:
                    for causal in _masks(options, tunable.direction):
                        settings = _settings(options, tunable, (dims[0], dims[1]), dtype, causal)
                        subject = Subject(tunable, target, settings)
                        refusal = _refuses(backend, subject)
                        if refusal is None:
                            found.append(subject)
                        else:
                            print(f"{subject.key}: left out, {refusal}", file=sys.stderr)
    return found


def _refuses(backend: Backend, subject: Subject) -> str | None:
    """Why the tree does not serve the direction that would be tuned; None if it does."""
    problem, target = subject.problem, subject.target
    if subject.tunable.direction == "bwd":
        refusal = backend.refuses_backward(backward_problem(problem), target)
    elif subject.tunable.direction == "decode":
        refusal = backend.refuses_forward(cache_problem(problem), target)
    else:
        refusal = backend.refuses_forward(problem, target)
    if refusal is None:
        try:
            subject.tunable.builtin(problem, target.arch)
        except NotImplementedError as error:  # served without a tile of its own
            return str(error)
    return refusal


def _masks(options: argparse.Namespace, direction: str) -> tuple[bool, ...]:
    if "local" in options.features or direction == "decode":
        return (False,)  # of one query row, causal means nothing
    return {"both": (False, True), "yes": (True,), "no": (False,)}[options.causal]


def _settings(
    options: argparse.Namespace, tunable: Tunable, dims: tuple[int, int], dtype: str, causal: bool
) -> Settings:
    """What is timed and checked."""
    problems, check = {}, CHECK_SIZES
    for seqlen in options.seqlen:
        sizes = {"batch": max(1, options.tokens // seqlen), "heads": max(1, Q_COLUMNS // dims[0])}
        sizes |= {"seqlen_q": seqlen, "seqlen_k": seqlen}
        if tunable.direction == "decode":
            batch = max(1, DECODE_TOKENS // seqlen)
            sizes |= {"batch": batch, "seqlen_q": 1, **DECODE_HEADS}
            check = {**CHECK_SIZES, "seqlen_q": 1, "heads": 8, "heads_kv": 2}
        problems[seqlen] = make_problem(dtype, dims, causal, features=options.features, **sizes)
    small = make_problem(dtype, dims, causal, features=options.features, **check)
    archs = options.derive if options.also_for is None else options.also_for
    also_for = tuple(archs) if tunable.tree == "flash2" else ()
    return Settings(problems, small, options.max_candidates, options.max_neighbours, also_for)


def compile_only(found: Sequence[Subject], compile_all: CompileAll) -> None:
    """Compiles the first wave of every key and prints what the compiler says."""
    waves = []
    for s in found:
        search = Search(s.tunable, s.target, s.settings, Journal(None), "")
        waves.append((s, search, search.first_wave()))
    specs = [spec for _, search, tiles in waves for tile in tiles for spec in search.specs(tile)]
    reports = compile_all(specs, "compile candidates")
    for subject, search, tiles in waves:
        of_tiles = [
            (tile, tune_compile.together(reports[spec] for spec in search.specs(tile)))
            for tile in tiles
        ]
        print(tune_report.compile_table(f"{subject.key} for {subject.target.arch}", of_tiles))


def _table_folder(options: argparse.Namespace) -> Path | None:
    if options.output is not None:
        return Path(options.output)
    if options.apply == "packaged":
        return tuned_tiles.PACKAGED
    if options.apply == "none":
        return None
    folder = tuned_tiles.user_folder()
    if folder is None:
        print("There is no folder for this user's tables; name one with --output.", file=sys.stderr)
        return None
    if not folder.is_dir():
        trust.make_private(folder)
    problem = tuned_tiles.why_not_used(folder)
    if problem is not None:
        raise ValueError(f"tables in {folder} would not be used: {problem}")
    return folder


def _journal_path(options: argparse.Namespace) -> Path | None:
    if options.journal is not None:
        return Path(options.journal)
    folder = tuned_tiles.user_folder()
    return None if folder is None else folder / "journal.jsonl"


def _device(options: argparse.Namespace) -> Device:
    index = torch.cuda.current_device() if options.device is None else options.device
    return device_of(torch.empty(0, device=f"cuda:{index}"))


def _today() -> str:
    return datetime.date.today().isoformat()


def _driver_version() -> str:
    cuda: Any = driver.load_bindings()
    status, version = cuda.cuDriverGetVersion()
    return f"CUDA driver {version // 1000}.{version % 1000 // 10}" if int(status) == 0 else "?"
