"""SimKernel: runs a kernel on CPU tensors in the simulator, every access and wait checked.

``kernels.load`` makes one where it would make a ``DeviceKernel`` for a GPU::

    kernel = SimKernel(spec)
    kernel.launch(grid, block.address, [q, k, v, out, softmax_lse])

``docs/simulator.md`` lists what is checked.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

from .. import env
from ..runtime.spec import KernelSpec
from . import build
from .build import SimulatorError

__all__ = ["Checks", "SimKernel", "SimulatorError", "checks"]

_MESSAGE_BYTES = 1 << 16


@dataclass(frozen=True)
class Checks:
    """How kernels are run. racecheck: detect races on shared memory.

    seed: 0 runs lanes and warps in order; other values shuffle who runs next at each switch, each
    value in its own reproducible way.

    resident_ctas: as many CTAs, in whole clusters, have started and not ended at a time. Matters to
    kernels whose CTAs wait for each other; the default is an H100 with one CTA on each SM.

    ordered_adds: CTAs that add floats to the same place must make an order of it, by counters.
    Needs racecheck.
    """

    racecheck: bool = True
    seed: int = 0
    resident_ctas: int = 132
    ordered_adds: bool = False


_checks: ContextVar[Checks] = ContextVar("flash_attn_simulator_checks")


@contextlib.contextmanager
def checks(
    racecheck: bool | None = None,
    seed: int | None = None,
    resident_ctas: int | None = None,
    ordered_adds: bool | None = None,
) -> Iterator[None]:
    """Runs the body's kernels with these fields of Checks changed."""
    current = _current_checks()
    changed = Checks(
        current.racecheck if racecheck is None else racecheck,
        current.seed if seed is None else seed,
        current.resident_ctas if resident_ctas is None else resident_ctas,
        current.ordered_adds if ordered_adds is None else ordered_adds,
    )
    if changed.ordered_adds and not changed.racecheck:
        raise ValueError("ordered_adds=True needs racecheck=True, whose clocks it compares")
    token = _checks.set(changed)
    try:
        yield
    finally:
        _checks.reset(token)


def _current_checks() -> Checks:
    return _checks.get(Checks())


class _Range(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_void_p), ("end", ctypes.c_void_p)]


class _Earlier(ctypes.Structure):
    _fields_ = [
        ("begin", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("written", ctypes.c_uint64),
    ]


class _Launch(ctypes.Structure):
    """struct Launch of runtime/machine.h."""

    _fields_ = [
        ("run_thread", ctypes.c_void_p),
        ("params", ctypes.c_void_p),
        ("kernel_name", ctypes.c_char_p),
        ("ranges", ctypes.POINTER(_Range)),
        ("written", ctypes.POINTER(ctypes.c_uint8)),
        ("earlier", ctypes.POINTER(_Earlier)),
        ("seed", ctypes.c_uint64),
        ("num_ranges", ctypes.c_int32),
        ("num_earlier", ctypes.c_int32),
        ("programmatic", ctypes.c_int32),
        ("grid", ctypes.c_int32),
        ("cluster_size", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("smem_bytes", ctypes.c_int32),
        ("num_workers", ctypes.c_int32),
        ("resident_ctas", ctypes.c_int32),
        ("racecheck", ctypes.c_int32),
        ("ordered_adds", ctypes.c_int32),
        ("additions", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class _Touched:
    """A tensor of an earlier launch. Weak: what is freed may become part of another tensor."""

    tensor: weakref.ref[Tensor]
    written: bool


_earlier: ContextVar[tuple[_Touched, ...]] = ContextVar("flash_attn_simulator_earlier", default=())


class SimKernel:
    """One kernel built for the simulator. Made by any thread, launched from any thread."""

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec
        self._run = build.runtime().flash_sim_launch
        self._run.restype = ctypes.c_uint64
        self._library = build.kernel(spec)
        self._entry = ctypes.cast(getattr(self._library, build.ENTRY), ctypes.c_void_p).value
        declared = build.cluster_size(self._library)
        if declared != spec.cluster_size:
            raise SimulatorError(
                f"{spec.entry} declares clusters of {declared} CTAs (CLUSTER_KERNEL in "
                f"common/ptx/base.cuh; KERNEL: 1), its KernelSpec says {spec.cluster_size}"
            )

    def launch(
        self,
        grid: int,
        params_address: int,
        tensors: Sequence[Tensor | None],
        programmatic: bool = False,
    ) -> None:
        """Runs `grid` CTAs to their end; SimulatorError tells of the first rule that one breaks.

        tensors: all that the kernel may touch. Accesses outside their extents are errors.
        programmatic: as if the launch before it in this context had not ended.
        """
        if grid % self.spec.cluster_size:
            raise ValueError(
                f"{self.spec.entry}: a grid of {grid} CTAs is not one of whole clusters of "
                f"{self.spec.cluster_size}"
            )
        options = _current_checks()
        ranges = (_Range * max(len(tensors), 1))(*(_extent(tensor) for tensor in tensors))
        written = (ctypes.c_uint8 * len(ranges))()
        before = [(t, part) for part in _earlier.get() if (t := part.tensor()) is not None]
        overlapping = before if programmatic else []
        earlier = (_Earlier * max(len(overlapping), 1))(
            *(_Earlier(r.begin, r.end, p.written) for t, p in overlapping for r in [_extent(t)])
        )
        request = _Launch(
            self._entry,
            params_address,
            self.spec.entry.encode(),
            ranges,
            written,
            earlier,
            options.seed,
            len(tensors),
            len(overlapping),
            programmatic,
            grid,
            self.spec.cluster_size,
            int(self.spec["num_threads"]),
            int(self.spec["smem_bytes"]),
            env.SIM_THREADS.get(),
            options.resident_ctas,
            options.racecheck,
            options.ordered_adds,
            None,
        )
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        if self._run(ctypes.byref(request), message, ctypes.c_uint64(_MESSAGE_BYTES)):
            _earlier.set(())
            raise SimulatorError(self._explain(message.value.decode(errors="replace"), tensors))
        touched = [
            _Touched(weakref.ref(tensor), bool(flag))
            for tensor, flag in zip(tensors, written, strict=False)
            if tensor is not None
        ]
        # A programmatic launch may end while those before it run, for all that the next one knows.
        _earlier.set((*(part for _, part in overlapping), *touched))

    def _explain(self, message: str, tensors: Sequence[Tensor | None]) -> str:
        lines = [message.rstrip(), f"  kernel: {self.spec.describe()}"]
        for i, tensor in enumerate(tensors):
            if tensor is not None and f"tensor {i}," in message:
                lines.append(
                    f"  tensor {i}: shape {tuple(tensor.shape)}, strides {tensor.stride()}, "
                    f"{tensor.dtype}"
                )
        return "\n".join(lines)


def _extent(tensor: Tensor | None) -> _Range:
    """Addresses from the first to the last element, gaps between rows included."""
    if tensor is None or tensor.numel() == 0:
        return _Range(0, 0)
    if tensor.device.type != "cpu":
        raise ValueError(f"the simulator runs on CPU tensors, got one on {tensor.device}")
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    begin = tensor.data_ptr()
    return _Range(begin, begin + (last + 1) * tensor.element_size())
