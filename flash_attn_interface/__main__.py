"""`python -m flash_attn_interface`: show this installation and check that it computes attention.

Prints versions, GPUs, kernel trees and the kernel cache, then runs `selfcheck.py`: on the GPU if
there is one, else in the simulator. Exit status 0: everything passed; 1: something failed; 2:
nothing could be checked.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import shutil
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from types import TracebackType

import torch

from . import backends, selfcheck
from ._common import compiler, driver, env
from ._common.cache import describe_prebuilt
from .cache import prebuilt_folders
from .dispatch import Device, target_for
from .version import RELEASE, __version__

SIMULATED_ARCH = "sm_80"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m flash_attn_interface", description=__doc__)
    parser.add_argument("--environment", action="store_true", help="only print the environment")
    parser.add_argument("--simulate", metavar="ARCH", help="check in the simulator, e.g. sm_80")
    options = parser.parse_args(arguments)
    for title, text in environment():
        print(f"{title:<11}{text}", flush=True)
    return 0 if options.environment else check(options.simulate)


def environment() -> Iterator[tuple[str, str]]:
    """(title, text) lines; a title is empty where the last one goes on."""
    yield "package", f"flash_attn_interface {RELEASE} (FlashAttention interface {__version__})"
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", f"{torch.__version__}, built for CUDA {torch.version.cuda or 'none'}"
    yield "bindings", f"cuda-bindings {_version_of('cuda-bindings')}, {_nvrtc_version()}"
    yield from _gpus()
    yield "trees", "flash2: sm_80 and newer"
    yield "", f"hopper: {_hopper()}"
    yield "cache", _cache()
    for index, folder in enumerate(prebuilt_folders()):
        yield ("prebuilt" if index == 0 else ""), describe_prebuilt(folder)
    for variable in env.VARIABLES:
        if os.environ.get(variable.name):
            yield "set", f"{variable.name}={os.environ[variable.name]}"


def _version_of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _nvrtc_version() -> str:
    try:
        return compiler.compiler_version()
    except (ImportError, RuntimeError) as error:
        return f"NVRTC unusable ({error})"


def _gpus() -> Iterator[tuple[str, str]]:
    if not torch.cuda.is_available():
        yield "GPU", "none that torch can use"
        return
    yield "driver", _driver_version()
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        try:
            capability = torch.cuda.get_device_capability(index)
            text = target_for("flash2", Device(capability, index)).arch
        except NotImplementedError as error:
            text = str(error)
        yield ("GPU" if index == 0 else ""), f"cuda:{index} {name}: {text}"


def _driver_version() -> str:
    try:
        status, version = driver.load_bindings().cuDriverGetVersion()
    except ImportError as error:
        return str(error)
    return f"CUDA {version // 1000}.{version % 1000 // 10}" if int(status) == 0 else str(status)


def _hopper() -> str:
    try:
        return "not installed" if backends.hopper() is None else "sm_90a"
    except ImportError as error:
        return str(error)


def _cache() -> str:
    folder = env.cache_dir()
    if folder is None:
        return "memory only"
    if not folder.is_dir():
        return f"{folder} (not created yet)"
    try:
        entries = [entry for entry in folder.iterdir() if (entry / "spec.json").is_file()]
    except OSError as error:
        return f"{folder} (unreadable: {error})"
    return f"{folder} ({len(entries)} kernels)"


def check(simulated_arch: str | None) -> int:
    """Run the self-check where that is possible and report; returns the exit status."""
    arch = simulated_arch
    if arch is None and not torch.cuda.is_available():
        arch = SIMULATED_ARCH
    device = torch.device("cpu") if arch else torch.device("cuda", torch.cuda.current_device())
    if arch and shutil.which(env.CXX.get().split()[0]) is None:
        print(
            "\nNothing checked: no GPU, and the simulator needs a C++20 compiler. Install g++ 10 "
            f"or newer, or name one in {env.CXX.name}."
        )
        return 2
    where = f"the simulator of {arch}" if arch else str(device)
    print(f"\nSelf-check on {where}: {len(selfcheck.CASES)} calls against the reference.")
    print("Kernels that are not cached are compiled first.", flush=True)
    with Progress(len(selfcheck.CASES)) as progress:
        results = selfcheck.run_cases(device, arch, progress.report)
    failed = [result for result in results if not result.passed]
    print(f"{len(failed)} of {len(results)} failed." if failed else f"All {len(results)} passed.")
    return 1 if failed else 0


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
