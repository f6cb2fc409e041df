"""Compiles lists of kernels ahead of time: in parallel through ninja, only what is missing.

Called by `setup.py` and `hopper/setup.py` for `headdim.json`, and by
`python -m flash_attn_interface build`. The kernels are those that the JIT would make: their specs
come from the same tile tables, and each is compiled by `cubins.py`. Needs neither torch nor a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import env
from ..runtime import compiler, cubins, nvrtc, source_state, sources
from ..runtime.spec import KernelSpec
from ..runtime.store import DamagedEntryError, check_entry
from ..tiles import tuned_tiles
from . import headdim
from .headdim import Wanted

# A compile takes up to 200 MB, its Python included; twice that leaves room for larger kernels.
BYTES_PER_JOB = 400 * 2**20
# Kernels of one process: starting it and loading the compiler take 0.25 s, a kernel about 0.7 s.
MAX_BATCH = 8
MIN_BATCHES_PER_JOB = 4  # so that no process is left with much to do at the end


class PrebuildError(RuntimeError):
    """Kernels could not be compiled ahead of time. The message says what to do."""


@dataclass(frozen=True)
class Trees:
    """Where the kernel trees are.

    planners: modules with `specs(pair, wanted, arch)`. packages: import name -> folder, for
    processes that compile. roots: include roots that are not known by themselves -> folder.
    """

    planners: Sequence[str]
    packages: Mapping[str, Path]
    roots: Mapping[str, Path] = field(default_factory=dict)

    def specs(self, wanted: Wanted, archs: Iterable[str]) -> list[KernelSpec]:
        """The kernels of all pairs on all archs."""
        for name, folder in self.roots.items():
            sources.register_root(name, folder)
        planners = [importlib.import_module(name) for name in self.planners]
        found: dict[KernelSpec, None] = {}
        for arch in archs:
            for pair in wanted.pairs:
                for planner in planners:
                    found.update(dict.fromkeys(planner.specs(pair, wanted, arch)))
        return list(found)


def build_requires() -> list[str]:
    """What must be installed for `install` to work. setuptools and Python aside."""
    if not _wanted_here():
        return []
    return [nvrtc.requirement(nvrtc.newest_major()), "filelock", "ninja"]


def _wanted_here() -> bool:
    # NVIDIA publishes no compiler for macOS, which has none of its GPUs either.
    return not env.SKIP_CUDA_BUILD.get() and platform.system() != "Darwin"


def install(trees: Trees, listing: Path, destination: Path, store: Path) -> None:
    """What the two `setup.py` do: the kernels that `listing` (headdim.json) asks for.

    Ends the process with a message where that fails: an editable installation would carry on after
    an exception.

    Args:
        destination: the prebuilt folder of the package; has exactly these kernels afterwards.
        store: where compiled kernels are kept from one build to the next.
    """
    try:
        _install(trees, listing, destination, store)
    except (ValueError, PrebuildError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def record_sources(package: Path, checkout: Path) -> None:
    """What the two `setup.py` do beside: see `source_state.py`."""
    source_state.write(package, checkout)


def _install(trees: Trees, listing: Path, destination: Path, store: Path) -> None:
    if not _wanted_here():
        shutil.rmtree(destination, ignore_errors=True)
        say("no kernels are prebuilt: each is compiled at its first use")
        return
    wanted = headdim.read(listing)
    archs = headdim.archs(wanted)
    by_name = env.TUNED_TILES.get() is not None  # then whoever builds asks for them
    with contextlib.nullcontext() if by_name else tuned_tiles.without_tables_of_the_user():
        specs = trees.specs(wanted, archs)
    say(f"{len(specs)} kernels for {', '.join(archs)}; {wanted.describe()}")
    build(specs, trees, store)
    publish(specs, store, destination)


def build(
    specs: Sequence[KernelSpec], trees: Trees, out: Path | None, at_once: int | None = None
) -> int:
    """Compiles the kernels that `out` lacks; returns how many those were.

    Args:
        out: a folder in the layout of prebuilt ones; None: this user's cubins.
        at_once: instead of `jobs`.
    """
    missing = [spec for spec in specs if not is_built(spec, out)]
    if not missing:
        say(f"all {len(specs)} kernels are up to date")
        return 0
    try:
        compiler.load_nvrtc()
    except compiler.MissingCompilerError as error:
        raise PrebuildError(
            f"{error}\nOr set {env.SKIP_CUDA_BUILD.name}=TRUE to install without prebuilt kernels"
        ) from error
    count = at_once or jobs()
    say(f"compiling {len(missing)} of {len(specs)} kernels, {count} at once")
    with tempfile.TemporaryDirectory(prefix="flash-attn-prebuild-") as folder:
        _run_ninja(Path(folder), missing, trees, out, count)
    if out is not None:
        _describe(out)
    return len(missing)


def is_built(spec: KernelSpec, out: Path | None) -> bool:
    """Whether an intact entry is there."""
    if out is None:
        return cubins.default_kernels().find(spec) is not None
    try:
        check_entry(out / cubins.prebuilt_entry(spec))
    except DamagedEntryError:
        return False
    return True


def publish(specs: Sequence[KernelSpec], store: Path, destination: Path) -> None:
    """Makes `destination` hold exactly these kernels, copied from `store`."""
    entries = {cubins.prebuilt_entry(spec) for spec in specs}
    destination.mkdir(parents=True, exist_ok=True)
    _remove_all_but(entries, destination)
    for name in sorted(entries):
        try:
            check_entry(destination / name)
        except DamagedEntryError:
            shutil.rmtree(destination / name, ignore_errors=True)
            shutil.copytree(store / name, destination / name)
    _describe(destination)


def remove_unlisted(installed: Path, built: Path) -> None:
    """Removes what an earlier installation left in the prebuilt folder `installed` and `built` does
    not have: `setup.py install` itself only lays its files over those.
    """
    if built.is_dir():
        _remove_all_but({path.name for path in built.iterdir()}, installed)
    else:
        shutil.rmtree(installed, ignore_errors=True)


def _remove_all_but(entries: Collection[str], folder: Path) -> None:
    for present in folder.iterdir() if folder.is_dir() else ():
        if present.is_dir() and present.name not in entries:
            shutil.rmtree(present)


def jobs() -> int:
    """Compiles at once: MAX_JOBS, else as many as CPUs and free memory allow."""
    chosen = env.MAX_JOBS.get()
    if chosen is not None:
        return chosen
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()]
    quota = _words("/sys/fs/cgroup/cpu.max")  # "200000 100000": microseconds per period
    if len(quota) == 2 and quota[0].isdigit():
        limits.append(-(-int(quota[0]) // int(quota[1])))
    memory = [
        int(value.split()[0]) * 1024
        for name, _, value in (line.partition(":") for line in _lines("/proc/meminfo"))
        if name == "MemAvailable"
    ]
    bound = _words("/sys/fs/cgroup/memory.max")
    used = _words("/sys/fs/cgroup/memory.current")
    if bound and used and bound[0].isdigit():
        memory.append(int(bound[0]) - int(used[0]))
    limits += [free // BYTES_PER_JOB for free in memory]
    return max(1, min(limit for limit in limits if limit is not None))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux, or another version of control groups
        return []


def _words(path: str) -> list[str]:
    return " ".join(_lines(path)).split()


def _run_ninja(
    work: Path, specs: Sequence[KernelSpec], trees: Trees, out: Path | None, count: int
) -> None:
    """Batches of kernels in processes. ninja counts and schedules; what is missing is known."""
    job = {
        "packages": {name: str(folder) for name, folder in trees.packages.items()},
        "roots": {name: str(folder) for name, folder in trees.roots.items()},
        "out": None if out is None else str(out.resolve()),
        "specs": [spec.as_dict() for spec in specs],
    }
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    script = sources.root_folder("common") / "build_batch.py"
    batch = shlex.join([sys.executable, str(script), str(work / "job.json")])
    lines = [
        "rule kernel",
        f"  command = {batch.replace('$', '$$')} $range && touch $out",
        "  description = $label",
    ]
    size = max(1, min(MAX_BATCH, len(specs) // (count * MIN_BATCHES_PER_JOB)))
    for first in range(0, len(specs), size):
        end = min(first + size, len(specs))
        label = specs[first].label() + (f" and {end - first - 1} more" if end - first > 1 else "")
        lines += [f"build done/{first}: kernel", f"  range = {first} {end}", f"  label = {label}"]
    (work / "build.ninja").write_text("\n".join([*lines, ""]), encoding="utf-8")
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t, %e s] "}
    # setuptools and pip extend sys.path in ways that a child process does not see.
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    sys.stdout.flush()
    # In a session of its own: of Ctrl-C, this process alone tells, and ends the others in silence.
    command = [*_ninja(), "-j", str(count)]
    process = subprocess.Popen(command, cwd=work, env=environment, start_new_session=True)
    try:
        status = process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    if status != 0:
        raise PrebuildError("kernels could not be compiled, see the compiler's messages above")


def _ninja() -> list[str]:
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    found = shutil.which("ninja")
    if found is None:
        raise PrebuildError("ninja is not installed. Fix: pip install ninja")
    return [found]


def _describe(folder: Path) -> None:
    """Writes cubins.CONTENTS: what the folder holds, for people and error messages."""
    count, dims, archs = 0, set(), set()
    for path in folder.glob("*/spec.json"):
        spec = json.loads(path.read_bytes())["facts"]["spec"]
        constants = spec["constants"]
        count += 1
        archs.add(spec["arch"])
        if {"head_dim_qk", "head_dim_v"} <= constants.keys():
            dims.add((constants["head_dim_qk"], constants["head_dim_v"]))
    pairs = " ".join(f"({qk},{v})" for qk, v in sorted(dims))
    text = f"{count} kernels for {', '.join(sorted(archs))}, head dims {pairs}\n"
    (folder / cubins.CONTENTS).write_text(text, encoding="utf-8")


def say(text: str) -> None:
    print(f"flash_attn_interface: {text}", flush=True)
