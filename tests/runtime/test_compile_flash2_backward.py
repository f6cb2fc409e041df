"""Every flash2 backward kernel compiles for every architecture: tensor cores used, spills bounded,
shared memory within the arch's limit.

Needs NVRTC, no GPU. A sample runs by default; `make compile-check` runs all.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from cases import EQUAL_PAIRS, NAMED_PAIRS
from test_compile_flash2 import ARCHS, compile_spec, problem

from flash_attn_interface._common.ask.backward_problem import BackwardProblem
from flash_attn_interface._common.runtime import arch as arch_table
from flash_attn_interface._common.runtime import sass
from flash_attn_interface._flash2 import bwd_order, bwd_tiles, fwd_tiles, part_tiles

# dK and dV of a tile fill the registers: what spills are values that a step reads a few times.
MAX_SPILL_BYTES = 256
# Beside 99 KB of shared memory, or the widest of both dims, a tile of few warps.
MAX_SPILL_BYTES_OF_WIDE_Q = 1024
WIDE_PAIRS = [(264, 40), (320, 256), (384, 128), (512, 64), (512, 256), (576, 64)]
FEATURES = ["plain", "causal", "window", "softcap", "alibi", "varlen", "dropout", "unequal heads"]
SAMPLE = [
    ("sm_80", (64, 128), "causal"),
    ("sm_86", (256, 256), "dropout"),
    ("sm_89", (96, 192), "dropout"),
    ("sm_90", (192, 128), "plain"),
    ("sm_100", (128, 256), "causal"),
    ("sm_120", (32, 64), "varlen"),
    ("sm_80", (64, 128), "unequal heads"),
    ("sm_90", (64, 64), "unequal heads"),
    ("sm_90", (256, 256), "unequal heads"),
    ("sm_80", (512, 64), "causal"),
    ("sm_90", (512, 256), "dropout"),
    ("sm_86", (576, 64), "varlen"),
]


ORDERED_SAMPLE = [
    ("sm_80", (64, 64), "plain"),
    ("sm_80", (128, 128), "dropout"),
    ("sm_86", (128, 256), "unequal heads"),
    ("sm_90", (64, 128), "varlen"),
    ("sm_90", (256, 256), "plain"),
]


def check(arch: str, dims: tuple[int, int], feature: str, ordered: bool = False) -> None:
    forward = problem(dims, "causal" if feature == "unequal heads" else feature, "bf16")
    if feature == "unequal heads":
        forward = replace(forward, num_heads_q=8, num_heads_k=2, num_heads_v=4)
    strides = (forward.seqlen_q * dims[1], dims[1], dims[1])
    backward = BackwardProblem(
        forward, strides, strides, strides, strides, strides, deterministic=ordered
    )
    for spec in bwd_order.backward_specs(backward, arch, ordered=ordered):
        assert int(spec["smem_bytes"]) <= arch_table.limits(arch).max_smem_per_cta
        compiled = compile_spec(spec)
        few_warps = dims[0] > 256 and int(spec["num_threads"]) == 128
        bound = MAX_SPILL_BYTES_OF_WIDE_Q if few_warps else MAX_SPILL_BYTES
        assert compiled.resources.spill_store_bytes <= bound, spec.describe()
        if spec.entry == "flash2_bwd":
            assert spec["ordered"] == ordered
            assert sass.count(compiled.cubin, spec.entry, "HMMA") > 0


@pytest.mark.parametrize(("arch", "dims", "feature"), SAMPLE)
def test_sample(arch: str, dims: tuple[int, int], feature: str):
    check(arch, dims, feature)


@pytest.mark.parametrize(("arch", "dims", "feature"), ORDERED_SAMPLE)
def test_ordered_sample(arch: str, dims: tuple[int, int], feature: str):
    check(arch, dims, feature, ordered=True)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dims", [*NAMED_PAIRS, *EQUAL_PAIRS])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("ordered", [False, True], ids=["default", "ordered"])
def test_all(arch: str, dims: tuple[int, int], feature: str, ordered: bool):
    check(arch, dims, feature, ordered)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dims", WIDE_PAIRS)
@pytest.mark.parametrize("feature", FEATURES)
def test_wide_q(arch: str, dims: tuple[int, int], feature: str):
    if part_tiles.refuses_head_dims(problem(dims, feature, "bf16"), arch) is None:
        check(arch, dims, feature)


@pytest.mark.parametrize("arch", ["sm_86", "sm_89"])
@pytest.mark.parametrize("feature", ["plain", "dropout"])
def test_every_pair_of_head_dims_fits_99_kb(arch: str, feature: str):
    """Shared memory of the forward and of the three backward kernels; nothing is compiled."""
    dims = range(8, 257, 8)
    available = arch_table.limits(arch).max_smem_per_cta
    assert available == 99 * 1024
    for pair in itertools.product(dims, dims):
        forward = problem(pair, feature, "bf16")
        strides = (forward.seqlen_q * pair[1], pair[1], pair[1])
        backward = BackwardProblem(forward, strides, strides, strides, strides, strides)
        for spec in (
            fwd_tiles.forward_spec(forward, arch),
            *bwd_tiles.backward_specs(backward, arch),
        ):
            assert int(spec["smem_bytes"]) <= available, spec.describe()
