"""`python -m flash_attn_interface.cache`: what compiled kernels there are; verify or remove them.

Looks at this user's cache (kernels, and programs of the simulator) and at the prebuilt folders.
Removes nothing outside the cache, and nothing in it that is not a cache entry.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ._common import cache as kernel_cache
from ._common import env, sources
from ._common.store import DamagedEntryError, check_entry, discard_entry

_SECONDS_PER_DAY = 86400.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 if `verify` found damage or something could not be removed."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "clear":
            return clear(options.older_than, options.damaged)
        return verify() if options.command == "verify" else show(options.entries)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def show(with_entries: bool) -> int:
    """Folders, and how many kernels of which sort they hold."""
    folder = env.cache_dir()
    print(f"cache     {folder or 'memory only'}")
    if folder is not None:
        _show_folder(folder, with_entries)
    for folder in prebuilt_folders():
        print(f"prebuilt  {kernel_cache.describe_prebuilt(folder)}")
        _show_folder(folder, with_entries)
    return 0


def _show_folder(folder: Path, with_entries: bool) -> None:
    sorts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for entry in entries(folder):
        size = sum(path.stat().st_size for path in entry.iterdir())
        sort, compiler = _sort_and_compiler(entry)
        sorts[sort] += 1
        sizes[sort] += size
        if with_entries:
            print(f"  {entry.name}  {size / 1024:.0f} KiB  {compiler}")
    for sort, count in sorted(sorts.items()):
        print(f"  {count:5} {sort}, {sizes[sort] / 2**20:.1f} MiB")
    if not sorts:
        print("  no entries")


def _sort_and_compiler(entry: Path) -> tuple[str, str]:
    try:
        facts = json.loads((entry / "spec.json").read_bytes())["facts"]
        return f"{facts['spec']['entry']} {facts['spec']['arch']}", str(facts["compiler"])
    except (OSError, ValueError, KeyError, TypeError):
        return "programs of the simulator, or unreadable", ""


def verify() -> int:
    """Checks every entry against its checksum."""
    damaged = 0
    folders = [folder for folder in (env.cache_dir(), *prebuilt_folders()) if folder is not None]
    for folder in folders:
        found = list(entries(folder))
        for entry in found:
            try:
                check_entry(entry)
            except DamagedEntryError as error:
                damaged += 1
                print(f"damaged: {error}")
        print(f"{folder}: {len(found)} entries checked")
    if damaged:
        print(
            f"{damaged} damaged. Those of the cache are rebuilt at their next use, or now with "
            "`python -m flash_attn_interface.cache clear --damaged`; for prebuilt ones reinstall"
        )
    return 1 if damaged else 0


def clear(older_than_days: float | None, only_damaged: bool) -> int:
    """Removes entries of this user's cache. Processes that use them are not disturbed."""
    folder = env.cache_dir()
    if folder is None:
        print("there is no cache folder")
        return 0
    oldest = None if older_than_days is None else time.time() - older_than_days * _SECONDS_PER_DAY
    removed = size = 0
    for entry in list(entries(folder)):
        if oldest is not None and entry.stat().st_mtime >= oldest:
            continue
        if only_damaged and _is_intact(entry):
            continue
        size += sum(path.stat().st_size for path in entry.iterdir())
        discard_entry(entry)
        removed += 1
    for leftover in folder.glob(".damaged-*"):
        shutil.rmtree(leftover)
    print(f"{folder}: removed {removed} entries, {size / 2**20:.1f} MiB")
    return 0


def _is_intact(entry: Path) -> bool:
    try:
        check_entry(entry)
    except DamagedEntryError:
        return False
    return True


def entries(folder: Path) -> Iterator[Path]:
    """Folders that are, or have been, entries of a cache."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir() and not path.name.startswith(".") and (path / "spec.json").is_file():
            yield path


def prebuilt_folders() -> list[Path]:
    """Those of the environment and of the installed distributions, as far as they exist."""
    from . import backends

    chosen = env.PREBUILT_DIR.get()
    folders = [] if chosen is None else [chosen]
    folders.append(sources.prebuilt_folder("flash2"))
    try:
        if backends.hopper() is not None:
            folders.append(sources.prebuilt_folder("hopper"))
    except ImportError as error:
        print(f"warning: {error}", file=sys.stderr)
    return [folder for folder in folders if folder.is_dir()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flash_attn_interface.cache",
        description="Compiled kernels on this machine: show, verify or remove them.",
    )
    parser.set_defaults(entries=False)
    commands = parser.add_subparsers(dest="command", metavar="show | verify | clear")
    shown = commands.add_parser("show", help="folders and what they hold (the default)")
    shown.add_argument("--entries", action="store_true", help="a line for each entry")
    commands.add_parser("verify", help="check all entries against their checksums")
    cleared = commands.add_parser("clear", help="remove entries of this user's cache")
    cleared.add_argument("--older-than", type=float, metavar="DAYS", help="only those")
    cleared.add_argument("--damaged", action="store_true", help="only those")
    return parser


if __name__ == "__main__":
    sys.exit(main())
