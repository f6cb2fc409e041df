"""ArtifactStore: one built file per content key, made once, on disk. Knows nothing about CUDA.

Serves the kernels (``kernel.cubin``, through ``cubins.py``) and the simulator (``kernel.so``)::

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

import contextlib
import functools
import hashlib
import json
import os
import shutil
import stat
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import env
from . import entries, trust
from .entries import (
    KEY_DIGITS,
    Artifact,
    DamagedEntryError,
    check_entry,
    content_key,
    discard_entry,
    entry_name,
    find_prebuilt,
    read_entry,
    warn,
)

__all__ = [
    "Artifact",
    "ArtifactStore",
    "Built",
    "DamagedEntryError",
    "check_entry",
    "content_key",
    "default_store",
    "discard_entry",
    "entry_name",
    "find_prebuilt",
]

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


class ArtifactStore:
    """A folder of content-addressed artifacts, safe for many threads and processes.

    root: the writable cache folder, or None for memory only. It is created 0700, and refused if it
    or a folder on its path is another user's or may be written to by others (``trust.py``), which
    is looked at anew at each miss. A ``trusted`` one (build trees, tests) is taken as it is and
    created as the umask says. Entries are given the folder's mode, less what others may write.
    limit_bytes: what the entries may take together; those not used for longest are removed.
    """

    def __init__(
        self, root: Path | None, *, trusted: bool = False, limit_bytes: int | None = None
    ) -> None:
        self._root = None if root is None else Path.cwd() / root
        self._trusted = trusted
        self._limit_bytes = limit_bytes
        self._root_created = False
        self._writable = root is not None
        self._memory: dict[str, Artifact] = {}
        self._make_locks()
        _stores.add(self)

    def _make_locks(self) -> None:
        """Also in a forked child: there, no thread would ever release what another thread held."""
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
            return self._read(folder, key, name)
        except DamagedEntryError:
            return None  # get_or_build sets it aside, under the lock

    def entry_folder(self, key: str, label: str) -> Path | None:
        """Where the entry is or would be on disk; None if the disk is not used."""
        root = self._usable_root()
        return None if root is None else root / entry_name(label, key)

    def _read(self, folder: Path, key: str, name: str) -> Artifact | None:
        found = read_entry(folder, key, name, "disk", checked=not self._trusted)
        if found is not None and self._writable:
            entries.mark_used(folder)
        return found

    def _usable_root(self) -> Path | None:
        """The folder, created the first time and checked every time."""
        root = self._root
        if root is None or (self._trusted and self._root_created):
            return root
        with self._guard:
            if self._root is None:
                return None
            root, problem = _prepare_root(self._root, private=not self._trusted)
            refused, self._root = self._root, root
            self._root_created = True
            if problem is not None:
                self._writable = False
        if problem is not None:
            _warn_no_disk(refused, problem)
        return root

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
                lock = FileLock(root / ".locks" / key[:KEY_DIGITS], timeout=_LOCK_TIMEOUT_SECONDS)
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
            return self._read(folder, key, name)
        except DamagedEntryError as error:
            if self._writable:
                aside = folder.with_name(f".damaged-{folder.name}")
                try:
                    entries.remove(aside)
                    os.rename(folder, aside)
                except OSError as failure:
                    self._stop_writing(failure)
                else:
                    warn(f"cache entry is damaged ({error}), moved to {aside} and rebuilt")
            return None

    def _sweep_abandoned(self, key: str) -> None:
        """Removes what a killed process left of this key. Only under its lock."""
        if self._root is not None:
            for leftover in self._root.glob(f".tmp-{key[:KEY_DIGITS]}-*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def _publish(self, key: str, label: str, name: str, built: Built) -> Artifact:
        folder = self.entry_folder(key, label)
        if folder is not None and self._writable:
            try:
                _write_entry(folder, key, label, name, built)
                if self._limit_bytes is not None:
                    entries.trim(folder.parent, self._limit_bytes, keep=folder)
            except OSError as error:
                self._stop_writing(error)
            else:
                return Artifact(name, built.data, built.facts, "built", folder)
        artifact = Artifact(name, built.data, built.facts, "built", None)
        self._memory[key] = artifact
        return artifact


def _write_entry(folder: Path, key: str, label: str, name: str, built: Built) -> None:
    """Publishes a complete entry or leaves nothing behind (OSError)."""
    record = {
        "label": label,
        "key": key,
        "artifact": name,
        "sha256": hashlib.sha256(built.data).hexdigest(),
        "facts": built.facts,
    }
    temporary = tempfile.mkdtemp(prefix=f".tmp-{key[:KEY_DIGITS]}-", dir=folder.parent)
    try:
        os.chmod(temporary, stat.S_IMODE(folder.parent.stat().st_mode) & ~0o022)
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
    # Whatever the umask: what others may write is not loaded.
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
        file.write(data)


def _prepare_root(root: Path, private: bool) -> tuple[Path | None, str | None]:
    """Creates the folder if it is missing; (its real path, None), or (None, why not to use it)."""
    try:
        if not private:
            root.mkdir(mode=0o755, parents=True, exist_ok=True)
            return root, None
        real = trust.resolve(root, own=True)
        if not real.is_dir():
            trust.make_private(real)
            real = trust.resolve(real, own=True)  # another user may have been faster
        return real, None
    except trust.UntrustedError as error:
        return None, str(error)
    except OSError as error:
        return None, f"it cannot be created ({error})"


def _warn_no_disk(root: Path | None, problem: str) -> None:
    warn(
        f"the kernel cache {root} is not used: {problem}. Kernels are kept in memory and built "
        f"again by the next process. Set {env.CACHE_DIR.name} to a folder of your own with free "
        f"space, or {env.DISK_CACHE.name}=0 to choose memory without this warning."
    )


def default_store() -> ArtifactStore:
    """This process's store, over the cache folder of the environment."""
    return _store(env.cache_dir(), env.CACHE_LIMIT.get())


@functools.cache
def _store(root: Path | None, limit_bytes: int | None) -> ArtifactStore:
    return ArtifactStore(root, limit_bytes=limit_bytes)


_stores: weakref.WeakSet[ArtifactStore] = weakref.WeakSet()


def _after_fork() -> None:
    for store in list(_stores):
        store._make_locks()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
