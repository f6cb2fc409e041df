"""What the commands (`python -m flash_attn_interface ...`) have in common: what goes wrong is one
line on stderr, never a traceback. SIGTERM, which fleets send, ends what a command has started.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn, Protocol

INTERRUPTED = 130  # as shells say of SIGINT
WRONG_USAGE = 2
_BROKEN_PIPE = 141  # of SIGPIPE
_TERMINATED = 143  # of SIGTERM


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
            with _unwound_by_sigterm():
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


@contextlib.contextmanager
def _unwound_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM raises SystemExit, so that compilers at work are ended too."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(_TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set a handler
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def make_folder(folder: Path) -> None:
    """Creates it where it is missing; OSError that names it if nothing can be written there."""
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder} cannot be created ({error.strerror})") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"{folder} may not be written to")


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
