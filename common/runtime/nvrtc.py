"""NVRTC's library: which of those on this machine is loaded, and its functions.

A driver loads what a compiler of its own CUDA major version made, or of an older one. Machines
often have several NVRTC: CUDA 13's wheel among our requirements, CUDA 12's among those of torch. So
the library is chosen by the driver, loaded by its path, and that very one is reported and hashed.
(The bindings of cuda-bindings take whichever they find first.) Called by ``compiler.py``.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

MAJORS = (13, 12)  # the CUDA versions whose NVRTC can compile the kernels, the newest first


class Result(enum.IntEnum):
    """nvrtcResult."""

    NVRTC_SUCCESS = 0
    NVRTC_ERROR_OUT_OF_MEMORY = 1
    NVRTC_ERROR_PROGRAM_CREATION_FAILURE = 2
    NVRTC_ERROR_INVALID_INPUT = 3
    NVRTC_ERROR_INVALID_PROGRAM = 4
    NVRTC_ERROR_INVALID_OPTION = 5
    NVRTC_ERROR_COMPILATION = 6
    NVRTC_ERROR_BUILTIN_OPERATION_FAILURE = 7
    NVRTC_ERROR_INTERNAL_ERROR = 11
    UNKNOWN = -1

    @classmethod
    def _missing_(cls, value: object) -> Result:
        return cls.UNKNOWN


@dataclass(frozen=True)
class Library:
    """One library that could be loaded. path: of a file, or a name that the loader looks for."""

    path: str
    major: int

    def wheel_version(self) -> str | None:
        """E.g. "13.0.88", without loading it; None if it is not of a wheel."""
        for name in ("nvidia-cuda-nvrtc", f"nvidia-cuda-nvrtc-cu{self.major}"):
            try:
                wheel = metadata.distribution(name)
            except metadata.PackageNotFoundError:
                continue
            folder = str(wheel.locate_file("nvidia"))
            if wheel.version.startswith(f"{self.major}.") and self.path.startswith(folder):
                return wheel.version
        return None


@functools.cache
def driver_version() -> tuple[int, int] | None:
    """The CUDA version of the display driver; None where there is none. Makes no context."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        version = ctypes.c_int()
        if cuda.cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def torch_cuda_major() -> int | None:
    """CUDA major version that the installed torch was built for, without importing it."""
    torch = sys.modules.get("torch")
    if torch is not None:
        text = getattr(getattr(torch, "version", None), "cuda", None)
        return int(str(text).partition(".")[0]) if text else None
    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations if spec is not None else None) or ():
        try:
            text = Path(folder, "version.py").read_text(encoding="utf-8")
        except OSError:
            continue
        found = re.search(r"""^cuda\b[^=]*=\s*['"](\d+)\.""", text, re.MULTILINE)
        return int(found.group(1)) if found else None
    return None


def newest_major() -> int | None:
    """The newest CUDA major version whose code runs here: the driver's. On a machine without one,
    whose cache or kernels are for others, torch's. None: nothing is known.
    """
    driver = driver_version()
    return driver[0] if driver is not None else torch_cuda_major()


def requirement(major: int | None) -> str:
    """What to ask pip for."""
    return "nvidia-cuda-nvrtc-cu12" if major == 12 else "nvidia-cuda-nvrtc>=13"


def candidates() -> list[Library]:
    """All libraries that are found, wheels before the system's."""
    found: dict[Library, None] = {}
    for folder in _folders():
        for path in sorted(folder.glob("libnvrtc.so.*")):
            major = re.fullmatch(r"libnvrtc\.so\.(\d+)", path.name)
            if major and int(major.group(1)) in MAJORS:
                found[Library(str(path), int(major.group(1)))] = None
    return list(found)


def _folders() -> Iterator[Path]:
    """Where wheels have it, anywhere on sys.path, and conda."""
    for entry in sys.path:  # not `import nvidia`: some wheels make it a package, others do not
        yield from sorted(Path(entry, "nvidia").glob("*/lib"))
    yield Path(sys.prefix, "lib")


def of_the_system() -> list[Library]:
    """What the loader finds by name: a CUDA toolkit's."""
    found = []
    for major in MAJORS:
        try:
            ctypes.CDLL(f"libnvrtc.so.{major}")
        except OSError:
            continue
        found.append(Library(f"libnvrtc.so.{major}", major))
    return found


def choose(found: Sequence[Library], limit: int | None) -> Library | None:
    """The newest that makes code for CUDA `limit`; the newest of all where none does."""
    fitting = [library for library in found if limit is None or library.major <= limit]
    return max(fitting or found, key=lambda library: library.major, default=None)


def chosen() -> Library | None:
    """The library of this machine; None if there is none."""
    limit = newest_major()
    library = choose(candidates(), limit)
    if library is None or (limit is not None and library.major > limit):
        library = choose([*of_the_system(), *([library] if library else [])], limit)
    return library


class Nvrtc:
    """The functions in use. Each returns (Result, *values). ctypes runs them without the GIL."""

    def __init__(self, library: Library) -> None:
        """OSError: it cannot be loaded."""
        self.library = library
        path = Path(library.path)
        if path.is_absolute():  # the loader does not find it beside the library by itself
            for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(builtins))
        self._dll = ctypes.CDLL(library.path)

    def _call(self, function: str, *arguments: Any) -> Result:
        return Result(getattr(self._dll, function)(*arguments))

    def nvrtcVersion(self) -> tuple[Result, int, int]:
        major, minor = ctypes.c_int(), ctypes.c_int()
        status = self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return status, major.value, minor.value

    def nvrtcGetSupportedArchs(self) -> tuple[Result, list[int]]:
        count = ctypes.c_int()
        status = self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        archs = (ctypes.c_int * count.value)()
        if status == 0:
            status = self._call("nvrtcGetSupportedArchs", archs)
        return status, list(archs)

    def nvrtcCreateProgram(
        self,
        source: bytes,
        name: bytes,
        count: int,
        headers: Sequence[bytes],
        include_names: Sequence[bytes],
    ) -> tuple[Result, ctypes.c_void_p]:
        program = ctypes.c_void_p()
        texts, names = _strings(headers), _strings(include_names)
        status = self._call(
            "nvrtcCreateProgram", ctypes.byref(program), source, name, count, texts, names
        )
        return status, program

    def nvrtcCompileProgram(
        self, program: ctypes.c_void_p, count: int, options: Sequence[bytes]
    ) -> tuple[Result]:
        return (self._call("nvrtcCompileProgram", program, count, _strings(options)),)

    def nvrtcGetProgramLogSize(self, program: ctypes.c_void_p) -> tuple[Result, int]:
        return self._size("nvrtcGetProgramLogSize", program)

    def nvrtcGetProgramLog(self, program: ctypes.c_void_p, buffer: bytearray) -> tuple[Result]:
        return self._fill("nvrtcGetProgramLog", program, buffer)

    def nvrtcGetCUBINSize(self, program: ctypes.c_void_p) -> tuple[Result, int]:
        return self._size("nvrtcGetCUBINSize", program)

    def nvrtcGetCUBIN(self, program: ctypes.c_void_p, buffer: bytearray) -> tuple[Result]:
        return self._fill("nvrtcGetCUBIN", program, buffer)

    def nvrtcGetPTXSize(self, program: ctypes.c_void_p) -> tuple[Result, int]:
        return self._size("nvrtcGetPTXSize", program)

    def nvrtcGetPTX(self, program: ctypes.c_void_p, buffer: bytearray) -> tuple[Result]:
        return self._fill("nvrtcGetPTX", program, buffer)

    def nvrtcDestroyProgram(self, program: ctypes.c_void_p) -> tuple[Result]:
        return (self._call("nvrtcDestroyProgram", ctypes.byref(program)),)

    def _size(self, function: str, program: ctypes.c_void_p) -> tuple[Result, int]:
        size = ctypes.c_size_t()
        return self._call(function, program, ctypes.byref(size)), size.value

    def _fill(self, function: str, program: ctypes.c_void_p, buffer: bytearray) -> tuple[Result]:
        memory = (ctypes.c_char * len(buffer)).from_buffer(buffer)
        return (self._call(function, program, memory),)


def _strings(texts: Sequence[bytes]) -> Any:
    return (ctypes.c_char_p * len(texts))(*texts)
