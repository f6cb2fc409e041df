"""simulate(arch): run the real kernels on CPU tensors, in the simulator of `common/sim`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from .._common.runtime import arch as arch_table

_simulated_arch: ContextVar[str | None] = ContextVar("flash_attn_simulated_arch", default=None)


@contextlib.contextmanager
def simulate(arch: str = "sm_80") -> Iterator[None]:
    """Within the context, CPU tensors take the way of CUDA tensors of a GPU of that architecture.

    Checks, planning, packing of parameters and the kernels' own source are the real ones; g++
    compiles the kernel and each CUDA thread becomes a fiber. It reports out-of-bounds accesses,
    reads before a wait, deadlocks. Meant for problems of a few hundred tokens. Applies to the
    current thread (or asyncio task), and may be nested.

    Args:
        arch: "sm_80", "sm_86", ... or "sm_90a" for the Hopper kernels; see
            `flash_attn_interface._common.runtime.arch`.

    Raises:
        ValueError: an architecture that we do not know.
    """
    arch_table.limits(arch)
    token = _simulated_arch.set(arch)
    try:
        yield
    finally:
        _simulated_arch.reset(token)


def simulated_arch() -> str | None:
    """The architecture being simulated here and now, if any."""
    return _simulated_arch.get()


def capability_of(arch: str) -> tuple[int, int]:
    """ "sm_90a" -> (9, 0)."""
    number = int(arch_table.limits(arch).name.removeprefix("sm_"))
    return number // 10, number % 10
