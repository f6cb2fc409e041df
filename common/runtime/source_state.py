"""Which state of the sources a distribution was built from, so that the two are not mixed.

`flash-attn-3` runs on the Python, the headers and the parameter structs of `flash-attn`. Both
record at build time a digest of those sources, which says more than a release number: that one
stays the same for months of a checkout. Editable installations have no record; theirs is computed.
Called by both `setup.py`, and by `hopper/__init__.py` before it imports anything else.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from . import sources

RECORD = "_source_state.txt"  # of an installed package; not in a checkout
FOLDERS = ("flash_attn_interface", "common", "flash2")
_SUFFIXES = (".py", ".cu", ".cuh", ".h", ".cpp", ".S")
_LEFT_OUT = ("__pycache__", sources.PREBUILT, "_common", "_flash2")  # the last two: see `installed`


def digest(folders: Mapping[str, Path]) -> str:
    """sha256 over names and contents of all code. folders: by their names in the checkout."""
    found = hashlib.sha256()
    for name, folder in sorted(folders.items()):
        for path in sorted(_files(folder)):
            text = path.read_bytes()
            found.update(f"{name}/{path.relative_to(folder).as_posix()} {len(text)}\n".encode())
            found.update(text)
    return found.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder, followlinks=True):  # some installations are links
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        yield from (Path(root, name) for name in files if name.endswith(_SUFFIXES))


def of_checkout(root: Path) -> str | None:
    """The digest of a checkout; None if `root` is none."""
    folders = {name: root / name for name in FOLDERS}
    return digest(folders) if all(folder.is_dir() for folder in folders.values()) else None


def write(package: Path, checkout: Path) -> Path | None:
    """Records the state of a checkout in a package that is being built; the file, if any."""
    state = of_checkout(checkout)
    if state is None:
        return None
    package.mkdir(parents=True, exist_ok=True)
    (package / RECORD).write_text(state + "\n", encoding="ascii")
    return package / RECORD


def recorded(package: Path) -> str | None:
    """What `write` left in an installed package; None for an editable one."""
    try:
        return (package / RECORD).read_text(encoding="ascii").strip()
    except OSError:
        return None


def installed() -> str:
    """The digest of the code that this process runs as `flash_attn_interface`."""
    folders = (sources.package_folder(), *map(sources.root_folder, FOLDERS[1:]))
    return digest(dict(zip(FOLDERS, folders, strict=True)))


def check(hopper: Path) -> None:
    """ImportError if the package in `hopper` was built from other sources than are installed here.

    With an editable installation on one side, whose sources may have been edited since, a warning.
    """
    main, other = recorded(sources.package_folder()), recorded(hopper)
    if main is not None and other is not None:
        differ = main != other
    elif main is None and other is None:
        if _same_folder(sources.package_folder(), hopper.parent / FOLDERS[0]):
            return  # both editable, of one checkout
        beside = of_checkout(hopper.parent)
        differ = beside is not None and beside != installed()
    else:
        here, there = main or installed(), other or of_checkout(hopper.parent)
        if there is not None and here != there:
            warnings.warn(
                f"flash_attn_3 {_MIXED}; one of them is an editable installation, so this is only "
                f"a warning. {_FIX}",
                RuntimeWarning,
                stacklevel=3,
            )
        return
    if differ:
        raise ImportError(f"flash_attn_3 {_MIXED}. {_FIX}")


_MIXED = "and flash_attn_interface have one release number but come from different sources"
_FIX = "Install both from the same checkout: pip install . && cd hopper && pip install ."


def _same_folder(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
