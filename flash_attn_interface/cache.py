"""`python -m flash_attn_interface cache`: what compiled kernels there are; verify or remove them.

Looks at this user's cache (kernels, and programs of the simulator) and at the prebuilt folders.
Removes nothing outside the cache, and nothing in it that is not a cache entry.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from . import command_line
from ._common import env
from ._common.runtime import cubins, sources
from ._common.runtime import entries as store_entries
from ._common.runtime.entries import DamagedEntryError, check_entry, discard_entry, entries
from .command_line import of_bytes

_SECONDS_PER_DAY = 86400.0


@command_line.guarded
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 if `verify` found damage or something could not be removed."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "clear":
            return clear(options.older_than, options.damaged)
        if options.command == "trim":
            return trim(options.max_size)
        return verify() if options.command == "verify" else show(options.entries)
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def show(with_entries: bool) -> int:
    """Folders, and how many kernels of which sort they hold."""
    folder = env.cache_dir()
    print(f"cache     {folder or 'memory only'}{_limit()}")
    if folder is not None:
        _show_folder(folder, with_entries)
    for folder in prebuilt_folders():
        print(f"prebuilt  {cubins.describe_prebuilt(folder)}")
        _show_folder(folder, with_entries)
    return 0


def _limit() -> str:
    limit = env.CACHE_LIMIT.get()
    return "" if limit is None else f", at most {of_bytes(limit)}"


def _show_folder(folder: Path, with_entries: bool) -> None:
    sorts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    used: dict[str, float] = {}
    for entry in entries(folder):
        size, last = store_entries.size_of(entry), store_entries.last_used(entry)
        sort, compiler = _sort_and_compiler(entry)
        sorts[sort] += 1
        sizes[sort] += size
        used[sort] = max(used.get(sort, 0.0), last)
        if with_entries:
            print(f"  {entry.name}  {size / 1024:.0f} KiB  {compiler}  used {_day(last)}")
    for sort, count in sorted(sorts.items()):
        print(f"  {count:5} {sort}, {sizes[sort] / 2**20:.1f} MiB, last used {_day(used[sort])}")
    if len(sorts) > 1:
        print(f"  {sorts.total():5} in all, {sizes.total() / 2**20:.1f} MiB")
    if not sorts:
        print("  no entries")


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))


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
            "`python -m flash_attn_interface cache clear --damaged`; for prebuilt ones reinstall"
        )
    return 1 if damaged else 0


def clear(older_than_days: float | None, only_damaged: bool) -> int:
    """Removes entries of this user's cache. Processes that use them are not disturbed.

    older_than_days: only those that no process loaded for so long.
    """
    folder = env.cache_dir()
    if folder is None:
        print("there is no cache folder")
        return 0
    oldest = None if older_than_days is None else time.time() - older_than_days * _SECONDS_PER_DAY
    removed = size = 0
    for entry in list(entries(folder)):
        if oldest is not None and store_entries.last_used(entry) >= oldest:
            continue
        if only_damaged and _is_intact(entry):
            continue
        size += store_entries.size_of(entry)
        discard_entry(entry)
        removed += 1
    for leftover in folder.glob(".damaged-*"):
        store_entries.remove(leftover)
    print(f"{folder}: removed {removed} entries, {size / 2**20:.1f} MiB")
    return 0


def trim(max_bytes: int | None) -> int:
    """Removes what was not used for longest until the rest of the cache fits."""
    folder, limit = env.cache_dir(), max_bytes
    if limit is None:
        limit = env.CACHE_LIMIT.get()
    if limit is None:
        raise ValueError(f"trim needs --max-size, or {env.CACHE_LIMIT.name}")
    if folder is None:
        print("there is no cache folder")
        return 0
    count, size = store_entries.trim(folder, limit)
    print(f"{folder}: removed {count} entries, {size / 2**20:.1f} MiB")
    return 0


def _size(text: str) -> int:
    try:
        return int(env.CACHE_LIMIT.parse(text) or 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {env.CACHE_LIMIT.kind}") from None


def _is_intact(entry: Path) -> bool:
    try:
        check_entry(entry)
    except DamagedEntryError:
        return False
    return True


def prebuilt_folders() -> list[Path]:
    """Those of the environment and of the installed distributions, as far as they exist."""
    from .call import backends

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
    parser = command_line.Parser(
        prog="python -m flash_attn_interface cache",
        description="Compiled kernels on this machine: show, verify or remove them.",
    )
    parser.set_defaults(entries=False)
    commands = parser.add_subparsers(dest="command", metavar="show | verify | clear | trim")
    shown = commands.add_parser("show", help="folders and what they hold (the default)")
    shown.add_argument("--entries", action="store_true", help="a line for each entry")
    commands.add_parser("verify", help="check all entries against their checksums")
    cleared = commands.add_parser("clear", help="remove entries of this user's cache")
    cleared.add_argument(
        "--older-than",
        type=command_line.not_negative,
        metavar="DAYS",
        help="only those that were not used for so long",
    )
    cleared.add_argument("--damaged", action="store_true", help="only those")
    trimmed = commands.add_parser("trim", help="remove what was not used for longest")
    trimmed.add_argument(
        "--max-size",
        type=_size,
        metavar="SIZE",
        help=f"what may stay, such as 2G; default: {env.CACHE_LIMIT.name}",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
