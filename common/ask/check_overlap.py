"""Memory that a call would write twice, or write while it reads: an error that names the arguments.

Called for tensors that callers bring to be written: caches, gradients, out. Exact for strided
tensors: views that interleave in one buffer, dq, dk and dv of a dqkv say, do not overlap.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import gcd
from typing import NamedTuple

from torch import Tensor

_MAX_STEPS = 20_000  # of a search; strides that nest, as those of views do, need a handful


class _Axis(NamedTuple):
    """Multiples of a stride, in bytes, that an offset may contain."""

    stride: int
    low: int
    high: int


class Layout(NamedTuple):
    """Where the bytes of a tensor lie, from its first element on."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements
    itemsize: int

    @staticmethod
    def of(tensor: Tensor) -> Layout:
        return Layout(tuple(tensor.shape), tuple(tensor.stride()), tensor.element_size())

    @property
    def nbytes(self) -> int:
        """From the first byte to the last, holes included."""
        run, axes = self.runs()
        return 0 if 0 in self.shape else run + sum(stride * (size - 1) for stride, size in axes)

    def runs(self) -> tuple[int, list[tuple[int, int]]]:
        """Bytes that lie side by side, and (stride in bytes, size) of the axes that repeat them."""
        pairs = zip(self.shape, self.strides, strict=True)
        axes = sorted((stride * self.itemsize, size) for size, stride in pairs if size > 1)
        run = self.itemsize
        while axes and axes[0][0] == run:
            run *= axes.pop(0)[1]
        return run, axes


@lru_cache(4096)
def overlaps_itself(layout: Layout) -> bool:
    """Whether two elements share a byte."""
    if 0 in layout.shape:
        return False
    run, axes = layout.runs()
    if len({stride for stride, _ in axes}) < len(axes):
        return True
    steps = [_Axis(stride, 1 - size, size - 1) for stride, size in axes]
    return _reaches(0, steps, (1 - run, run - 1), trivially=False)


@lru_cache(4096)
def overlap(first: Layout, second: Layout, distance: int) -> bool:
    """Whether two tensors share a byte, the second beginning `distance` bytes behind the first."""
    if not -second.nbytes < distance < first.nbytes:
        return False
    run_first, axes_first = first.runs()
    run_second, axes_second = second.runs()
    ranges: dict[int, tuple[int, int]] = {}
    for (stride, size), sign in (
        *((axis, 1) for axis in axes_first), *((axis, -1) for axis in axes_second),
    ):  # fmt: skip
        low, high = ranges.get(stride, (0, 0))
        ranges[stride] = (low, high + size - 1) if sign > 0 else (low - size + 1, high)
    steps = [_Axis(stride, *ranges[stride]) for stride in ranges]
    return _reaches(distance, steps, (1 - run_second, run_first - 1), trivially=True)


def _reaches(distance: int, axes: list[_Axis], run: tuple[int, int], trivially: bool) -> bool:
    """Whether `distance` is a sum of an allowed multiple of each stride and a number of the run.

    trivially: also with multiples that are all 0. True as well where the search takes too long.
    """
    axes = sorted(axes, reverse=True)
    least, most, common = [run[0]], [run[1]], [0]  # of what the axes from one on add to the run
    for axis in reversed(axes):
        least.insert(0, least[0] + axis.stride * axis.low)
        most.insert(0, most[0] + axis.stride * axis.high)
        common.insert(0, gcd(common[0], axis.stride))
    steps = 0

    def search(depth: int, left: int, zero: bool) -> bool:
        nonlocal steps
        steps += 1
        if steps > _MAX_STEPS:
            return True
        if not least[depth] <= left <= most[depth]:
            return False
        if depth == len(axes):
            return trivially or not zero
        if common[depth] and (left - run[0]) % common[depth] > run[1] - run[0]:
            return False
        axis = axes[depth]
        if axis.stride == 0:  # any multiple is as good as one that is not 0
            return search(depth + 1, left, False)
        first = max(axis.low, -((most[depth + 1] - left) // axis.stride))
        last = min(axis.high, (left - least[depth + 1]) // axis.stride)
        return any(
            search(depth + 1, left - axis.stride * count, zero and count == 0)
            for count in range(first, last + 1)
        )

    return search(0, distance, True)


class _Span(NamedTuple):
    """From the first byte of a tensor to behind its last; empty where there is no memory to speak
    of: meta and fake tensors, wrappers of other tensors, the tensors of torch.func's transforms."""

    name: str
    tensor: Tensor
    begin: int
    end: int

    @staticmethod
    def of(name: str, tensor: Tensor) -> _Span:
        try:
            begin = tensor.data_ptr()
        except RuntimeError:
            begin = 0
        if begin == 0:
            return _Span(name, tensor, 0, 0)
        nbytes = tensor.nbytes if tensor.is_contiguous() else Layout.of(tensor).nbytes
        return _Span(name, tensor, begin, begin + nbytes)

    def overlaps(self, other: _Span) -> bool:
        if self.end <= other.begin or other.end <= self.begin:
            return False
        layouts = Layout.of(self.tensor), Layout.of(other.tensor)
        return overlap(*layouts, other.begin - self.begin)


def check_output(name: str, tensor: Tensor) -> None:
    """ValueError if the tensor, which will be written, overlaps itself."""
    if not tensor.is_contiguous() and overlaps_itself(Layout.of(tensor)):
        raise ValueError(
            f"{name} has stride {tensor.stride()} for shape {tuple(tensor.shape)}, so that its "
            "elements share memory, as after expand(): it is written, pass a .clone()"
        )


def check_outputs(outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor | None]) -> None:
    """ValueError if an output overlaps itself, another output, or an input that is read."""
    written: list[_Span] = []
    for name, tensor in outputs.items():
        check_output(name, tensor)
        span = _Span.of(name, tensor)
        for other in written:
            if span.overlaps(other):
                raise ValueError(
                    f"{name} overlaps {other.name} in memory: both are written, pass distinct "
                    "tensors"
                )
        written.append(span)
    for name, read in inputs.items():
        if read is None:
            continue
        span = _Span.of(name, read)
        for other in written:
            if span.overlaps(other):
                raise ValueError(
                    f"{other.name} overlaps {name} in memory: {name} is read while {other.name} is "
                    "written, pass distinct tensors"
                )
