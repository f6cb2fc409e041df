"""A kernel small enough to compile in milliseconds, for the tests of the runtime.

``tiny_tree`` (a fixture; import it into a test file) makes the include root "tiny", where scale.cu
includes its prelude and op.cuh, and unused.cuh belongs to no kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flash_attn_interface._common.params import ParamLayout
from flash_attn_interface._common.runtime import sources
from flash_attn_interface._common.runtime.spec import KernelSpec

PARAMS = """
struct ScaleParams {
  float* x;   // (count,)
  int* seen;  // nullable; gets the number of CTAs
  int count;
  float factor;
};
"""
LAYOUT = ParamLayout.parse(
    "ScaleParams",
    PARAMS.replace("int ", "i32 ").replace("int*", "i32*").replace("float f", "f32 f"),
)

SCALE = (
    """
#include "prelude.cuh"
#include "tiny/op.cuh"
"""
    + PARAMS
    + """
extern "C" __global__ void __launch_bounds__(Cfg::kNumThreads, Cfg::kMinCtasPerSm)
tiny_scale(const __grid_constant__ ScaleParams p) {
  extern __shared__ float staged[];
  const int last = Cfg::kSmemBytes / 4 - 1;  // touches the far end of dynamic shared memory
  const int i = blockIdx.x * Cfg::kNumThreads + threadIdx.x;
  if (threadIdx.x == 0) staged[last] = p.factor;
  __syncthreads();
  if (i < p.count) p.x[i] = op(p.x[i], staged[last]);
  if (p.seen != nullptr && threadIdx.x == 0) atomicAdd(p.seen, 1);
}
"""
)
OP = "#pragma once\n__device__ inline float op(float x, float factor) { return x * factor; }\n"


def write_tree(folder: Path) -> None:
    (folder / "scale.cu").write_text(SCALE)
    (folder / "op.cuh").write_text(OP)
    (folder / "unused.cuh").write_text("#pragma once\n")


@pytest.fixture
def tiny_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "tiny_sources"
    folder.mkdir()
    write_tree(folder)
    monkeypatch.setitem(sources._registered, "tiny", folder)
    sources.read.cache_clear()
    yield folder
    sources.read.cache_clear()


def tiny_spec(arch: str = "sm_80", **constants: bool | int) -> KernelSpec:
    defaults: dict[str, bool | int] = {"num_threads": 64, "min_ctas_per_sm": 1, "smem_bytes": 1024}
    return KernelSpec.make(
        "tiny/scale.cu", "tiny_scale", "ScaleParams", arch, **{**defaults, **constants}
    )
