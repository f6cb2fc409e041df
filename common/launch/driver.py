"""Driver API through cuda-bindings: load a cubin once per process, launch it on a given stream.

Plans call ``device_kernel(spec, device_index)`` once and ``launch`` at each call. ``launch`` is the
hot path of the package: beside the binding's own 5 us it may cost well under one.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from .. import env
from ..runtime import compiler, cubins
from ..runtime.spec import KernelSpec

# CUresult values that a launch can mend: INVALID_VALUE is what a kernel that needs more than 48 KiB
# of shared memory gives on a device it was not prepared for.
_INVALID_VALUE = 1
INVALID_CONTEXT = 201
_INSUFFICIENT_DRIVER = 35  # of the runtime API; the driver API has no such value
_OLDEST_DRIVER = 12000
_DEFAULT_MAX_DYNAMIC_SMEM = 48 * 1024


class DriverError(RuntimeError):
    """A driver call failed. ``code`` is its CUresult as an int."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def load_bindings() -> Any:
    """The module cuda.bindings.driver; ImportError says how to install it."""
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise ImportError(
            f"flash_attn_interface launches kernels through cuda-bindings, which cannot be "
            f'imported ({error}). Fix: pip install "cuda-bindings==13.*" '
            f'(CUDA 12: "cuda-bindings==12.*")'
        ) from error


class DeviceKernel:
    """A loaded kernel. One object serves all devices, contexts, streams and threads of the process.

    It is never unloaded: plans and captured CUDA graphs may hold its handle. On the device it takes
    what its code takes, 10 to 150 KiB; a process loads one for each kind of call that it makes.
    """

    def __init__(self, spec: KernelSpec, cubin: bytes, made_by: str = "") -> None:
        """made_by: the compiler, if it is not this installation's; for messages."""
        cuda = load_bindings()
        self.spec = spec
        self._cuda = cuda
        self._cubin = cubin
        self._smem = int(spec["smem_bytes"])
        self._threads = int(spec["num_threads"])
        self._prepared: set[int] = set()
        self._guard = threading.Lock()
        _check_driver(cuda)
        self._call("cuInit", 0)
        self._library = self._load(cubin, made_by)
        self._kernel = self._call("cuLibraryGetKernel", self._library, spec.entry.encode())
        # A CUkernel is passed where a CUfunction is expected; converted once, not at each launch.
        self._function = cuda.CUfunction(int(self._kernel))
        self._launch = cuda.cuLaunchKernel
        self._streams: dict[int, Any] = {}
        self._programmatic: dict[tuple[int, int], Any] = {}

    def prepare(self, device_index: int) -> None:
        """Allows the kernel its shared memory on the device and loads its code there. Once each.

        Done before the first launch, so that no launch loads code lazily: that may synchronise the
        device, and is not allowed while a CUDA graph is captured.
        """
        if device_index in self._prepared:
            return
        with self._guard:
            if device_index in self._prepared:
                return
            device = self._call("cuDeviceGet", device_index)
            if self._smem > _DEFAULT_MAX_DYNAMIC_SMEM:
                names = self._cuda.CUfunction_attribute
                attribute = names.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._call("cuKernelSetAttribute", attribute, self._smem, self._kernel, device)
            previous = self._call("cuCtxGetCurrent")
            self._call("cuCtxSetCurrent", _primary_context(self._cuda, device_index))
            try:
                self._call("cuKernelGetFunction", self._kernel)
            finally:
                self._call("cuCtxSetCurrent", previous)
            self._prepared.add(device_index)

    def launch(
        self, grid: int, params_address: int, stream: int, programmatic: bool = False
    ) -> None:
        """Queues the kernel with ``grid`` CTAs.

        params_address: of a void*[1] array that points to the parameter block
        (``ParamBlock.kernel_params_address``); the block is copied before this returns.
        stream: raw handle, of the device the caller made current; 0 is the default stream.
        programmatic: the kernel may start before the launch ahead of it on the stream has ended. It
        is compiled for sm_90 or newer and calls griddepcontrol_wait() (common/ptx).
        """
        if programmatic:
            status = self._launch_early(grid, params_address, stream)
        else:
            handle = self._streams.get(stream)
            if handle is None:
                handle = self._stream(stream)
            (status,) = self._launch(
                self._function, grid, 1, 1, self._threads, 1, 1, self._smem, handle,
                params_address, 0,
            )  # fmt: skip
        if status:
            self._mend_or_raise(status, grid, params_address, stream, programmatic)

    def _launch_early(self, grid: int, params_address: int, stream: int) -> Any:
        config = self._programmatic.get((grid, stream))
        if config is None:
            config = self._programmatic_config(grid, stream)
        (status,) = self._cuda.cuLaunchKernelEx(config, self._function, params_address, 0)
        return status

    def _programmatic_config(self, grid: int, stream: int) -> Any:
        """Made once, because filling one in costs more than the launch; never changed later."""
        cuda = self._cuda
        attribute = cuda.CUlaunchAttribute()
        ids = cuda.CUlaunchAttributeID
        attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config = cuda.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self._threads, 1, 1
        config.sharedMemBytes = self._smem
        config.hStream = self._stream(stream)
        config.attrs = [attribute]
        config.numAttrs = 1
        if len(self._programmatic) >= 1024:
            self._programmatic.clear()
        self._programmatic[grid, stream] = config
        return config

    def _load(self, cubin: bytes, made_by: str) -> Any:
        try:
            return self._call("cuLibraryLoadData", cubin, None, None, 0, None, None, 0)
        except DriverError as error:
            version = int(self._call("cuDriverGetVersion"))
            supported = version // 1000, version % 1000 // 10
            told = compiler.too_old(supported, made_by or compiler.compiler_version())
            raise DriverError(f"{error}\n  {told}", error.code) from error

    def _stream(self, stream: int) -> Any:
        if len(self._streams) >= 1024:  # handles are reused, this only bounds a leak
            self._streams.clear()
        handle = self._streams[stream] = self._cuda.CUstream(stream)
        return handle

    def _mend_or_raise(
        self, status: Any, grid: int, params_address: int, stream: int, programmatic: bool
    ) -> None:
        """The slow path of ``launch``: one retry where the cause can be removed."""
        code = int(status)
        if code in (INVALID_CONTEXT, _INVALID_VALUE):
            device_index = _torch_device()
            mended = False
            if code == INVALID_CONTEXT or int(self._call("cuCtxGetCurrent")) == 0:
                make_context_current(self._cuda)
                mended = True
            if device_index not in self._prepared:
                self.prepare(device_index)
                mended = True
            if mended and programmatic:
                status = self._launch_early(grid, params_address, stream)
            elif mended:
                (status,) = self._launch(
                    self._function, grid, 1, 1, self._threads, 1, 1, self._smem,
                    self._stream(stream), params_address, 0,
                )  # fmt: skip
            code = int(status)
        if code:
            function = "cuLaunchKernelEx" if programmatic else "cuLaunchKernel"
            self._fail(function, status, f", grid {grid}")

    def _call(self, function: str, *arguments: object) -> Any:
        status, *result = getattr(self._cuda, function)(*arguments)
        if int(status) != 0:
            self._fail(function, status)
        return result[0] if result else None

    def _fail(self, function: str, status: Any, where: str = "") -> None:
        code = int(status)
        name = getattr(status, "name", str(status))
        raise DriverError(
            f"{function} failed: {name} ({code}) for kernel {self.spec.label()}{where}, "
            f"{self._threads} threads, {self._smem} bytes of shared memory\n"
            f"  {self.spec.describe()}",
            code,
        )


_kernels: dict[KernelSpec, DeviceKernel] = {}
_kernels_guard = threading.Lock()
_contexts: dict[int, Any] = {}


def _after_fork() -> None:
    """In a forked child, no thread would ever release what another thread of the parent held."""
    global _kernels_guard
    _kernels_guard = threading.Lock()
    for kernel in _kernels.values():
        kernel._guard = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def device_kernel(spec: KernelSpec, device_index: int) -> DeviceKernel:
    """The kernel, ready to launch on the device: found or compiled, loaded and prepared."""
    if spec.arch == env.TEST_ARCH.get():
        spec = spec.as_ptx()  # its machine code does not run on the device that there is
    kernel = _kernels.get(spec)
    if kernel is None:
        told = compiler.unfit_for_the_driver()
        if told is not None and cubins.default_kernels().find(spec) is None:
            raise DriverError(f"{told}\n  {spec.describe()}", _INSUFFICIENT_DRIVER)
        image = cubins.default_kernels().image(spec)  # outside the guard: others compile meanwhile
        with _kernels_guard:
            kernel = _kernels.get(spec)
            if kernel is None:
                kernel = _kernels[spec] = _loaded(image)
    kernel.prepare(device_index)
    return kernel


def _check_driver(cuda: Any) -> None:
    """DriverError where the driver lacks the functions that load kernels."""
    status, version = cuda.cuDriverGetVersion()
    if int(status) == 0 and version < _OLDEST_DRIVER:
        raise DriverError(
            f"the display driver supports CUDA {version // 1000}.{version % 1000 // 10}, which is "
            f"too old for these kernels: they need a driver for CUDA 12.0 or newer (525 and later)",
            _INSUFFICIENT_DRIVER,
        )


def _loaded(image: cubins.KernelImage) -> DeviceKernel:
    try:
        return DeviceKernel(image.spec, image.cubin, str(image.facts.get("compiler", "")))
    except DriverError as error:
        if image.origin != "prebuilt":
            raise
        warnings.warn(  # the same words for every kernel, so that they are shown once
            f"flash_attn_interface: the driver refuses (error {error.code}) prebuilt kernels made "
            f"by {image.facts.get('compiler')}; they are compiled here instead",
            RuntimeWarning,
            stacklevel=4,
        )
        return DeviceKernel(image.spec, cubins.default_kernels().image_made_here(image.spec).cubin)


@contextlib.contextmanager
def relaxed_capture() -> Iterator[None]:
    """Within, this thread may allocate memory and wait while another one captures a CUDA graph."""
    cuda = load_bindings()
    relaxed = cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    status, before = cuda.cuThreadExchangeStreamCaptureMode(relaxed)
    if int(status) != 0:
        name = getattr(status, "name", str(status))
        raise DriverError(f"cuThreadExchangeStreamCaptureMode failed: {name}", int(status))
    try:
        yield
    finally:
        cuda.cuThreadExchangeStreamCaptureMode(before)


def make_context_current(cuda: Any) -> None:
    """The context of torch's current device becomes this thread's: for a thread that made no call
    to the CUDA runtime so far, as autograd's when a backward is the first thing that it runs.
    cuda: the module that `load_bindings` returns.
    """
    (status,) = cuda.cuCtxSetCurrent(_primary_context(cuda, _torch_device()))
    if int(status) != 0:
        raise DriverError(f"cuCtxSetCurrent failed: {getattr(status, 'name', status)}", int(status))


def _primary_context(cuda: Any, device_index: int) -> Any:
    """The device's primary context, which is torch's. Retained once and for good."""
    context = _contexts.get(device_index)
    if context is None:
        status, device = cuda.cuDeviceGet(device_index)
        if int(status) == 0:
            status, context = cuda.cuDevicePrimaryCtxRetain(device)
        if int(status) != 0:
            name = getattr(status, "name", str(status))
            raise DriverError(f"no CUDA context on device {device_index}: {name}", int(status))
        _contexts[device_index] = context
    return context


def _torch_device() -> int:
    """torch's current device of this thread; 0 in a process that launches without torch."""
    torch = sys.modules.get("torch")
    return int(torch.cuda.current_device()) if torch is not None else 0
