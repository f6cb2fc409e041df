"""Runs the kernels of tests/kernels on the simulator or the GPU; one test body serves both."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import Runner
from torch import Tensor

from flash_attn_interface._common.params import ParamLayout
from flash_attn_interface._common.runtime import sources
from flash_attn_interface._common.runtime.arch import arch_of
from flash_attn_interface._common.runtime.spec import KernelSpec

FOLDER = Path(__file__).parents[1]
LAYOUT = ParamLayout.parse(
    "ProbeParams", (FOLDER / "kernels" / "probe_params.cuh").read_text(encoding="utf-8")
)

sources.register_root("tests", FOLDER)


def probe_spec(name: str, arch: str = "sm_80", **constants: bool | int) -> KernelSpec:
    """Kernel ``name`` of tests/kernels/<name>.cu, by default one warp."""
    defaults: dict[str, bool | int] = {"num_threads": 32, "min_ctas_per_sm": 1, "smem_bytes": 0}
    return KernelSpec.make(
        f"tests/kernels/{name}.cu", name, "ProbeParams", arch, **{**defaults, **constants}
    )


def run(
    runner: Runner,
    name: str,
    data: Tensor,
    out: Tensor,
    aux: Tensor | None = None,
    *,
    grid: int = 1,
    which: int = 0,
    **constants: bool | int,
) -> None:
    """Runs the kernel on tensors of the runner's device and waits for it."""
    block = LAYOUT.block(
        **{"in": data.data_ptr()},
        out=out.data_ptr(),
        aux=None if aux is None else aux.data_ptr(),
        count=data.numel(),
        which=which,
    )
    if runner.name == "sim":
        from flash_attn_interface._common.sim.launcher import SimKernel

        kernel = SimKernel(probe_spec(name, **constants))
        kernel.launch(grid, block.address, (data, out, aux))
        return
    from flash_attn_interface._common.launch.driver import device_kernel

    device = torch.cuda.current_device()
    spec = probe_spec(name, arch_of(torch.cuda.get_device_capability(device)), **constants)
    stream = torch.cuda.current_stream().cuda_stream
    device_kernel(spec, device).launch(grid, block.kernel_params_address, stream)
    torch.cuda.synchronize()
