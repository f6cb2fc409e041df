"""Whose files this process may load as code: every owner and mode from / down to the file.

Kernels and the simulator's programs run with our rights, and tables of tiles choose among them. So
the cache, a prebuilt folder that the environment names, and tables of the user are read only where
no other user can put or exchange anything.

The checks go from the root of the file system downwards. A folder that passed cannot be changed by
others, so what is found in it stays what it is, and the next step may rely on it: there is no gap
between check and use, and no descriptor to hold. Called at each miss, never for a kernel in memory.

Trusted owners are root, this user, and whoever owns this installation, whose code runs already.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
import warnings
from pathlib import Path

from .. import env

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_MAX_LINKS = 40  # as the kernel's own limit


class UntrustedError(OSError):
    """A file or folder that another user could have written. The message says which and why."""


def resolve(path: Path, *, own: bool = False) -> Path:
    """The real, absolute path, after a check of every folder and link on the way and of its end.

    The end may be missing, also with some of its parents. own: it must belong to this very user.

    Raises:
        UntrustedError: another user could exchange it.
        OSError: it cannot be looked at.
    """
    if env.TRUST_FOLDERS.get():
        return Path(os.path.realpath(path))
    pending = list(reversed((Path.cwd() / path).parts))
    here, links = Path(pending.pop()), 0
    parent = os.lstat(here)
    while pending:
        name = pending.pop()
        if name == "..":  # of a link's target, or as the user wrote it
            here = here.parent
            parent = os.lstat(here)
            continue
        _check_way(here, parent)
        below = here / name
        try:
            found = os.lstat(below)
        except FileNotFoundError:
            return below.joinpath(*reversed(pending))
        if stat.S_ISLNK(found.st_mode):
            _check_owner(found, f"the link {below}")
            links += 1
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            target = Path(os.readlink(below))
            if target.is_absolute():
                here = Path(target.anchor)
                parent = os.lstat(here)
                target = target.relative_to(here)
            pending += reversed(target.parts)
            continue
        here, parent = below, found
    if own and parent.st_uid != os.geteuid():
        raise UntrustedError(_belongs("it", parent))
    if own and parent.st_mode & _OTHERS_WRITE:
        raise UntrustedError(_written("it", here, parent))
    _check(here, parent, "it")
    return here


def folder(path: Path) -> Path:
    """`resolve`, of a folder that is there."""
    real = resolve(path)
    if not stat.S_ISDIR(os.lstat(real).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    return real


def make_private(path: Path) -> None:
    """Creates the folder and its missing parents for this user alone, whatever the umask."""
    missing = [path]
    while not missing[-1].parent.is_dir() and missing[-1] != missing[-1].parent:
        missing.append(missing[-1].parent)
    for part in reversed(missing):
        try:
            part.mkdir(mode=0o700)
        except FileExistsError:  # another process was faster, or a file is in the way
            if not part.is_dir():
                raise


def read(path: Path) -> bytes:
    """The bytes of a plain file, checked through the descriptor that they are read from.

    path: of a folder that `resolve` accepted.
    """
    # O_NONBLOCK: opening a pipe that lies there would wait for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UntrustedError(f"{path} is not a plain file")
        if not env.TRUST_FOLDERS.get():
            _check(path, status, str(path))
        return file.read()


@functools.cache
def warn_once(message: str) -> None:
    """One warning in the life of the process for each message."""
    warnings.warn(f"flash_attn_interface: {message}", RuntimeWarning, stacklevel=3)


def _check_way(here: Path, status: os.stat_result) -> None:
    """A folder on the way: only trusted users may exchange what it holds."""
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(here))
    what = f"its parent folder {here}"
    if status.st_mode & stat.S_ISVTX:  # sticky: only its owner and a file's own may rename the file
        _check_owner(status, what)
    else:
        _check(here, status, what)


def _check(path: Path, status: os.stat_result, what: str) -> None:
    _check_owner(status, what)
    if status.st_mode & _OTHERS_WRITE:
        if status.st_mode & stat.S_IWOTH or not _is_private_group(status.st_gid):
            raise UntrustedError(_written(what, path, status))


def _check_owner(status: os.stat_result, what: str) -> None:
    if status.st_uid not in _trusted_owners():
        raise UntrustedError(_belongs(what, status))


def _belongs(what: str, status: os.stat_result) -> str:
    return f"{what} belongs to user id {status.st_uid}, this process runs as {os.geteuid()}"


def _written(what: str, path: Path, status: os.stat_result) -> str:
    mode = stat.S_IMODE(status.st_mode)
    return f"other users may write to {what} (mode {mode:04o}; chmod go-w {path} allows it)"


def _trusted_owners() -> set[int]:
    return {0, os.geteuid(), *_owners_of_the_system()}


@functools.cache
def _owners_of_the_system() -> tuple[int, ...]:
    """The installation's owner; and in a user namespace the id that stands for all unmapped ones.

    Containers without privileges map this user alone: root's files there belong to that id.
    """
    owners = [os.stat(__file__).st_uid]
    try:
        ranges = Path("/proc/self/uid_map").read_text(encoding="ascii").split()
        if sum(map(int, ranges[2::3])) < 2**32 - 1:
            owners.append(int(Path("/proc/sys/kernel/overflowuid").read_text(encoding="ascii")))
    except (OSError, ValueError):  # not Linux
        pass
    return tuple(owners)


def _is_private_group(gid: int) -> bool:
    """Whether it is this user's group of one, with which some systems make all folders 0775."""
    import grp
    import pwd

    if gid == 0:
        return False
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return user.pw_gid == gid and group.gr_name == user.pw_name and not group.gr_mem
