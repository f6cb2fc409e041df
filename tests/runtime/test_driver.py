"""DeviceKernel: against a stand-in for the CUDA bindings, and (`gpu`) on the device."""

from __future__ import annotations

import enum
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_kernels import LAYOUT, tiny_spec, tiny_tree

from flash_attn_interface._common.launch import driver
from flash_attn_interface._common.launch.driver import DeviceKernel, DriverError
from flash_attn_interface._common.runtime import compiler, cubins
from flash_attn_interface._common.runtime.cubins import ArtifactStore, KernelCache

__all__ = ["tiny_tree"]


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


class FunctionAttribute(enum.IntEnum):
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8


class LaunchAttributeID(enum.IntEnum):
    CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class Record(SimpleNamespace):
    """A structure of the bindings: fields are set one by one."""


class LaunchAttribute(Record):
    def __init__(self) -> None:
        super().__init__(id=None, value=Record())


class Handle(int):
    pass


class CUfunction(Handle):
    pass


class CUstream(Handle):
    pass


OK = CUresult.CUDA_SUCCESS


@dataclass
class FakeCuda:
    """The part of cuda.bindings.driver in use, for two devices. ``calls`` is what was asked."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    launch_results: list[CUresult] = field(default_factory=list)
    context: int = 0x1000

    CUlaunchAttributeID = LaunchAttributeID
    CUlaunchAttribute = LaunchAttribute
    CUlaunchConfig = Record
    CUfunction = CUfunction
    CUstream = CUstream
    CUfunction_attribute = FunctionAttribute

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]

    def cuInit(self, flags: int) -> tuple[CUresult]:
        return (OK,)

    def cuDriverGetVersion(self) -> tuple[CUresult, int]:
        return OK, 12040

    def cuLibraryLoadData(self, code: bytes, *options: object) -> tuple[CUresult, Handle]:
        self.calls.append(("cuLibraryLoadData", code))
        return OK, Handle(0x77)

    def cuLibraryGetKernel(self, library: Handle, name: bytes) -> tuple[CUresult, Handle]:
        self.calls.append(("cuLibraryGetKernel", library, name))
        return OK, Handle(0x88)

    def cuDeviceGet(self, index: int) -> tuple[CUresult, Handle]:
        return (OK, Handle(index)) if index < 2 else (CUresult.CUDA_ERROR_INVALID_DEVICE, Handle())

    def cuKernelSetAttribute(
        self, attribute: FunctionAttribute, value: int, kernel: Handle, device: Handle
    ) -> tuple[CUresult]:
        self.calls.append(("cuKernelSetAttribute", int(attribute), value, kernel, device))
        return (OK,)

    def cuDevicePrimaryCtxRetain(self, device: Handle) -> tuple[CUresult, Handle]:
        self.calls.append(("cuDevicePrimaryCtxRetain", device))
        return OK, Handle(0x1000 + device)

    def cuCtxGetCurrent(self) -> tuple[CUresult, Handle]:
        return OK, Handle(self.context)

    def cuCtxSetCurrent(self, context: Handle) -> tuple[CUresult]:
        self.calls.append(("cuCtxSetCurrent", int(context)))
        self.context = int(context)
        return (OK,)

    def cuKernelGetFunction(self, kernel: Handle) -> tuple[CUresult, Handle]:
        self.calls.append(("cuKernelGetFunction", self.context))
        if self.context == 0:
            return CUresult.CUDA_ERROR_INVALID_CONTEXT, Handle()
        return OK, Handle(0x99)

    def cuLaunchKernel(self, *arguments: object) -> tuple[CUresult]:
        self.calls.append(("cuLaunchKernel", *arguments))
        return (self.launch_results.pop(0) if self.launch_results else OK,)

    def cuLaunchKernelEx(self, *arguments: object) -> tuple[CUresult]:
        self.calls.append(("cuLaunchKernelEx", *arguments))
        return (self.launch_results.pop(0) if self.launch_results else OK,)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(driver, "load_bindings", lambda: fake)
    monkeypatch.setattr(driver, "_contexts", {})
    monkeypatch.setattr(driver, "_torch_device", lambda: 0)
    return fake


def kernel_of(cuda: FakeCuda, smem_bytes: int = 65536) -> DeviceKernel:
    kernel = DeviceKernel(tiny_spec(smem_bytes=smem_bytes, causal=True), b"\x7fELF")
    assert cuda.names() == ["cuLibraryLoadData", "cuLibraryGetKernel"]
    assert cuda.calls[1][2] == b"tiny_scale"
    cuda.calls.clear()
    return kernel


def test_prepare_allows_the_shared_memory_and_loads_once_per_device(cuda: FakeCuda) -> None:
    kernel = kernel_of(cuda)
    cuda.context = 0x5
    kernel.prepare(1)
    assert cuda.calls == [
        ("cuKernelSetAttribute", 8, 65536, 0x88, 1),
        ("cuDevicePrimaryCtxRetain", 1),
        ("cuCtxSetCurrent", 0x1001),
        ("cuKernelGetFunction", 0x1001),
        ("cuCtxSetCurrent", 0x5),  # as the caller had it
    ]
    cuda.calls.clear()
    kernel.prepare(1)
    assert cuda.calls == []
    kernel.prepare(0)
    assert cuda.names().count("cuKernelSetAttribute") == 1


def test_a_kernel_with_little_shared_memory_needs_no_permission(cuda: FakeCuda) -> None:
    kernel_of(cuda, smem_bytes=48 * 1024).prepare(0)
    assert "cuKernelSetAttribute" not in cuda.names()


def test_launch_passes_grid_block_memory_stream_and_params(cuda: FakeCuda) -> None:
    kernel = kernel_of(cuda)
    kernel.prepare(0)
    cuda.calls.clear()
    kernel.launch(2**31 - 1, 0xABC, 0x55)
    kernel.launch(3, 0xABC, 0x55)
    first, second = cuda.calls
    assert first == ("cuLaunchKernel", 0x88, 2**31 - 1, 1, 1, 64, 1, 1, 65536, 0x55, 0xABC, 0)
    assert second == ("cuLaunchKernel", 0x88, 3, 1, 1, 64, 1, 1, 65536, 0x55, 0xABC, 0)
    assert isinstance(first[1], CUfunction) and isinstance(first[9], CUstream)
    assert first[9] is second[9]  # wrapping a stream anew costs time


def test_a_programmatic_launch_passes_the_same_and_one_attribute(cuda: FakeCuda) -> None:
    kernel = kernel_of(cuda)
    kernel.prepare(0)
    cuda.calls.clear()
    kernel.launch(7, 0xABC, 0x55, programmatic=True)
    kernel.launch(7, 0xDEF, 0x55, programmatic=True)
    kernel.launch(8, 0xABC, 0x55, programmatic=True)
    first, second, third = cuda.calls
    config = first[1]
    assert first == ("cuLaunchKernelEx", config, 0x88, 0xABC, 0)
    assert second == ("cuLaunchKernelEx", config, 0x88, 0xDEF, 0)
    assert second[1] is config and third[1] is not config and third[1].gridDimX == 8
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (7, 1, 1)
    assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (64, 1, 1)
    assert (config.sharedMemBytes, config.hStream, config.numAttrs) == (65536, 0x55, 1)
    (attribute,) = config.attrs
    assert attribute.id is LaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    assert attribute.value.programmaticStreamSerializationAllowed == 1


def test_a_programmatic_launch_is_mended_as_any_other(cuda: FakeCuda) -> None:
    kernel = kernel_of(cuda)
    cuda.launch_results = [CUresult.CUDA_ERROR_INVALID_VALUE]
    kernel.launch(1, 0xABC, 0, programmatic=True)
    names = cuda.names()
    assert names[0] == names[-1] == "cuLaunchKernelEx" and "cuKernelSetAttribute" in names
    cuda.launch_results = [CUresult.CUDA_ERROR_ILLEGAL_ADDRESS]
    with pytest.raises(DriverError, match="cuLaunchKernelEx failed: CUDA_ERROR_ILLEGAL_ADDRESS"):
        kernel.launch(1, 0xABC, 0, programmatic=True)


def test_stream_handles_do_not_pile_up(cuda: FakeCuda) -> None:
    kernel = kernel_of(cuda)
    for stream in range(3000):
        kernel.launch(1, 0, stream)
        kernel.launch(1, 0, stream, programmatic=True)
    assert len(kernel._streams) <= 1024 and len(kernel._programmatic) <= 1024


def test_a_thread_without_context_gets_torchs_and_the_launch_is_repeated(cuda: FakeCuda) -> None:
    kernel = kernel_of(cuda)
    kernel.prepare(0)
    cuda.calls.clear()
    cuda.context = 0
    cuda.launch_results = [CUresult.CUDA_ERROR_INVALID_CONTEXT]
    kernel.launch(1, 0xABC, 0)
    assert cuda.names() == ["cuLaunchKernel", "cuCtxSetCurrent", "cuLaunchKernel"]
    assert cuda.context == 0x1000


def test_an_unprepared_device_is_prepared_and_the_launch_repeated(cuda: FakeCuda) -> None:
    kernel = kernel_of(cuda)
    cuda.launch_results = [CUresult.CUDA_ERROR_INVALID_VALUE]
    kernel.launch(1, 0xABC, 0)
    names = cuda.names()
    assert names[0] == names[-1] == "cuLaunchKernel" and "cuKernelSetAttribute" in names


def test_a_fresh_thread_on_an_unprepared_device_gets_both(cuda: FakeCuda) -> None:
    kernel = kernel_of(cuda)
    cuda.context = 0
    cuda.launch_results = [CUresult.CUDA_ERROR_INVALID_VALUE]  # the driver may notice either first
    kernel.launch(1, 0xABC, 0)
    assert cuda.names()[-1] == "cuLaunchKernel" and cuda.names().count("cuLaunchKernel") == 2
    assert "cuKernelSetAttribute" in cuda.names() and cuda.context == 0x1000


@pytest.mark.parametrize(
    ("results", "launches"),
    [
        ([CUresult.CUDA_ERROR_ILLEGAL_ADDRESS], 1),
        ([CUresult.CUDA_ERROR_INVALID_VALUE], 1),
        ([CUresult.CUDA_ERROR_INVALID_CONTEXT, CUresult.CUDA_ERROR_ILLEGAL_ADDRESS], 2),
        ([CUresult.CUDA_ERROR_INVALID_CONTEXT] * 2, 2),
    ],
)
def test_failures_name_error_kernel_grid_and_memory(
    results: list[CUresult], launches: int, cuda: FakeCuda
) -> None:
    kernel = kernel_of(cuda)
    kernel.prepare(0)
    cuda.calls.clear()
    cuda.launch_results = list(results)
    with pytest.raises(RuntimeError) as error:
        kernel.launch(12, 0xABC, 0)
    assert cuda.names().count("cuLaunchKernel") == launches
    text = str(error.value)
    for part in (
        f"cuLaunchKernel failed: {results[-1].name} ({int(results[-1])})",
        "tiny-scale-causal-sm_80",
        "grid 12",
        "64 threads",
        "65536 bytes",
        kernel.spec.describe(),
    ):
        assert part in text
    assert isinstance(error.value, DriverError) and error.value.code == results[-1]


def test_a_cubin_for_another_gpu_is_refused_by_name(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU
    monkeypatch.setattr(FakeCuda, "cuLibraryLoadData", lambda *_: (refused, None))
    monkeypatch.setattr(compiler, "compiler_version", lambda: "nvrtc 13.0.88")
    with pytest.raises(DriverError, match="cuLibraryLoadData failed: .*NO_BINARY_FOR_GPU") as error:
        DeviceKernel(tiny_spec(), b"\x7fELF")
    assert "supports CUDA 12.4, the compiler is nvrtc 13.0.88" in str(error.value)
    assert error.value.code == refused


def test_a_prebuilt_kernel_that_the_driver_refuses_is_compiled_here(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver older than the compiler that the package was built with."""
    loadable, made_by = b"from here", {"compiler": "nvrtc 99.0"}

    def load(self: FakeCuda, code: bytes, *options: object) -> tuple[CUresult, Handle | None]:
        self.calls.append(("cuLibraryLoadData", code))
        if code != loadable:
            return CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU, None
        return OK, Handle(0x77)

    def image(origin: str, code: bytes) -> Any:
        return lambda self, spec: cubins.KernelImage(spec, code, origin, None, made_by)

    monkeypatch.setattr(FakeCuda, "cuLibraryLoadData", load)
    monkeypatch.setattr(driver, "_kernels", {})
    monkeypatch.setenv("FLASH_ATTN_INTERFACE_DISK_CACHE", "0")
    monkeypatch.setattr(KernelCache, "image", image("prebuilt", b"of the package"))
    monkeypatch.setattr(KernelCache, "image_made_here", image("built", loadable))
    with pytest.warns(RuntimeWarning, match="refuses .error 209. prebuilt .* by nvrtc 99.0"):
        driver.device_kernel(tiny_spec(), 0)
    assert [call[1] for call in cuda.calls if call[0] == "cuLibraryLoadData"] == [
        b"of the package",
        loadable,
    ]
    monkeypatch.setattr(driver, "_kernels", {})
    monkeypatch.setattr(KernelCache, "image", image("disk", b"of the cache"))
    with pytest.raises(DriverError):
        driver.device_kernel(tiny_spec(), 0)


def test_an_unknown_device_is_an_error_and_stays_unprepared(cuda: FakeCuda) -> None:
    kernel = kernel_of(cuda)
    for _ in range(2):
        with pytest.raises(DriverError, match="cuDeviceGet failed: CUDA_ERROR_INVALID_DEVICE"):
            kernel.prepare(7)


def test_threads_load_and_prepare_a_kernel_once(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = cubins.KernelImage(tiny_spec(smem_bytes=65536), b"\x7fELF", "built", None, {})
    monkeypatch.setattr(driver, "_kernels", {})
    monkeypatch.setattr(KernelCache, "image", lambda self, spec: image)
    monkeypatch.setenv("FLASH_ATTN_INTERFACE_DISK_CACHE", "0")
    found: list[DeviceKernel] = []
    threads = [
        threading.Thread(target=lambda: found.append(driver.device_kernel(image.spec, 0)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(map(id, found))) == 1
    assert cuda.names().count("cuLibraryLoadData") == 1
    assert cuda.names().count("cuKernelSetAttribute") == 1


def test_missing_bindings_are_an_import_error_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(ImportError, match=r'pip install "cuda-bindings==13\.\*"'):
        driver.load_bindings()


def test_the_fake_has_the_bindings_names() -> None:
    bindings = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    used = [name for name in vars(FakeCuda) if name.startswith(("cu", "CU"))]
    assert used and all(hasattr(bindings, name) for name in used)
    for code in CUresult:
        assert int(getattr(bindings.CUresult, code.name)) == int(code)
    for attribute in FunctionAttribute:
        assert int(getattr(bindings.CUfunction_attribute, attribute.name)) == int(attribute)
    assert not bindings.CUresult.CUDA_SUCCESS and bindings.CUresult.CUDA_ERROR_INVALID_VALUE


# ---- on the device ----------------------------------------------------------------------------

COUNT, BLOCK = 1000, 64
GRID = -(-COUNT // BLOCK)


@pytest.fixture
def scale(tiny_tree: Path, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """scale(x, factor): x *= factor in place by the tiny kernel, on torch's current stream."""
    from flash_attn_interface._common.runtime.arch import arch_of

    device = torch.cuda.current_device()
    spec = tiny_spec(arch_of(torch.cuda.get_device_capability(device)), smem_bytes=65536)
    kernel = DeviceKernel(spec, KernelCache(ArtifactStore(tmp_path / "cache")).image(spec).cubin)

    def run(x: torch.Tensor, factor: float) -> None:
        block = LAYOUT.block(x=x.data_ptr(), count=COUNT, factor=factor)
        stream = torch.cuda.current_stream(x.device).cuda_stream
        kernel.launch(GRID, block.kernel_params_address, stream)

    run.kernel = kernel  # type: ignore[attr-defined]
    yield run


@pytest.mark.gpu
def test_runs_on_the_current_stream_without_preparation(scale: Callable[..., None]) -> None:
    x = torch.randn(COUNT + 1, device="cuda")
    expected = torch.cat([x[:COUNT] * 3, x[COUNT:]])
    scale(x, 3.0)
    torch.testing.assert_close(x, expected, rtol=0, atol=0)


@pytest.mark.gpu
def test_runs_on_another_stream_in_its_order(scale: Callable[..., None]) -> None:
    scale(torch.ones(COUNT, device="cuda"), 1.0)
    stream = torch.cuda.Stream()
    x = torch.zeros(COUNT, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # 10 ms: a launch on the wrong stream would come first
        x.add_(2.0)
        scale(x, 5.0)
        x.add_(1.0)
    stream.synchronize()
    torch.testing.assert_close(x, torch.full_like(x, 11.0), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("prepared", [False, True])
def test_runs_from_a_fresh_thread(scale: Callable[..., None], prepared: bool) -> None:
    x = torch.ones(COUNT, device="cuda")
    torch.cuda.synchronize()
    if prepared:
        scale.kernel.prepare(torch.cuda.current_device())  # type: ignore[attr-defined]
    failures: list[BaseException] = []

    def work() -> None:
        try:
            scale(x, 4.0)  # the thread's first contact with CUDA
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []
    torch.cuda.synchronize()
    torch.testing.assert_close(x, torch.full_like(x, 4.0), rtol=0, atol=0)


@pytest.mark.gpu
def test_is_captured_in_a_cuda_graph(scale: Callable[..., None]) -> None:
    scale.kernel.prepare(torch.cuda.current_device())  # type: ignore[attr-defined]
    x = torch.ones(COUNT, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scale(x, 2.0)
        scale(x, 3.0)  # a second block; the first was copied at capture
    torch.testing.assert_close(x, torch.ones_like(x), rtol=0, atol=0)
    for _ in range(3):
        graph.replay()
    torch.testing.assert_close(x, torch.full_like(x, 216.0), rtol=0, atol=0)


@pytest.mark.gpu
def test_runs_on_every_device(tiny_tree: Path, scale: Callable[..., None]) -> None:
    kernel = scale.kernel  # type: ignore[attr-defined]
    capability = torch.cuda.get_device_capability()
    for index in range(torch.cuda.device_count()):
        if torch.cuda.get_device_capability(index) != capability:
            continue
        with torch.cuda.device(index):
            kernel.prepare(index)
            x = torch.ones(COUNT, device="cuda")
            scale(x, 7.0)
            torch.testing.assert_close(x, torch.full_like(x, 7.0), rtol=0, atol=0)


@pytest.mark.gpu
def test_a_launch_the_device_refuses_is_a_named_error(scale: Callable[..., None]) -> None:
    kernel = scale.kernel  # type: ignore[attr-defined]
    kernel.prepare(torch.cuda.current_device())
    block = LAYOUT.block()
    with pytest.raises(DriverError, match="cuLaunchKernel failed: CUDA_ERROR_INVALID_VALUE"):
        kernel.launch(0, block.kernel_params_address, 0)
