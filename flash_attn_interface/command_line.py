"""What the commands (`python -m flash_attn_interface ...`) have in common: what goes wrong is one
line on stderr, never a traceback.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, Protocol

INTERRUPTED = 130  # as shells say of SIGINT
WRONG_USAGE = 2
_BROKEN_PIPE = 141  # of SIGPIPE


class Main(Protocol):
    """A command: takes its arguments, else those of the process; returns the exit status."""

    def __call__(self, arguments: Sequence[str] | None = None) -> int: ...


class Parser(argparse.ArgumentParser):
    """As argparse's, whose error is preceded by lines of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_USAGE, f"{self.prog}: {message} (--help has the options)\n")


def guarded(main: Main) -> Main:
    """`main`, with an exit status and one line for what a user can cause."""

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None) -> int:
        try:
            status = main(arguments)
            sys.stdout.flush()
            return status
        except KeyboardInterrupt:
            print("\nInterrupted.", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:
            # Python flushes once more at exit, which must not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _BROKEN_PIPE
        except (ValueError, OSError, NotImplementedError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            return WRONG_USAGE

    return run


def positive(text: str) -> int:
    """An argument's type: an integer from 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 1")
    return value


def not_negative(text: str) -> float:
    """An argument's type: a number from 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return value


def of_bytes(count: int) -> str:
    """A size for people: "12.5 MiB"."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit in ("B", "KiB") else f"{size:.1f} {unit}"


def of_seconds(seconds: float) -> str:
    """A duration for people, with as many digits as an estimate has: "40 s", "7 min"."""
    return f"{max(1, round(seconds))} s" if seconds < 90 else f"{round(seconds / 60)} min"
