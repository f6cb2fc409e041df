"""NVRTC: KernelSpec + source texts -> cubin, log and resource use. Needs no GPU, CUDA kit or nvcc.

Called by ``cubins.py`` on a miss. Threads may compile in parallel: NVRTC runs without the GIL.
Instruction counts of the result are in ``sass.py``.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .. import log as package_log
from . import arch as arch_table
from . import nvrtc as libraries
from .nvrtc import Nvrtc
from .sources import PRELUDE
from .spec import KernelSpec

_SLOW_SECONDS = 1.0
_FIRST_WITH_CACHE = (12, 9)
_PTX_VERSION = b".version 8.3"  # of CUDA 12.3


class CompileError(RuntimeError):
    """The compiler refused a kernel. ``log`` is its complete output."""

    def __init__(self, spec: KernelSpec, message: str, log: str) -> None:
        super().__init__(f"{message}\n  kernel: {spec.describe()}\n{log}".rstrip())
        self.spec = spec
        self.log = log


class MissingCompilerError(ImportError):
    """No NVRTC library is installed, or it cannot be loaded."""


@dataclass(frozen=True)
class ResourceUsage:
    """ptxas's report on the entry: registers and bytes per thread."""

    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int


@dataclass(frozen=True)
class Compiled:
    """cubin: machine code; of a spec for a virtual architecture, PTX that ends in a zero byte."""

    cubin: bytes
    log: str
    seconds: float

    @property
    def resources(self) -> ResourceUsage:
        return parse_resources(self.log)


def options(spec: KernelSpec) -> tuple[str, ...]:
    """Compiler options; part of the cache key."""
    return (f"--gpu-architecture={spec.arch}", "--std=c++17", "--ptxas-options=-v")


def compile_cubin(spec: KernelSpec, sources: Mapping[str, str], why: str | None = "") -> Compiled:
    """Compiles ``spec.source`` from ``sources`` (of ``sources.resolve``) and the spec's prelude.

    why: the reason the slow-compile line gives; None: no such line. Raises CompileError,
    MissingCompilerError.
    """
    nvrtc = load_nvrtc()
    headers = {PRELUDE: spec.prelude(), **sources}
    main = headers.pop(spec.source)
    program = _checked(
        nvrtc,
        "nvrtcCreateProgram",
        main.encode(),
        spec.source.encode(),
        len(headers),
        [text.encode() for text in headers.values()],
        [name.encode() for name in headers],
    )
    try:
        flags = [option.encode() for option in options(spec)]
        if nvrtc.nvrtcVersion()[1:] >= _FIRST_WITH_CACHE:
            flags.append(b"--no-cache")  # a hit in NVRTC's own cache comes without the ptxas report
        what = f"compiling {spec.label()}"
        begin = time.perf_counter()
        line = announce_if_slow(f"{what}: {why}" if why else what)
        with line if why is not None else contextlib.nullcontext():
            (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
        seconds = time.perf_counter() - begin
        log = _fetch(nvrtc, program, "ProgramLog").decode(errors="replace").strip("\0 \n")
        if int(status) != 0:
            raise CompileError(spec, _failure(nvrtc, spec, status), log)
        if arch_table.is_virtual(spec.arch):
            code = _for_older_drivers(_fetch(nvrtc, program, "PTX"))
        else:
            code = _fetch(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    version = loaded_version()
    package_log.info("compiled %s with %s in %.2f s", spec.label(), version, seconds)
    return Compiled(code, log, seconds)


@contextlib.contextmanager
def announce_if_slow(what_and_why: str, seconds: float = _SLOW_SECONDS) -> Iterator[None]:
    """One line on stderr if the body is still running after ``seconds``; silence if it is not."""
    finished = threading.Event()

    def announce() -> None:
        if not finished.is_set():
            # One write, so that lines of parallel compiles do not run into each other.
            sys.stderr.write(f"flash_attn_interface: {what_and_why}\n")
            sys.stderr.flush()

    timer = threading.Timer(seconds, announce)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        finished.set()
        timer.cancel()


def parse_resources(log: str) -> ResourceUsage:
    """The ptxas -v report in a compile log. One entry per cubin, so the first report is the one."""
    frame = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    registers = re.search(r"Used (\d+) registers", log)
    if frame is None or registers is None:
        raise ValueError(f"no ptxas resource report in the compile log:\n{log}")
    stack, stores, loads = (int(number) for number in frame.groups())
    return ResourceUsage(int(registers.group(1)), stores, loads, stack)


@functools.cache
def compiler_version() -> str:
    """What of the compiler enters the cache key, e.g. "nvrtc 13.0.88": of the library that
    `load_nvrtc` loads.

    Read from its wheel, because loading NVRTC costs 0.1 s and a warm start needs none of it; the
    library itself is asked only where it did not come as a wheel.
    """
    library = libraries.chosen()
    version = None if library is None else library.wheel_version()
    return loaded_version() if version is None else f"nvrtc {version}"


def loaded_version() -> str:
    """Version of the NVRTC library in use, e.g. "nvrtc 13.0". Loads it."""
    nvrtc = load_nvrtc()
    _, major, minor = nvrtc.nvrtcVersion()
    return f"nvrtc {major}.{minor}"


@functools.cache
def load_nvrtc() -> Nvrtc:
    """The library that fits this machine's driver; MissingCompilerError says what to do."""
    library = libraries.chosen()
    if library is None:
        raise _missing("no NVRTC library is found")
    try:
        nvrtc = Nvrtc(library)
    except OSError as error:
        raise _missing(f"the NVRTC library {library.path} cannot be loaded ({error})") from error
    status = nvrtc.nvrtcVersion()[0]
    if status != 0:
        raise _missing(f"the NVRTC library {library.path} does not work ({status.name})")
    return nvrtc


def _missing(what: str) -> MissingCompilerError:
    wheel = libraries.requirement(libraries.newest_major())
    return MissingCompilerError(
        f"{what}. flash_attn_interface compiles kernels with NVRTC. Fix: {pip_install(wheel)}"
    )


def pip_install(wheel: str) -> str:
    return f'pip install "{wheel}"'


@functools.cache
def unfit_for_the_driver() -> str | None:
    """Why this machine's driver will not load what is compiled here, and the way out; else None."""
    driver, library = libraries.driver_version(), libraries.chosen()
    if driver is None or library is None or library.major <= driver[0]:
        return None
    return too_old(driver, compiler_version())


def too_old(driver: tuple[int, int], compiler: str) -> str:
    """What to say of a driver that refuses what a compiler made."""
    wheel = libraries.requirement(driver[0])
    return (
        f"The display driver supports CUDA {driver[0]}.{driver[1]}, the compiler is {compiler}: a "
        f"driver loads what a compiler of its own or an older CUDA version made. Way out: a newer "
        f"driver, or {pip_install(wheel)}"
    )


def _failure(nvrtc: Nvrtc, spec: KernelSpec, status: object) -> str:
    number = re.sub(r"\D", "", spec.arch)
    error, *known = nvrtc.nvrtcGetSupportedArchs()
    if int(error) == 0 and int(number) not in known[0]:
        newest, major = max(known[0]), nvrtc.library.major
        return (
            f"{loaded_version()} cannot compile for {spec.arch} (newest it knows: sm_{newest}). "
            f"Install a newer NVRTC, of a CUDA major version that the driver supports: "
            f"pip install --upgrade {libraries.requirement(major).partition('>')[0]}"
        )
    name = getattr(status, "name", status)
    return f"{name} while compiling {spec.label()} with {loaded_version()}"


def _for_older_drivers(ptx: bytes) -> bytes:
    """The same PTX, declared to be of the oldest language version that has all it uses.

    NVRTC declares its own version, which drivers refuse that are older than it; machine code knows
    no such limit. A driver still checks each instruction against the declared version.
    """
    lowered, found = re.subn(rb"(?m)^\.version \d+\.\d+$", _PTX_VERSION, ptx, count=1)
    if found != 1:
        raise RuntimeError("NVRTC made PTX without a .version line")
    return lowered


def _checked(nvrtc: Any, function: str, *arguments: object) -> Any:
    status, *result = getattr(nvrtc, function)(*arguments)
    if int(status) != 0:
        raise RuntimeError(f"{function} failed: {getattr(status, 'name', status)}")
    return result[0] if result else None


def _fetch(nvrtc: Any, program: Any, what: str) -> bytes:
    # A bytearray: the bindings fill what they are given, and a bytes object may be shared.
    buffer = bytearray(_checked(nvrtc, f"nvrtcGet{what}Size", program))
    _checked(nvrtc, f"nvrtcGet{what}", program, buffer)
    return bytes(buffer)
