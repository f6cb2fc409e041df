"""g++: simulator runtime and kernels -> shared objects, kept in the artifact store like cubins.

The runtime (fibers, checks) is compiled once; a kernel's own object is only its source and the thin
twins of the wrappers, so that a test suite can afford a hundred kernels. Called by ``launcher.py``.
"""

from __future__ import annotations

import ctypes
import functools
import shlex
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import env
from ..runtime import sources
from ..runtime.compiler import announce_if_slow
from ..runtime.spec import KernelSpec
from ..runtime.store import Artifact, Built, content_key, default_store

ENTRY = "flash_sim_run_thread"

_RUNTIME_FOLDER = "sim/runtime"  # inside the root "common"
_COMMON_FLAGS = ("-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread")
_RUNTIME_FLAGS = (*_COMMON_FLAGS, "-O2")
# -O1: tests compile many kernels and run each once. Kernels use no exceptions; the runtime leaves a
# failing one by switching away from its stacks.
_KERNEL_FLAGS = (
    *_COMMON_FLAGS,
    "-O1",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-asynchronous-unwind-tables",
    "-Wno-unknown-pragmas",
    "-Wreturn-type",
    "-Werror=conversion",  # what is narrowed, offsets above all, says so by a cast
    "-I.",
)


class SimulatorError(RuntimeError):
    """A kernel broke a rule that the simulator checks, or could not be built for it."""


@functools.cache
def runtime() -> ctypes.CDLL:
    """The runtime's library, built if it is nowhere. Kernels' objects find its symbols."""
    folder = sources.root_folder("common") / _RUNTIME_FOLDER
    texts = {
        file.name: file.read_text(encoding="utf-8")
        for file in sorted(folder.iterdir())
        if file.suffix in (".cpp", ".h", ".S")
    }
    units = [name for name in texts if not name.endswith(".h")]
    artifact = _object("simulator-runtime", texts, units, _RUNTIME_FLAGS)
    return ctypes.CDLL(str(artifact.path()), mode=ctypes.RTLD_GLOBAL)


def kernel(spec: KernelSpec) -> ctypes.CDLL:
    """The library of one kernel; its function ENTRY runs the kernel for one thread."""
    texts = sources.resolve(spec.source, simulate=True)
    unit = (
        f'#include "{spec.source}"\n'
        f'extern "C" __attribute__((visibility("default"))) void {ENTRY}(const void* params) {{\n'
        f"  {spec.entry}(*static_cast<const {spec.params}*>(params));\n"
        f"}}\n"
    )
    texts = {**texts, sources.PRELUDE: spec.prelude(), "kernel.cpp": unit}
    artifact = _object(f"simulated-{spec.label()}", texts, ["kernel.cpp"], _KERNEL_FLAGS, spec)
    return ctypes.CDLL(str(artifact.path()))


def cluster_size(library: ctypes.CDLL) -> int:
    """CTAs of a cluster, as the entry of a kernel's library declares it."""
    try:
        return ctypes.c_int32.in_dll(library, "flash_sim_cluster_size").value
    except ValueError:  # a KERNEL
        return 1


def _object(
    label: str,
    texts: Mapping[str, str],
    units: Sequence[str],
    flags: Sequence[str],
    spec: KernelSpec | None = None,
) -> Artifact:
    command = [*_compiler(), *flags]
    key = content_key(
        [_compiler_version(), *command, *(part for item in sorted(texts.items()) for part in item)]
    )

    def build() -> Built:
        with announce_if_slow(f"compiling {label} with {command[0]}: first use"):
            return _compile(label, texts, units, command, spec)

    return default_store().get_or_build(key, label, "kernel.so", build)


def _compile(
    label: str,
    texts: Mapping[str, str],
    units: Sequence[str],
    command: Sequence[str],
    spec: KernelSpec | None,
) -> Built:
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="flash-attn-simulator-") as folder:
        for name, text in texts.items():
            file = Path(folder, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        # Relative names, so that errors name sources as includes do.
        result = subprocess.run(
            [*command, *units, "-o", "kernel.so"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        log = result.stdout + result.stderr
        if result.returncode != 0:
            what = f"\n  kernel: {spec.describe()}" if spec is not None else ""
            raise SimulatorError(
                f"{_compiler_version()} cannot compile {label}{what}\n"
                f"  command: {shlex.join([*command, *units])}\n{log}"
            )
        data = Path(folder, "kernel.so").read_bytes()
    seconds = round(time.perf_counter() - begin, 3)
    facts: dict[str, Any] = {
        "compiler": _compiler_version(),
        "command": list(command),
        "seconds": seconds,
    }
    files = {"compile.log": log}
    if spec is not None:
        facts["spec"] = spec.as_dict()
        files[sources.PRELUDE] = spec.prelude()
    return Built(data, files, facts)


def _compiler() -> list[str]:
    return shlex.split(env.CXX.get())


def _compiler_version() -> str:
    return _version_of(tuple(_compiler()))


@functools.cache
def _version_of(command: tuple[str, ...]) -> str:
    try:
        output = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SimulatorError(
            f"the simulator compiles kernels with {shlex.join(command)!r}, which does not run "
            f"({error}). Install g++ 11 or newer (Debian, Ubuntu: apt install g++), or name a "
            f"C++20 compiler in {env.CXX.name}"
        ) from error
    return output.partition("\n")[0]
