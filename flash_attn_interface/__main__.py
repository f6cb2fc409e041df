"""`python -m flash_attn_interface`: show this installation and check that it computes attention.

Prints versions, driver, compiler, GPUs, kernel trees and the kernel cache, says what does not fit
together and what to do, then runs `selfcheck.py`: on the GPU if there is one, else in the
simulator. Exit status 0: everything passed; 1: something failed; 2: nothing could be checked, or
wrong usage. Further commands: `build`, `cache`, `kernels` and `tune`, each with --help.
"""

from __future__ import annotations

import importlib
import itertools
import json
import shlex
import shutil
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any

import torch

from . import command_line
from ._common import env
from ._common.runtime import arch as arch_table
from .tools import report, selfcheck
from .version import RELEASE, __version__

SIMULATED_ARCH = "sm_80"
COMMANDS = {
    "build": "build",
    "cache": "cache",
    "kernels": "integrations.kernels",
    "tune": "tune.command",
}
"""Command -> its module in this package."""


@command_line.guarded
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in COMMANDS:
        other = importlib.import_module(f"{__package__}.{COMMANDS[given[0]]}")
        if arguments is None:
            sys.argv = [sys.argv[0], *given[1:]]  # as if the module had been run
        return int(other.main(None if arguments is None else given[1:]))
    options = _parser().parse_args(given)
    if options.simulate is not None:
        arch_table.limits(options.simulate)
    shown = report.make()
    if options.json:
        record = shown.to_dict()
        status = 0
        if not options.environment:
            status, record["check"] = checked_silently(options.simulate)
        print(json.dumps(record, indent=2))
        return status
    for line in shown.lines():
        print(line, flush=True)
    return 0 if options.environment else check(options.simulate)


def _parser() -> command_line.Parser:
    parser = command_line.Parser(prog="python -m flash_attn_interface", description=__doc__)
    version = f"flash_attn_interface {RELEASE} (FlashAttention interface {__version__})"
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument("--environment", action="store_true", help="only print the environment")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--simulate", metavar="ARCH", help="check in the simulator, e.g. sm_80")
    return parser


def where_to_check(simulated_arch: str | None) -> tuple[torch.device, str | None, str | None]:
    """(device, architecture to simulate, why nothing can be checked)."""
    arch = simulated_arch
    if arch is None and not torch.cuda.is_available():
        arch = SIMULATED_ARCH
    device = torch.device("cpu") if arch else torch.device("cuda", torch.cuda.current_device())
    if arch and shutil.which(shlex.split(env.CXX.get())[0]) is None:
        why = "no GPU, and the simulator needs a C++20 compiler"
        return device, arch, f"{why}. Install g++ 11 or newer, or name one in {env.CXX.name}"
    return device, arch, None


def check(simulated_arch: str | None) -> int:
    """Run the self-check where that is possible and report; returns the exit status."""
    device, arch, problem = where_to_check(simulated_arch)
    if problem is not None:
        print(f"\nNothing checked: {problem}.")
        return 2
    where = f"the simulator of {arch}" if arch else str(device)
    print(f"\nSelf-check on {where}: {len(selfcheck.CASES)} calls against the reference.")
    print("Kernels that are not cached are compiled first.", flush=True)
    with Progress(len(selfcheck.CASES)) as progress:
        results = selfcheck.run_cases(device, arch, progress.report)
    failed = [result for result in results if not result.passed]
    print(f"{len(failed)} of {len(results)} failed." if failed else f"All {len(results)} passed.")
    return 1 if failed else 0


def checked_silently(simulated_arch: str | None) -> tuple[int, dict[str, Any]]:
    """(exit status, for JSON: where it ran, and each call with its error)."""
    device, arch, problem = where_to_check(simulated_arch)
    if problem is not None:
        return 2, {"nothing": problem}
    results = selfcheck.run_cases(device, arch, lambda result, done, total: None)
    calls = [
        {**asdict(result), "case": result.case.name, "passed": result.passed} for result in results
    ]
    passed = all(result.passed for result in results)
    where = f"simulator of {arch}" if arch else str(device)
    return 0 if passed else 1, {"where": where, "passed": passed, "calls": calls}


class Progress:
    """A line per result; on a terminal also a line that moves while kernels compile."""

    _PERIOD_SECONDS = 0.2

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._lock = threading.Lock()
        self._finished = threading.Event()
        self._thread: threading.Thread | None = None
        if sys.stdout.isatty():
            self._thread = threading.Thread(target=self._animate, daemon=True)

    def __enter__(self) -> Progress:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._finished.set()
        if self._thread:
            self._thread.join()
            self._erase()

    def report(self, result: selfcheck.Result, done: int, total: int) -> None:
        """Print a result; called from the thread that made this."""
        with self._lock:
            self._done = done
            if self._thread:
                self._erase()
            counter = f"[{done}/{total}]"
            print(f"{counter} {result.describe()}", flush=True)

    def _animate(self) -> None:
        for sign in itertools.cycle("|/-\\"):
            with self._lock:
                filled = 20 * self._done // self._total
                bar = "#" * filled + "." * (20 - filled)
                print(f"\r{sign} [{bar}] {self._done}/{self._total}", end="", flush=True)
            if self._finished.wait(self._PERIOD_SECONDS):
                return

    @staticmethod
    def _erase() -> None:
        print("\r\033[K", end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
