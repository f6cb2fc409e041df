"""Every environment variable this package or its build reads, in one table.

Nothing else reads ``os.environ``. Values are read at each call of ``get()``, never at import.
``docs/environment.md`` shows the same table; a test keeps the two equal.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class Variable(Generic[T_co]):
    """One environment variable. kind: the values it takes, as the documentation prints them."""

    name: str
    kind: str
    default_text: str
    meaning: str
    default: Callable[[], T_co]
    parse: Callable[[str], T_co]

    def get(self) -> T_co:
        """The value; unset and empty mean the default. ValueError says what is allowed."""
        text = os.environ.get(self.name, "").strip()
        if not text:
            return self.default()
        try:
            return self.parse(text)
        except ValueError as error:
            # What int() and the like say does not help; our own reasons and shlex's do.
            reason = f" ({error})" if str(error) and text not in str(error) else ""
            raise ValueError(f"{self.name}={text!r}: expected {self.kind}{reason}") from error


def _boolean(text: str) -> bool:
    lowered = text.lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off"):
        return False
    raise ValueError(text)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _backend(text: str) -> str | None:
    if text not in ("flash2", "hopper", "reference"):
        raise ValueError(text)
    return text


def _test_arch(text: str) -> str | None:
    if text not in ("sm_80", "sm_86", "sm_89"):
        raise ValueError(text)
    return text


def _archs(text: str) -> tuple[str, ...]:
    archs = tuple(text.replace(",", " ").replace(";", " ").split())
    numbers = [arch.removeprefix("sm_").rstrip("af").replace(".", "") for arch in archs]
    if not numbers or not all(number.isdigit() for number in numbers):
        raise ValueError(text)
    return archs


def _folder(text: str) -> Path | None:
    if text.startswith("~"):
        try:
            return Path(text).expanduser()
        except RuntimeError as error:
            raise ValueError("there is no such home folder") from error
    return _absolute(text)


@functools.cache
def _absolute(text: str) -> Path:
    """Of a relative folder: where it was when it was first asked for, whatever chdir() follows."""
    return Path.cwd() / text


def _as_given(text: str) -> Path | None:
    return Path(text)


def _tables(text: str) -> Path | None:
    return OFF if text == str(OFF) else _folder(text)


OFF = Path("off")  # of TUNED_TILES


def _command(text: str) -> str:
    if not shlex.split(text):
        raise ValueError(text)
    return text


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)i?B?", text, re.IGNORECASE)
    if found is None:
        raise ValueError(text)
    number, unit = found.groups()
    return int(float(number) * 1024 ** " KMGT".index(unit.upper() or " "))


LOG_LEVELS = ("debug", "info", "warning", "error")


def _log_level(text: str) -> str:
    if text.lower() not in LOG_LEVELS:
        raise ValueError(text)
    return text.lower()


CACHE_DIR: Variable[Path | None] = Variable(
    "FLASH_ATTN_INTERFACE_CACHE_DIR",
    "a folder",
    "`$XDG_CACHE_HOME/flash_attn_interface`, else `~/.cache/flash_attn_interface`",
    "Where compiled kernels are kept. Created with mode 0700; refused if other users own it or may "
    "write to it or a parent. A relative one is made absolute at first use.",
    lambda: None,
    _folder,
)
XDG_CACHE_HOME: Variable[Path | None] = Variable(
    "XDG_CACHE_HOME",
    "a folder",
    "`~/.cache`",
    "Parent of the default cache folder.",
    lambda: None,
    _as_given,
)
DISK_CACHE: Variable[bool] = Variable(
    "FLASH_ATTN_INTERFACE_DISK_CACHE",
    "0 or 1",
    "1",
    "0 keeps compiled kernels in memory only: nothing is read from or written to the cache folder.",
    lambda: True,
    _boolean,
)
PREBUILT_DIR: Variable[Path | None] = Variable(
    "FLASH_ATTN_INTERFACE_PREBUILT_DIR",
    "a folder",
    "none",
    "A folder that `python -m flash_attn_interface build --out` filled, on any machine. "
    "Only read, and before the installation's own kernels. Not used where users other than root, "
    "the installation's owner and this one own it or may write to it.",
    lambda: None,
    _folder,
)
TRUST_FOLDERS: Variable[bool] = Variable(
    "FLASH_ATTN_INTERFACE_TRUST_FOLDERS",
    "0 or 1",
    "0",
    "1 leaves out the checks of who owns and may write to the folders that kernels and tables are "
    "loaded from. For machines and containers without other users.",
    lambda: False,
    _boolean,
)
CACHE_LIMIT: Variable[int | None] = Variable(
    "FLASH_ATTN_INTERFACE_CACHE_LIMIT",
    "a size such as `2G` or `500M`",
    "none",
    "What the kernels of the cache may take together. Beyond it, each new one makes those go that "
    "were not used for longest.",
    lambda: None,
    _size,
)
LOGLEVEL: Variable[str | None] = Variable(
    "FLASH_ATTN_INTERFACE_LOGLEVEL",
    "`debug`, `info`, `warning` or `error`",
    "Python's logging decides",
    "Print the package's log to stderr from this level on. `info`: who serves a new kind of call "
    "and why, and each compile; `debug`: also where each kernel comes from.",
    lambda: None,
    _log_level,
)
FORCE_BACKEND: Variable[str | None] = Variable(
    "FLASH_ATTN_INTERFACE_FORCE_BACKEND",
    "`flash2`, `hopper` or `reference`",
    "chosen per call",
    "Serve every call with this backend. A call it cannot serve is an error that says why.",
    lambda: None,
    _backend,
)
TEST_ARCH: Variable[str | None] = Variable(
    "FLASH_ATTN_INTERFACE_TEST_ARCH",
    "`sm_80`, `sm_86` or `sm_89`",
    "the GPU's own",
    "For tests of this package: serve calls as on an older GPU. The Ampere tree takes the tiles "
    "and the shared memory of that architecture and compiles to PTX, which the driver translates.",
    lambda: None,
    _test_arch,
)
CHECK_CACHE: Variable[bool] = Variable(
    "FLASH_ATTN_INTERFACE_CHECK_CACHE",
    "0 or 1",
    "0",
    "1 makes every `flash_attn_with_kvcache` on a GPU read its lengths, indices and page table to "
    "the host and raise ValueError for those that point outside the cache. It waits for the GPU.",
    lambda: False,
    _boolean,
)
SIM_THREADS: Variable[int] = Variable(
    "FLASH_ATTN_INTERFACE_SIM_THREADS",
    "an integer from 1",
    "number of CPUs",
    "CTAs the CPU simulator of the kernels runs at once.",
    lambda: os.cpu_count() or 1,
    _positive,
)
TUNED_TILES: Variable[Path | None] = Variable(
    "FLASH_ATTN_INTERFACE_TUNED_TILES",
    "a folder or `off`",
    "`tuned` in the cache folder",
    "Where `python -m flash_attn_interface tune` keeps this user's tile tables, which come before "
    "those of the package. `off`: no tables at all, not even the package's.",
    lambda: None,
    _tables,
)
CXX: Variable[str] = Variable(
    "CXX",
    "a command",
    "`g++`",
    "C++20 compiler of the CPU simulator.",
    lambda: "g++",
    _command,
)
CUDA_ARCHS: Variable[tuple[str, ...] | None] = Variable(
    "FLASH_ATTN_CUDA_ARCHS",
    "a list such as `80;90a`",
    "`80;90a`",
    "Build time: architectures that `setup.py` prebuilds the pairs of `headdim.json` for.",
    lambda: None,
    _archs,
)
SKIP_CUDA_BUILD: Variable[bool] = Variable(
    "FLASH_ATTENTION_SKIP_CUDA_BUILD",
    "TRUE or FALSE",
    "FALSE",
    "Build time: install without prebuilt kernels; each is compiled at its first use.",
    lambda: False,
    _boolean,
)
MAX_JOBS: Variable[int | None] = Variable(
    "MAX_JOBS",
    "an integer from 1",
    "by CPUs and free memory",
    "Build time: kernels compiled at once.",
    lambda: None,
    _positive,
)

VARIABLES: tuple[Variable[object], ...] = (
    CACHE_DIR,
    XDG_CACHE_HOME,
    DISK_CACHE,
    CACHE_LIMIT,
    PREBUILT_DIR,
    TRUST_FOLDERS,
    LOGLEVEL,
    FORCE_BACKEND,
    TEST_ARCH,
    CHECK_CACHE,
    SIM_THREADS,
    TUNED_TILES,
    CXX,
    CUDA_ARCHS,
    SKIP_CUDA_BUILD,
    MAX_JOBS,
)


def cache_dir() -> Path | None:
    """The folder of the disk cache; None where there is no home to put it in, or it is off."""
    if not DISK_CACHE.get():
        return None
    chosen = CACHE_DIR.get()
    if chosen is not None:
        return chosen
    parent = XDG_CACHE_HOME.get()
    if parent is None or not parent.is_absolute():  # relative ones are invalid by its standard
        try:
            parent = Path.home() / ".cache"
        except RuntimeError:  # a container user without a passwd entry and without HOME
            return None
    return parent / "flash_attn_interface"


# Names of FlashAttention's own builds that mean nothing here; scripts set them nevertheless.
_OF_UPSTREAM = re.compile(
    r"FLASH_ATTENTION_(DISABLE_\w+|FORCE_(BUILD|CXX11_ABI)|TRITON_AMD_\w+|ENABLE_\w+|"
    r"SKIP_CK_BUILD|USE_\w+)|FLASH_ATTN_LOCAL_VERSION"
)


def misspelt() -> list[str]:
    """A line for each variable that looks like one of this package's and is none."""
    known = [variable.name for variable in VARIABLES]
    lines = []
    for name in sorted(os.environ):
        if not re.match(r"_*FLASH_?ATT", name, re.IGNORECASE):
            continue
        if name in known or _OF_UPSTREAM.fullmatch(name):
            continue
        near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.8)
        lines.append(f"{name} is not read" + (f"; did you mean {near[0]}?" if near else ""))
    return lines


def as_markdown() -> str:
    """The table of docs/environment.md."""
    lines = ["| variable | values | default | meaning |", "| --- | --- | --- | --- |"]
    lines += [
        f"| `{v.name}` | {v.kind} | {v.default_text} | {v.meaning} |"
        for v in sorted(VARIABLES, key=lambda v: v.name)
    ]
    return "\n".join(lines) + "\n"
