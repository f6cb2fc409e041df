"""ArtifactStore: one built file per content key, made once, on disk. Knows nothing about CUDA.

Serves the kernels (``kernel.cubin``, through ``cache.py``) and the simulator (``kernel.so``)::

    artifact = default_store().get_or_build(key, label, "kernel.so", build)
    ctypes.CDLL(str(artifact.path()))

``key`` is a sha256 hex digest of everything that went into the build (see ``content_key``),
``label`` says to a person what it is, and ``build()`` is called at most once per key among all
threads and processes of this user; it returns ``Built(data, files, facts)`` and touches no cache
file itself. An entry is one folder, published by a rename and therefore complete or absent::

    <root>/<label>-<first 16 digits of key>/{kernel.so, spec.json, anything in files}

The store itself remembers only what the disk could not take; whoever wants a warm object keeps it.

Faults never reach the caller: a damaged entry is set aside and rebuilt, a folder that is unsafe,
read-only or full is replaced by memory, and each is reported by one warning.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import shutil
import stat
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import env

_KEY_DIGITS = 16
# A waiting process gives up on the lock after this long and builds for itself: a stopped or hung
# lock holder must not hang every other rank. Building twice is harmless, publishing is atomic.
_LOCK_TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class Built:
    """What a build callback returns.

    data: the artifact's bytes. files: further texts kept beside it for people (prelude, log).
    facts: JSON values stored in spec.json and handed back with the artifact on every later load.
    """

    data: bytes
    files: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


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


class ArtifactStore:
    """A folder of content-addressed artifacts, safe for many threads and processes.

    root: the writable cache folder, or None for memory only. It is created 0700, and refused if it
    belongs to another user or others may write to it. A ``trusted`` one (build trees, tests) is
    taken as it is and created as the umask says. Entries are given the folder's mode.
    """

    def __init__(self, root: Path | None, *, trusted: bool = False) -> None:
        self._root = root
        self._trusted = trusted
        self._root_checked = False
        self._writable = root is not None
        self._memory: dict[str, Artifact] = {}
        self._guard = threading.Lock()
        self._key_locks: dict[str, threading.Lock] = {}

    def get_or_build(self, key: str, label: str, name: str, build: Callable[[], Built]) -> Artifact:
        """The artifact for ``key``, from the nearest place that has it, else from ``build()``.

        name: file name of the artifact inside its entry. What ``build`` raises is passed on and
        nothing is stored.
        """
        found = self.find(key, label, name)
        if found is not None:
            return found
        with self._thread_lock(key):
            found = self.find(key, label, name)  # another thread may have been faster
            if found is not None:
                return found
            with self._process_lock(key) as locked:
                if locked:
                    self._sweep_abandoned(key)
                found = self._take_or_set_aside(key, label, name)  # or another process
                if found is not None:
                    return found
                return self._publish(key, label, name, build())

    def find(self, key: str, label: str, name: str) -> Artifact | None:
        """The artifact if it is in memory or on disk. Never builds, takes no lock."""
        if key in self._memory:
            return self._memory[key]
        folder = self.entry_folder(key, label)
        if folder is None:
            return None
        try:
            return _read(folder, key, name, "disk")
        except DamagedEntryError:
            return None  # get_or_build sets it aside, under the lock

    def entry_folder(self, key: str, label: str) -> Path | None:
        """Where the entry is or would be on disk; None if the disk is not used."""
        root = self._usable_root()
        return None if root is None else root / entry_name(label, key)

    def _usable_root(self) -> Path | None:
        if self._root_checked:
            return self._root
        with self._guard:
            if not self._root_checked:
                problem = None
                if self._root is not None:
                    problem = _prepare_root(self._root, private=not self._trusted)
                if problem is not None:
                    refused, self._root, self._writable = self._root, None, False
                self._root_checked = True
                if problem is not None:
                    _warn_no_disk(refused, problem)
        return self._root

    def _stop_writing(self, error: OSError) -> None:
        """From here on this store only reads the disk: it is read-only, full or over quota."""
        with self._guard:
            first, self._writable = self._writable, False
        if first:
            _warn_no_disk(self._root, f"it cannot be written ({error})")

    def _thread_lock(self, key: str) -> threading.Lock:
        with self._guard:
            return self._key_locks.setdefault(key, threading.Lock())

    @contextlib.contextmanager
    def _process_lock(self, key: str) -> Iterator[bool]:
        """Holds the key's file lock; yields False where there is none to hold."""
        from filelock import FileLock, Timeout  # 20 ms to import, and only a miss needs it

        root = self._usable_root()
        lock = None
        if root is not None and self._writable:
            try:
                (root / ".locks").mkdir(mode=0o700, exist_ok=True)
                lock = FileLock(root / ".locks" / key[:_KEY_DIGITS], timeout=_LOCK_TIMEOUT_SECONDS)
                lock.acquire()
            except (Timeout, NotImplementedError):  # hung holder; file system without locks
                lock = None
            except OSError as error:
                lock = None
                self._stop_writing(error)
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.release()

    def _take_or_set_aside(self, key: str, label: str, name: str) -> Artifact | None:
        folder = self.entry_folder(key, label)
        if folder is None:
            return None
        try:
            return _read(folder, key, name, "disk")
        except DamagedEntryError as error:
            if self._writable:
                aside = folder.with_name(f".damaged-{folder.name}")
                try:
                    shutil.rmtree(aside, ignore_errors=True)
                    os.rename(folder, aside)
                except OSError as failure:
                    self._stop_writing(failure)
                else:
                    _warn(f"cache entry is damaged ({error}), moved to {aside} and rebuilt")
            return None

    def _sweep_abandoned(self, key: str) -> None:
        """Removes what a killed process left of this key. Only under its lock."""
        if self._root is not None:
            for leftover in self._root.glob(f".tmp-{key[:_KEY_DIGITS]}-*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def _publish(self, key: str, label: str, name: str, built: Built) -> Artifact:
        folder = self.entry_folder(key, label)
        if folder is not None and self._writable:
            try:
                _write_entry(folder, key, label, name, built)
            except OSError as error:
                self._stop_writing(error)
            else:
                return Artifact(name, built.data, built.facts, "built", folder)
        artifact = Artifact(name, built.data, built.facts, "built", None)
        self._memory[key] = artifact
        return artifact


def entry_name(label: str, key: str) -> str:
    return f"{label}-{key[:_KEY_DIGITS]}"


def find_prebuilt(folder: Path, key: str, label: str, name: str) -> Artifact | None:
    """The entry of a folder that somebody else filled and that is only read, or None.

    One that is damaged is reported and not used.
    """
    try:
        return _read(folder / entry_name(label, key), key, name, "prebuilt")
    except DamagedEntryError as error:
        _warn(f"prebuilt kernel is damaged and not used, reinstall the package: {error}")
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
    _read(folder, key, name, "disk")


def discard_entry(folder: Path) -> None:
    """Removes an entry at once: a process that looks for it finds it whole or not at all."""
    aside = tempfile.mkdtemp(prefix=".discarded-", dir=folder.parent)
    try:
        os.rename(folder, aside)
    finally:
        shutil.rmtree(aside)


def _read(folder: Path, key: str, name: str, origin: str) -> Artifact | None:
    """The verified entry, None if there is none; DamagedEntryError says what is wrong with it."""
    if not folder.is_dir():
        return None
    try:
        record = json.loads((folder / "spec.json").read_bytes())
        data = (folder / name).read_bytes()
        if record["key"] != key:
            raise DamagedEntryError(f"{folder}: it was made for another key")
        if record["sha256"] != hashlib.sha256(data).hexdigest():
            raise DamagedEntryError(f"{folder}: checksum of {name} is wrong")
        facts = dict(record["facts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedEntryError(f"{folder}: {type(error).__name__}: {error}") from error
    return Artifact(name, data, facts, origin, folder)


def _write_entry(folder: Path, key: str, label: str, name: str, built: Built) -> None:
    """Publishes a complete entry or leaves nothing behind (OSError)."""
    record = {
        "label": label,
        "key": key,
        "artifact": name,
        "sha256": hashlib.sha256(built.data).hexdigest(),
        "facts": built.facts,
    }
    temporary = tempfile.mkdtemp(prefix=f".tmp-{key[:_KEY_DIGITS]}-", dir=folder.parent)
    try:
        os.chmod(temporary, stat.S_IMODE(folder.parent.stat().st_mode))
        for file_name, text in built.files.items():
            _write_file(Path(temporary, file_name), text.encode())
        _write_file(Path(temporary, name), built.data)
        _write_file(Path(temporary, "spec.json"), json.dumps(record, indent=2).encode() + b"\n")
        try:
            os.rename(temporary, folder)
        except OSError:
            # Without locks (network file systems) another process may have published first.
            if not folder.is_dir():
                raise
            shutil.rmtree(temporary, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_file(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _prepare_root(root: Path, private: bool) -> str | None:
    """Creates the folder; returns why it must not be used, if so.

    A loaded cubin or .so runs with our rights, so nobody else may be able to put one there.
    """
    try:
        root.mkdir(mode=0o700 if private else 0o777, parents=True, exist_ok=True)
        status = root.stat()
    except OSError as error:
        return f"it cannot be created ({error})"
    if not private:
        return None
    if status.st_uid != os.geteuid():
        return f"it belongs to user id {status.st_uid}, this process runs as {os.geteuid()}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        return f"other users may write to it (mode {mode:04o}; chmod 700 allows it)"
    return None


def _warn(message: str) -> None:
    warnings.warn(f"flash_attn_interface: {message}", RuntimeWarning, stacklevel=3)


def _warn_no_disk(root: Path | None, problem: str) -> None:
    _warn(
        f"the kernel cache {root} is not used: {problem}. Kernels are kept in memory and built "
        f"again by the next process. Set {env.CACHE_DIR.name} to a folder of your own with free "
        f"space, or {env.DISK_CACHE.name}=0 to choose memory without this warning."
    )


@functools.cache
def _process_folder() -> str:
    folder = tempfile.mkdtemp(prefix="flash-attn-interface-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def default_store() -> ArtifactStore:
    """This process's store, over the cache folder of the environment."""
    return _store(env.cache_dir())


_store = functools.cache(ArtifactStore)
