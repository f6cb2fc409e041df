"""Runs the sm_90a kernels of tests/kernels, as probes.py does the others.

``hopper`` is a fixture, the simulator or a Hopper GPU; import it into a test file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from conftest import Runner
from probes import FOLDER
from torch import Tensor

from flash_attn_interface._common.launch import tensor_map
from flash_attn_interface._common.params import ParamLayout
from flash_attn_interface._common.runtime.spec import KernelSpec

ARCH = "sm_90a"
LAYOUT = ParamLayout.parse(
    "HopperProbeParams",
    (FOLDER / "kernels" / "hopper_probe_params.cuh").read_text(encoding="utf-8"),
)
_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@pytest.fixture(
    params=[
        pytest.param("sim", marks=pytest.mark.sim),
        pytest.param("gpu", marks=pytest.mark.gpu),
    ]
)
def hopper(request: pytest.FixtureRequest) -> Runner:
    if request.param == "gpu" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not a compute capability 9.0 device")
    device = torch.device("cuda" if request.param == "gpu" else "cpu")
    return Runner(request.param, device, ARCH)


def random_words(runner: Runner, *shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).int().to(runner.device)


def encode(
    runner: Runner, tensor: Tensor, box: Sequence[int], swizzle_bytes: int, rank: int = 4
) -> bytes:
    """The map of a tensor, whose last dim is the innermost; missing outer dims have extent 1."""
    dims = list(reversed(tensor.shape))
    strides = [s * tensor.element_size() for s in reversed(tensor.stride()[:-1])]
    missing = rank - tensor.dim()
    return tensor_map.encode(
        "simulated" if runner.name == "sim" else "device",
        _DTYPES[tensor.dtype],
        tensor.data_ptr(),
        [*dims, *[1] * missing],
        [*strides, *[-(-tensor.nbytes // 16) * 16] * missing],
        [*box, *[1] * (rank - len(box))],
        swizzle_bytes,
    )


def run(
    runner: Runner,
    name: str,
    maps: Mapping[str, bytes],
    data: Tensor | None,
    out: Tensor | None,
    tensors: Sequence[Tensor] = (),
    *,
    grid: int = 1,
    programmatic: bool = False,
    synchronize: bool = True,
    which: int = 0,
    box_from: Sequence[int] = (),
    box_to: Sequence[int] = (),
    **constants: bool | int,
) -> None:
    """Runs the CTAs and waits for them, if told to. tensors: those behind the maps."""
    defaults: dict[str, bool | int] = {"num_threads": 32, "min_ctas_per_sm": 1, "smem_bytes": 0}
    spec = KernelSpec.make(
        f"tests/kernels/{name}.cu", name, "HopperProbeParams", ARCH, **{**defaults, **constants}
    )
    block = LAYOUT.block(
        **{"in": None if data is None else data.data_ptr()},
        **maps,
        out=None if out is None else out.data_ptr(),
        which=which,
        to=[*box_to, *[0] * (5 - len(box_to))],
    )
    block.set("from", [*box_from, *[0] * (5 - len(box_from))])
    if runner.name == "sim":
        from flash_attn_interface._common.sim.launcher import SimKernel

        SimKernel(spec).launch(grid, block.address, (data, out, *tensors), programmatic)
        return
    from flash_attn_interface._common.launch.driver import device_kernel

    device = torch.cuda.current_device()
    stream = torch.cuda.current_stream().cuda_stream
    kernel = device_kernel(spec, device)
    kernel.launch(grid, block.kernel_params_address, stream, programmatic)
    if synchronize:
        torch.cuda.synchronize()
