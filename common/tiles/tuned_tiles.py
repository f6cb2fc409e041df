"""Tile tables that the autotuner wrote: found, read, checked and, by the tuner, written.

Every `*tiles.py` asks `tile` before its own list of candidates. A table is one JSON file for one
GPU model, or for all GPUs of one architecture; docs/autotuner.md shows the format. What a problem
gets depends on its key alone (dtype, head dims, mask, features), never on batch, lengths or paging:
a row's result stays the same in any batch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from .. import env
from ..ask.problem import Problem
from ..runtime import arch as arch_table
from ..runtime import trust

FORMAT = 1
PACKAGED = Path(__file__).resolve().parent / "tuned"

T = TypeVar("T")


class TunedTilesError(ValueError):
    """A table cannot be used. The message names file and key; removing the entry is always safe."""


@dataclass(frozen=True)
class Entry:
    """The best tile of one key. facts: how it was found, for people; nothing depends on them."""

    tile: Mapping[str, bool | int]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """gpu: the model, as the driver names it; "" for all of the architecture. arch: "sm_90"."""

    gpu: str
    arch: str
    origin: str  # where the entries come from, in words
    entries: Mapping[str, Entry] = field(default_factory=dict)


def key(tree: str, direction: str, problem: Problem, rows: int = 0) -> str:
    """E.g. "flash2/fwd/bf16/160x224/causal+softcap": all that a tuned tile may depend on.

    rows: for decode, up to how many query rows share keys.
    """
    mask = "causal" if problem.causal else "local" if problem.local else "full"
    named = {
        "chunk": problem.attention_chunk > 0,
        "softcap": problem.softcap > 0.0,
        "alibi": problem.alibi,
        "dropout": problem.dropout,
        "qv": problem.qv,
    }
    variant = "+".join([mask, *(name for name, on in named.items() if on)])
    dims = f"{problem.head_dim_qk}x{problem.head_dim_v}"
    of_rows = f"/rows{rows}" if rows else ""
    return f"{tree}/{direction}/{problem.dtype}/{dims}/{variant}{of_rows}"


def tile(
    kind: Callable[..., T],
    wanted: str,
    arch: str,
    gpu: str,
    refuses: Callable[[T], str | None],
    *,
    packaged_only: bool = False,
) -> T | None:
    """The tile that the tables hold for a key, or None.

    Args:
        kind: the tile's dataclass.
        wanted: of `key`.
        gpu: model of the device; "" if unknown or simulated, then only tables of `arch` are asked.
        refuses: why the kernel could not be built with a tile on `arch`; None if it could.
        packaged_only: without the user's tables.

    Raises:
        TunedTilesError: the entry is not a tile, or one that is refused.
    """
    for path, checked in _paths(arch, gpu, packaged_only):
        table = _load(path, checked)
        if table is None or table.arch != plain(arch) or table.gpu not in ("", gpu):
            continue  # of another GPU
        entry = table.entries.get(wanted)
        if entry is None:
            continue
        where = f"{path}: {wanted}"
        try:
            found = kind(**entry.tile)
        except TypeError as error:
            raise TunedTilesError(f"{where}: {error}. Tune again, or remove the entry") from error
        reason = refuses(found)
        if reason is not None:
            raise TunedTilesError(f"{where}: {reason}. Tune again, or remove the entry")
        return found
    return None


def user_folder() -> Path | None:
    """The folder of this user's tables; None if there is no place for one."""
    chosen = env.TUNED_TILES.get()
    if chosen is not None:
        return None if chosen == env.OFF else chosen
    cache = env.cache_dir()
    return None if cache is None else cache / "tuned"


@contextlib.contextmanager
def without_tables_of_the_user() -> Iterator[None]:
    """For builds: what is shipped must not depend on who builds it."""
    global _packaged_only
    before, _packaged_only = _packaged_only, True
    try:
        yield
    finally:
        _packaged_only = before


_packaged_only = False


def file_name(arch: str, gpu: str = "") -> str:
    """ "nvidia-h100-80gb-hbm3.json" of a model, "sm_90.json" of an architecture."""
    if not gpu:
        return f"{plain(arch)}.json"
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def forget() -> None:
    """Read the tables anew; a process does so once, lest one problem gets two tiles."""
    _load.cache_clear()
    _is_usable.cache_clear()


def plain(arch: str) -> str:
    """The architecture that a table names: "sm_90" of sm_90a, too."""
    return arch_table.limits(arch).name


def folders(packaged_only: bool = False) -> Iterator[tuple[Path, bool]]:
    """Folders of tables that count, the user's first; and whether other users could write them."""
    if env.TUNED_TILES.get() == env.OFF:
        return
    user = None if packaged_only or _packaged_only else user_folder()
    if user is not None and _is_usable(user):
        yield user, True
    yield PACKAGED, False


def _paths(arch: str, gpu: str, packaged_only: bool) -> Iterator[tuple[Path, bool]]:
    """Tables by precedence: the user's before the package's, the model's before the arch's."""
    for folder, checked in folders(packaged_only):
        if gpu:
            yield folder / file_name(arch, gpu), checked
        yield folder / file_name(arch), checked


@functools.cache
def _is_usable(folder: Path) -> bool:
    """Whether tables of the user are read; why not is said once."""
    problem = why_not_used(folder)
    if problem is not None:
        trust.warn_once(f"tables of tiles in {folder} are not used: {problem}")
    return problem is None and folder.is_dir()


def why_not_used(folder: Path) -> str | None:
    """Why tables of the user are not read from a folder; None if they are, as far as there are any.

    One that is missing is worth a word only where the environment names it.
    """
    try:
        trust.folder(folder)
    except FileNotFoundError:
        return "it does not exist" if env.TUNED_TILES.get() == folder else None
    except trust.UntrustedError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read ({error})"
    return None


@functools.cache
def _load(path: Path, checked: bool) -> Table | None:
    return read(path, checked)


def read(path: Path, checked: bool = False) -> Table | None:
    """The table of a file; None if there is none. TunedTilesError if it is something else.

    checked: also if another user may write to it.
    """
    try:
        record = json.loads(trust.read(path) if checked else path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise TunedTilesError(f"{path}: not a readable table ({error})") from error
    try:
        if record["format"] != FORMAT:
            raise TunedTilesError(
                f"{path}: format {record['format']!r}, this package reads {FORMAT}. Tune again, or "
                "remove the file"
            )
        entries = {name: _entry(path, name, of) for name, of in record["entries"].items()}
        return Table(record["gpu"], record["arch"], record["origin"], entries)
    except (KeyError, TypeError, AttributeError) as error:
        raise TunedTilesError(f"{path}: not a table of tiles ({error!r})") from error


def _entry(path: Path, name: str, record: Mapping[str, Any]) -> Entry:
    values = record["tile"]
    if not all(type(value) in (bool, int) for value in values.values()):
        raise TunedTilesError(f"{path}: {name}: a tile holds integers and true or false: {values}")
    return Entry(values, {name: fact for name, fact in record.items() if name != "tile"})


def write(path: Path, table: Table) -> None:
    """Replaces the file at once; keys are sorted, so that versions can be compared."""
    entries = {
        name: {"tile": dict(entry.tile), **entry.facts}
        for name, entry in sorted(table.entries.items())
    }
    record = {"format": FORMAT, "gpu": table.gpu, "arch": table.arch, "origin": table.origin}
    if not path.parent.is_dir():
        trust.make_private(path.parent)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-", suffix=".json")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({**record, "entries": entries}, file, indent=1)
            file.write("\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def as_record(tile: Any) -> dict[str, bool | int]:
    """A tile's dataclass as a table holds it: every field, so that new defaults change nothing."""
    return {f.name: getattr(tile, f.name) for f in fields(tile)}
