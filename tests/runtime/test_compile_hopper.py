"""Every Hopper forward kernel that is prebuilt compiles for sm_90a: WGMMA used, no spills, products
not serialised. Needs NVRTC, no GPU. A sample runs by default, all with -m "slow or not slow".
"""

from __future__ import annotations

import re
from dataclasses import replace

import hopper_tree
import pytest
from cases import EQUAL_PAIRS, NAMED_PAIRS
from test_compile_flash2 import FEATURES, problem

from flash_attn_interface._common.runtime import compiler, sass, sources
from flash_attn_interface._common.runtime.spec import KernelSpec

TREE = hopper_tree.load()
ARCH = "sm_90a"
MAX_SECONDS = 15.0  # on a machine shared by others; alone it is below 5
# ptxas: "wgmma.mma_async instructions are serialized due to ...". C7519 is harmless: one
# warpgroup.arrive is moved.
SERIALISED = re.compile(r"C75(10|12|14|15|16|17|18|20)|instructions are serialized")
FEATURE_NAMES = [name for name in FEATURES if name != "dmask"]
MAY_SPILL = {"everything"}
# Of fwd_wide.cu.
WIDE_V_PAIRS = [(512, 512), (576, 512), (256, 512), (320, 384), (72, 264), (576, 384)]
WIDE_PAIRS = [(256, 256), (64, 512), (320, 64), (384, 256), (512, 64), (512, 128), (576, 256)]
UNTUNED_PAIRS = [(16, 16), (80, 80), (112, 48), (160, 224), (256, 64), (72, 200)]


def check(spec: KernelSpec, max_spill_bytes: int = 0) -> None:
    try:
        compiler.load_nvrtc()
    except compiler.MissingCompilerError as error:
        pytest.skip(str(error))
    texts = sources.resolve(spec.source, constants=spec.constants)
    compiled = compiler.compile_cubin(spec, texts)
    used = compiled.resources
    assert sass.count(compiled.cubin, spec.entry, "HGMMA") > 0, f"{spec.label()}: no WGMMA"
    assert used.spill_store_bytes <= max_spill_bytes, f"{spec.label()}: {used}"
    assert not SERIALISED.search(compiled.log), compiled.log
    # setmaxnreg moves registers inside what the launch bound gives.
    registers = role_registers(spec)
    assert sum(registers) <= used.registers * len(registers), "an increase would wait forever"
    assert compiled.seconds < MAX_SECONDS


def role_registers(spec: KernelSpec) -> list[int]:
    """Of a thread of each warpgroup."""
    consumers = int(spec["num_mma_warpgroups"])
    if spec.entry == "hopper_fwd_wide":
        names = ["producer", "score", *["output"] * consumers]
    else:
        names = ["producer", *["consumer"] * consumers]
    return [int(spec[f"{name}_registers"]) for name in names]


def check_named(dims: tuple[int, int], feature: str, dtype: str) -> None:
    check_tile(TREE.fwd_tiles.forward_spec(problem(dims, feature, dtype), ARCH), feature)


def check_tile(spec: KernelSpec, feature: str) -> None:
    check(spec, 64 if feature in MAY_SPILL else 0)


def params(pairs: list[tuple[int, int]], features: list[str], dtypes: list[str]):
    return [
        pytest.param(dims, feature, dtype, id=f"qk{dims[0]}-v{dims[1]}-{feature}-{dtype}")
        for dims in pairs
        for feature in features
        for dtype in dtypes
    ]


SAMPLE = [
    *params([(64, 64), (64, 128), (128, 256), (256, 256)], ["causal"], ["bf16"]),
    *params([(128, 128)], ["plain", "varlen"], ["fp16"]),
    *params([(64, 512), (512, 64), (576, 256), (320, 384)], ["causal"], ["bf16"]),
    *params([(512, 512)], ["causal", "dropout", "varlen"], ["bf16"]),
    *params([(576, 512)], ["softcap"], ["fp16"]),
    *params([(192, 128)], ["dropout"], ["bf16"]),
    *params([(64, 64)], ["softcap", "window"], ["bf16"]),
]


@pytest.mark.parametrize(("dims", "feature", "dtype"), SAMPLE)
def test_sample(dims: tuple[int, int], feature: str, dtype: str):
    check_named(dims, feature, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dims", "feature", "dtype"),
    params(
        NAMED_PAIRS + EQUAL_PAIRS + UNTUNED_PAIRS + [(64, 512)],
        ["plain", "causal"],
        ["fp16", "bf16"],
    ),
)
def test_prebuilt(dims: tuple[int, int], feature: str, dtype: str):
    check_named(dims, feature, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dims", "feature", "dtype"),
    params(NAMED_PAIRS + WIDE_PAIRS + WIDE_V_PAIRS, FEATURE_NAMES, ["bf16"]),
)
def test_features(dims: tuple[int, int], feature: str, dtype: str):
    check_named(dims, feature, dtype)


@pytest.mark.parametrize(
    ("dims", "feature", "dtype"),
    [
        pytest.param((64, 64), "plain", "bf16"),
        *[
            pytest.param(*case.values, marks=pytest.mark.slow)
            for case in params(NAMED_PAIRS + EQUAL_PAIRS, ["plain", "causal", "varlen"], ["bf16"])
        ],
    ],
)
def test_long_sequences(dims: tuple[int, int], feature: str, dtype: str):
    """Tiles that the table keeps for many keys."""
    asked = replace(problem(dims, feature, dtype), seqlen_q=16384, seqlen_k=16384)
    check_tile(TREE.fwd_tiles.forward_spec(asked, ARCH), feature)


@pytest.mark.parametrize(
    ("dims", "feature", "group"),
    [
        pytest.param((128, 128), "varlen", 4),
        pytest.param((128, 128), "plain", 5, marks=pytest.mark.slow),  # 60 of 64 rows in use
        *[
            pytest.param(dims, feature, 8, marks=pytest.mark.slow)
            for dims in [(64, 64), (64, 128), (256, 256), (64, 512), (512, 512)]
            for feature in ("causal", "window", "softcap")
        ],
    ],
)
def test_packed_gqa(dims: tuple[int, int], feature: str, group: int):
    heads = {"num_heads_q": 2 * group, "num_heads_k": 2, "num_heads_v": 2, "pack_gqa": True}
    strides = {"k_strides": (0, 2, 1), "v_strides": (0, 2, 1)}
    asked = replace(problem(dims, feature, "bf16"), seqlen_q=1, total_q=1, **heads, **strides)
    spec = TREE.fwd_tiles.forward_spec(asked, ARCH)
    assert spec["gqa_group"] == group
    check(spec)


def test_every_pair_of_head_dims_has_a_tile():
    """Planning only; validate() checks shared memory and threads."""
    for feature in FEATURE_NAMES:
        for head_dim_qk in range(8, 577, 8):
            for head_dim_v in range(8, 513, 24):
                asked = problem((head_dim_qk, head_dim_v), feature, "bf16")
                spec = TREE.fwd_tiles.forward_spec(asked, ARCH)
                assert spec["block_n"] % (32 if feature in ("dropout", "everything") else 16) == 0
