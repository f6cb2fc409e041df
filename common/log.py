"""The package's log: which backend serves a call and why, what is compiled, where kernels are from.

Python's logger `flash_attn_interface`. FLASH_ATTN_INTERFACE_LOGLEVEL prints it to stderr; without
it nothing is printed unless the application configures that logger. Never on the path of a warm
call.
"""

from __future__ import annotations

import functools
import logging

from . import env

LOGGER = logging.getLogger("flash_attn_interface")


def debug(message: str, *values: object) -> None:
    _configure(env.LOGLEVEL.get())
    LOGGER.debug(message, *values)


def info(message: str, *values: object) -> None:
    _configure(env.LOGLEVEL.get())
    LOGGER.info(message, *values)


@functools.cache
def _configure(level: str | None) -> None:
    """Done when the first line is logged, so that importing changes nothing."""
    for handler in list(LOGGER.handlers):
        if handler.get_name() == _NAME:
            LOGGER.removeHandler(handler)
    if level is None:
        return
    handler = logging.StreamHandler()
    handler.set_name(_NAME)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(level.upper())
    LOGGER.propagate = False  # it is printed; the root logger would print it twice


_NAME = "from the environment"
