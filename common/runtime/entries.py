"""Entries of an ArtifactStore: folders that hold one artifact each, read, checked and discarded.

An entry is published by a rename and never changed, but for its time of modification, which is when
it was last used. ``store.py`` writes them; `python -m flash_attn_interface cache` lists them.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import trust
from .trust import UntrustedError

KEY_DIGITS = 16


@dataclass(frozen=True)
class Artifact:
    """One artifact whose checksum was verified. origin: "built", "disk" or "prebuilt"."""

    name: str
    data: bytes
    facts: Mapping[str, Any]
    origin: str
    folder: Path | None  # None: it lives in memory only

    def path(self) -> Path:
        """A file with these bytes, for loaders that want a path (dlopen)."""
        if self.folder is not None:
            return self.folder / self.name
        folder = Path(tempfile.mkdtemp(prefix="entry-", dir=_process_folder()))
        (folder / self.name).write_bytes(self.data)
        return folder / self.name


class DamagedEntryError(Exception):
    """A cache entry whose content is not what was published."""


def content_key(parts: Iterable[str | bytes]) -> str:
    """sha256 over the parts, each preceded by its length so that no two lists collide."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()


def entry_name(label: str, key: str) -> str:
    return f"{label}-{key[:KEY_DIGITS]}"


def read_entry(
    folder: Path, key: str, name: str, origin: str, *, checked: bool = False
) -> Artifact | None:
    """The verified entry, None if there is none.

    checked: also that no other user could have written it; see ``trust.py``.

    Raises:
        DamagedEntryError: something else is in its place. The message says what is wrong with it.
    """
    if not os.path.lexists(folder):
        return None
    try:
        real = trust.folder(folder) if checked else folder
        record = json.loads(_read_file(real / "spec.json", checked))
        data = _read_file(real / name, checked)
        if record["key"] != key:
            raise DamagedEntryError(f"{folder}: it was made for another key")
        if record["sha256"] != hashlib.sha256(data).hexdigest():
            raise DamagedEntryError(f"{folder}: checksum of {name} is wrong")
        facts = dict(record["facts"])
    except UntrustedError as error:
        raise DamagedEntryError(f"{folder}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedEntryError(f"{folder}: {type(error).__name__}: {error}") from error
    return Artifact(name, data, facts, origin, real)


def _read_file(path: Path, checked: bool) -> bytes:
    return trust.read(path) if checked else path.read_bytes()


def find_prebuilt(
    folder: Path, key: str, label: str, name: str, *, checked: bool = False
) -> Artifact | None:
    """The entry of a folder that somebody else filled and that is only read, or None.

    One that is damaged is reported and not used. checked: as for `read_entry`.
    """
    try:
        return read_entry(folder / entry_name(label, key), key, name, "prebuilt", checked=checked)
    except DamagedEntryError as error:
        warn(f"prebuilt kernel is damaged and not used, reinstall the package: {error}")
        return None


def check_entry(folder: Path) -> None:
    """DamagedEntryError if a folder is not an entry as it was published."""
    try:
        record = json.loads((folder / "spec.json").read_bytes())
        key, label, name = (str(record[part]) for part in ("key", "label", "artifact"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedEntryError(f"{folder}: {type(error).__name__}: {error}") from error
    if folder.name != entry_name(label, key):
        raise DamagedEntryError(f"{folder}: it was made as {entry_name(label, key)}")
    read_entry(folder, key, name, "disk")


def entries(folder: Path) -> Iterator[Path]:
    """Folders that are, or have been, entries of a cache."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir() and not path.name.startswith(".") and (path / "spec.json").is_file():
            yield path


def size_of(entry: Path) -> int:
    """Bytes of its files; 0 if another process has just removed it."""
    try:
        return sum(path.stat().st_size for path in entry.iterdir())
    except OSError:
        return 0


def last_used(entry: Path) -> float:
    """When a process last loaded it, or made it; seconds since the epoch."""
    try:
        return entry.stat().st_mtime
    except OSError:
        return 0.0


def mark_used(entry: Path) -> None:
    """Sets `last_used` to now, where the folder may be written to."""
    with contextlib.suppress(OSError):
        os.utime(entry)


def trim(folder: Path, limit_bytes: int, keep: Path | None = None) -> tuple[int, int]:
    """Discards what was not used for longest until the rest fits; (entries, bytes) discarded.

    keep: an entry that stays in any case. OSError: one cannot be removed.
    """
    found = sorted((last_used(entry), entry, size_of(entry)) for entry in entries(folder))
    excess = sum(size for _, _, size in found) - limit_bytes
    count = removed = 0
    for _, entry, size in found:
        if removed >= excess:
            break
        if entry != keep:
            discard_entry(entry)
            count, removed = count + 1, removed + size
    return count, removed


def discard_entry(folder: Path) -> None:
    """Removes an entry at once: a process that looks for it finds it whole or not at all."""
    aside = tempfile.mkdtemp(prefix=".discarded-", dir=folder.parent)
    try:
        os.rename(folder, aside)
    except FileNotFoundError:  # another process was faster
        pass
    finally:
        shutil.rmtree(aside)


def remove(path: Path) -> None:
    """Removes a folder, a file or a link, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def warn(message: str) -> None:
    warnings.warn(f"flash_attn_interface: {message}", RuntimeWarning, stacklevel=3)


_process_folders: dict[int, str] = {}  # by process id: a forked child has its own


def _process_folder() -> str:
    process = os.getpid()
    folder = _process_folders.get(process)
    if folder is None:
        folder = _process_folders[process] = tempfile.mkdtemp(prefix="flash-attn-interface-")
        atexit.register(_remove_process_folder, folder, process)
    return folder


def _remove_process_folder(folder: str, process: int) -> None:
    if os.getpid() == process:  # a forked child inherits the list of what to do at exit
        shutil.rmtree(folder, ignore_errors=True)
