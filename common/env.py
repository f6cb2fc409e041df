"""Every environment variable this package or its build reads, in one table.

Nothing else reads ``os.environ``. Values are read at each call of ``get()``, never at import.
``docs/environment.md`` shows the same table; a test keeps the two equal.
"""

from __future__ import annotations

import os
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
            raise ValueError(f"{self.name}={text!r}: expected {self.kind}") from error


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
    return Path(text).expanduser()


CACHE_DIR: Variable[Path | None] = Variable(
    "FLASH_ATTN_INTERFACE_CACHE_DIR",
    "a folder",
    "`$XDG_CACHE_HOME/flash_attn_interface`, else `~/.cache/flash_attn_interface`",
    "Where compiled kernels are kept. Created with mode 0700; a folder that other users own or may "
    "write to is refused.",
    lambda: None,
    _folder,
)
XDG_CACHE_HOME: Variable[Path | None] = Variable(
    "XDG_CACHE_HOME",
    "a folder",
    "`~/.cache`",
    "Parent of the default cache folder.",
    lambda: None,
    _folder,
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
    "A folder that `python -m flash_attn_interface.build --out` filled, maybe on another machine. "
    "Only read, and before the kernels that the installation brings along.",
    lambda: None,
    _folder,
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
    "and the shared memory of that architecture and compiles its kernels to PTX, which the driver "
    "translates for the GPU that there is.",
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
    "Where `python -m flash_attn_interface.tune` keeps this user's tile tables, which come before "
    "those of the package. `off`: no tables at all, not even the package's.",
    lambda: None,
    _folder,
)
CXX: Variable[str] = Variable(
    "CXX",
    "a command",
    "`g++`",
    "C++20 compiler of the CPU simulator.",
    lambda: "g++",
    str,
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
    PREBUILT_DIR,
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


def as_markdown() -> str:
    """The table of docs/environment.md."""
    lines = ["| variable | values | default | meaning |", "| --- | --- | --- | --- |"]
    lines += [
        f"| `{v.name}` | {v.kind} | {v.default_text} | {v.meaning} |"
        for v in sorted(VARIABLES, key=lambda v: v.name)
    ]
    return "\n".join(lines) + "\n"
