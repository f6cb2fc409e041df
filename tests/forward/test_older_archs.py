"""The Ampere tree's kernels of older GPUs on a newer one, by PTX:

    FLASH_ATTN_INTERFACE_TEST_ARCH=sm_86 pytest -m "gpu and not hopper"

runs every GPU test with the tiles and the shared memory of sm_86. Here: what that switch does, with
NVRTC and without a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import hopper_tree
import pytest
import torch
from cases import NAMED_PAIRS
from test_compile_flash2 import compile_spec, problem
from test_driver import FakeCuda, cuda
from tiny_kernels import tiny_spec, tiny_tree

from flash_attn_interface._common import env
from flash_attn_interface._common.ask.backward_problem import BackwardProblem
from flash_attn_interface._common.ask.problem import Target
from flash_attn_interface._common.launch import driver
from flash_attn_interface._common.runtime import arch as arch_table
from flash_attn_interface._common.runtime import cubins as cache
from flash_attn_interface._common.runtime.spec import KernelSpec
from flash_attn_interface._common.runtime.store import ArtifactStore
from flash_attn_interface._flash2 import BACKEND, bwd_tiles, decode_tiles, fwd_tiles
from flash_attn_interface.call import selection

__all__ = ["cuda", "tiny_tree"]

ARCHS = ["sm_80", "sm_86", "sm_89"]
H200 = "NVIDIA H200"


class OnGpu:
    device = torch.device("cuda", 1)

    def get_device(self) -> int:
        return 1


@pytest.fixture
def on_an_h200(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H200)
    yield OnGpu()


@pytest.mark.parametrize("arch", ARCHS)
def test_a_call_is_planned_as_on_the_older_gpu(
    arch: str, on_an_h200: Any, monkeypatch: pytest.MonkeyPatch
):
    """Its tables, not those of the model that there is; no Hopper tree."""
    trees = (hopper_tree.load().BACKEND, BACKEND)
    strides = {f"{name}_strides": (16 * 128 * 4096, 16 * 128, 128) for name in "qkv"}
    asked = replace(problem((128, 128), "causal", "bf16"), **strides)
    own = selection.decide(asked, selection.device_of(on_an_h200), trees)
    assert own.backend.name == "hopper"
    monkeypatch.setenv(env.TEST_ARCH.name, arch)
    older = selection.decide(asked, selection.device_of(on_an_h200), trees)
    assert older.backend.name == "flash2" and older.target == Target(arch, 1)
    plan: Any = older.backend.plan_forward(asked, older.target)
    assert plan.spec == fwd_tiles.forward_spec(asked, arch)
    assert int(plan.spec["smem_bytes"]) <= arch_table.limits(arch).max_smem_per_cta


def test_other_archs_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(env.TEST_ARCH.name, "sm_90")
    with pytest.raises(ValueError, match=r"TEST_ARCH='sm_90': expected `sm_80`"):
        env.TEST_ARCH.get()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.usefixtures("tiny_tree")
def test_the_driver_gets_ptx_of_that_arch_and_machine_code_of_others(
    arch: str, cuda: FakeCuda, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
):
    kernels = cache.KernelCache(ArtifactStore(tmp_path / "store"))
    monkeypatch.setattr(cache, "default_kernels", lambda: kernels)
    monkeypatch.setattr(driver, "_kernels", {})
    monkeypatch.setenv(env.TEST_ARCH.name, arch)
    for spec, begin in ((tiny_spec(arch), b"//"), (tiny_spec("sm_90"), b"\x7fELF")):
        compile_spec(spec)  # skips without NVRTC
        cuda.calls.clear()
        driver.device_kernel(spec, 0)
        name, code = cuda.calls[0]
        assert name == "cuLibraryLoadData" and code.startswith(begin)
    assert cache.KernelCache(ArtifactStore(tmp_path / "store")).image(
        tiny_spec(arch).as_ptx()
    ).origin == "disk"  # fmt: skip


def specs(arch: str, dims: tuple[int, int]) -> list[KernelSpec]:
    width = 2 if any(dim % 2 for dim in dims) else 16
    asked = problem(dims, "causal", "bf16", width)
    backward = BackwardProblem(asked, *[(0, 0, 0)] * 5, *[width] * 3)
    return [
        fwd_tiles.forward_spec(asked, arch),
        *bwd_tiles.backward_specs(backward, arch),
        decode_tiles.decode_spec(problem(dims, "paged", "bf16", width), arch, split=True),
    ]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dims", [NAMED_PAIRS[1], (59, 111)], ids=str)
def test_kernels_compile_to_ptx_that_older_drivers_read(arch: str, dims: tuple[int, int]):
    for spec in specs(arch, dims):
        ptx = compile_spec(spec.as_ptx()).cubin
        text = ptx.removesuffix(b"\0").decode()
        assert ptx.endswith(b"\0") and "\0" not in text
        assert re.search(r"^\.version 8\.3$", text, re.MULTILINE)
        assert re.search(rf"^\.target {arch}$", text, re.MULTILINE)
        assert f".entry {spec.entry}(" in text
        main = {"num_warps", "num_teams"} & dict(spec.constants).keys()
        assert ("mma.sync" in text) == bool(main)
