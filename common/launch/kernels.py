"""KernelSpec -> something that launches: on the target's device, or in the simulator.

Backends' plans call `load` once and `launch` at each call. The device's hot path is `driver.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..ask.problem import Target
from ..params import ParamBlock, ParamLayout
from ..runtime.spec import KernelSpec
from .driver import DeviceKernel, device_kernel

if TYPE_CHECKING:
    from ..sim.launcher import SimKernel


class Kernel(Protocol):
    """A kernel ready to launch on one target."""

    layout: ParamLayout

    def launch(
        self,
        grid: int,
        block: ParamBlock,
        tensors: Sequence[Tensor | None],
        programmatic: bool = False,
    ) -> None:
        """Runs or queues `grid` CTAs.

        tensors: all that the kernel may touch; the simulator allows no other access.
        programmatic: it may start before the launch ahead of it on the stream has ended; see
        common/ptx/griddepcontrol.cuh for what the kernel then has to do. sm_90 or newer.
        """


def load(spec: KernelSpec, target: Target) -> Kernel:
    """The kernel of a spec: found in a cache, or compiled now."""
    if target.simulated:
        from ..sim.launcher import SimKernel  # g++ and its cache are needed for nothing else

        return _Simulated(spec, SimKernel(spec))
    return _OnDevice(spec, device_kernel(spec, target.device_index), target.device_index)


class _OnDevice:
    def __init__(self, spec: KernelSpec, kernel: DeviceKernel, device_index: int) -> None:
        self.layout = ParamLayout.load(spec.params)
        self._launch = kernel.launch
        self._device_index = device_index
        # Private, but a tenth of the cost of their public twins, on a path of microseconds.
        self._current_device = torch._C._cuda_getDevice
        self._raw_stream = torch._C._cuda_getCurrentRawStream

    def launch(
        self,
        grid: int,
        block: ParamBlock,
        tensors: Sequence[Tensor | None],
        programmatic: bool = False,
    ) -> None:
        index = self._device_index
        address = block.kernel_params_address
        if self._current_device() == index:
            self._launch(grid, address, self._raw_stream(index), programmatic)
        else:
            with torch.cuda.device(index):
                self._launch(grid, address, self._raw_stream(index), programmatic)


class _Simulated:
    def __init__(self, spec: KernelSpec, kernel: SimKernel) -> None:
        self.layout = ParamLayout.load(spec.params)
        self._kernel = kernel

    def launch(
        self,
        grid: int,
        block: ParamBlock,
        tensors: Sequence[Tensor | None],
        programmatic: bool = False,
    ) -> None:
        self._kernel.launch(grid, block.address, tensors, programmatic)
