"""NVRTC: KernelSpec + source texts -> cubin, log and resource use. Needs no GPU, CUDA kit or nvcc.

Called by ``cache.py`` on a miss. Threads may compile in parallel: NVRTC runs without the GIL.
Instruction counts of the result are in ``sass.py``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import arch as arch_table
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
    """cuda-bindings or the NVRTC library is not installed or cannot be loaded."""


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
        if tuple(nvrtc.nvrtcVersion()[1:]) >= _FIRST_WITH_CACHE:
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
    """What of the compiler enters the cache key, e.g. "nvrtc 13.0.88".

    Read from the installed wheel, because loading NVRTC costs 0.1 s and a warm start needs none of
    it; the library itself is asked only where it did not come as a wheel.
    """
    from importlib import metadata

    def version(distribution: str) -> str | None:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            return None

    bindings = version("cuda-bindings")
    if bindings is not None:
        major = bindings.partition(".")[0]
        wheel = version("nvidia-cuda-nvrtc" if int(major) >= 13 else f"nvidia-cuda-nvrtc-cu{major}")
        if wheel is not None and wheel.startswith(f"{major}."):
            return f"nvrtc {wheel}"
    return loaded_version()


def loaded_version() -> str:
    """Version of the NVRTC library in use, e.g. "nvrtc 13.0". Loads it."""
    nvrtc = load_nvrtc()
    _, major, minor = nvrtc.nvrtcVersion()
    return f"nvrtc {major}.{minor}"


@functools.cache
def load_nvrtc() -> Any:
    """cuda.bindings.nvrtc with its library loaded; MissingCompilerError says what to do."""
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    except ImportError as error:
        raise _missing("cuda-bindings cannot be imported", error) from error
    try:
        try:
            status = nvrtc.nvrtcVersion()[0]
        except Exception:  # each version of the bindings has its own exception for this
            if not _load_library_of_the_path():
                raise
            status = nvrtc.nvrtcVersion()[0]
    except Exception as error:
        raise _missing("the NVRTC library cannot be loaded", error) from error
    if int(status) != 0:
        raise _missing("the NVRTC library does not work", status)
    return nvrtc


def _load_library_of_the_path() -> bool:
    """Loads NVRTC's library from its wheel anywhere on sys.path; whether there is one.

    The bindings find it in site folders, but not in what pip makes for an isolated build, or under
    `pip install --target`. They take one that is loaded already.
    """
    nvidia = importlib.util.find_spec("nvidia")
    folders = (nvidia.submodule_search_locations if nvidia is not None else None) or ()
    libraries = [path for folder in folders for path in Path(folder).glob("*/lib/libnvrtc.so.*")]
    for path in sorted(libraries, reverse=True):
        if re.fullmatch(r"libnvrtc\.so\.\d+", path.name):
            try:
                for library in (*path.parent.glob("libnvrtc-builtins.so.*"), path):
                    ctypes.CDLL(str(library))
            except OSError:
                continue
            return True
    return False


def _missing(what: str, error: object) -> MissingCompilerError:
    major = _cuda_major()
    wheels = {
        12: 'pip install "cuda-bindings==12.*" nvidia-cuda-nvrtc-cu12',
        13: 'pip install "cuda-bindings==13.*" "nvidia-cuda-nvrtc==13.*"',
    }
    if major in wheels:
        fix = wheels[major]
    else:
        fix = f"{wheels[13]}   (CUDA 12: {wheels[12]})"
    return MissingCompilerError(
        f"{what} ({type(error).__name__}: {error}). flash_attn_interface compiles kernels with "
        f"NVRTC; cuda-bindings and NVRTC must have one CUDA major version. Fix: {fix}"
    )


def _cuda_major() -> int | None:
    """CUDA major of the imported torch, if one is and it has CUDA."""
    torch = sys.modules.get("torch")
    text = getattr(getattr(torch, "version", None), "cuda", None)
    return int(text.partition(".")[0]) if text else None


def _failure(nvrtc: Any, spec: KernelSpec, status: object) -> str:
    number = re.sub(r"\D", "", spec.arch)
    error, *known = nvrtc.nvrtcGetSupportedArchs()
    if int(error) == 0 and int(number) not in known[0]:
        newest = max(known[0])
        return (
            f"{loaded_version()} cannot compile for {spec.arch} (newest it knows: sm_{newest}). "
            f"Install a newer NVRTC of the same CUDA major version"
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
