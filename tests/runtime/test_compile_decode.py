"""Every decode kernel compiles for every architecture: tensor cores used, no spills, limits met; so
does the merge of splits.

Needs NVRTC, no GPU. A sample runs by default; `make compile-check` (-m "slow or not slow") runs
all.
"""

from __future__ import annotations

import pytest
from cases import EQUAL_PAIRS, NAMED_PAIRS, ODD_PAIRS
from test_compile_flash2 import ARCHS, check, compile_spec

from flash_attn_interface._common.ask.problem import Problem
from flash_attn_interface._common.runtime import arch as arch_table
from flash_attn_interface._flash2 import decode_tiles

FEATURES: dict[str, dict[str, object]] = {
    "plain": {},
    "paged": {"page_size": 16},
    "causal": {"causal": True, "window_right": 0, "seqlen_q": 4},
    "prefill": {"causal": True, "window_right": 0, "seqlen_q": 100},
    "varlen": {"varlen_q": True, "seqlen_q": 4, "page_size": 1},
    "qv": {"qv": True},
    "qv-paged": {"qv": True, "page_size": 64},
    "qv-128-heads": {"qv": True, "num_heads_q": 128},
    "everything": {
        "window_left": 100,
        "window_right": 7,
        "attention_chunk": 64,
        "softcap": 30.0,
        "alibi": True,
        "varlen_q": True,
        "page_size": 16,
        "cache_batch_idx": True,
        "leftpad_k": True,
        "seqlen_q": 4,
    },
}


WIDE_PAIRS = [(512, 512), (576, 512), (256, 512), (512, 64), (320, 384), (264, 40), (576, 128)]


def max_spill_bytes(feature: str, head_dim_v: int) -> int:
    """Bound on the bytes that a thread stores to local memory; 0 wherever speed was asked for."""
    if head_dim_v > 256:  # before and behind the loop, in which O takes half of the registers
        return 256
    return 64 if feature == "everything" else 0


def problem(dims: tuple[int, int], feature: str, dtype: str, heads: int, **changes) -> Problem:
    values = {
        "dtype": dtype,
        "head_dim_qk": dims[0],
        "head_dim_v": dims[1],
        "num_heads_q": 32,
        "num_heads_k": heads,
        "num_heads_v": heads,
        "batch": 16,
        "seqlen_q": 1,
        "seqlen_k": 8192,
        "total_q": 16,
        "total_k": 16 * 8192,
        "softmax_scale": dims[0] ** -0.5,
        "has_seqused_k": True,
        "cache_slots": 16,
        **FEATURES[feature],
        **changes,
    }
    return Problem(**values)


def params(archs: list[str], pairs: list[tuple[int, int]], features: list[str], heads: list[int]):
    return [
        pytest.param(arch, dims, feature, n, id=f"{arch}-qk{dims[0]}-v{dims[1]}-{feature}-hk{n}")
        for arch in archs
        for dims in pairs
        for feature in features
        for n in heads
    ]


def check_decode(arch: str, dims: tuple[int, int], feature: str, heads: int, **changes) -> None:
    for dtype, split in (("bf16", True), ("fp16", False)):
        asked = problem(dims, feature, dtype, heads, **changes)
        spec = decode_tiles.decode_spec(asked, arch, split)
        check(spec, max_spill_bytes(feature, dims[1]) + (64 if changes else 0))


SAMPLE = [
    *params(["sm_90"], [(128, 128), (64, 128), (192, 128)], ["plain"], [8]),
    *params(["sm_80"], [(128, 128)], ["paged"], [8, 1]),
    *params(["sm_86"], [(256, 256)], ["paged"], [8]),
    *params(["sm_90"], [(128, 128)], ["everything"], [1]),
    *params(["sm_80"], [(128, 128)], ["prefill"], [8]),
    *params(["sm_120"], [(128, 256)], ["causal"], [8]),
    *params(["sm_80"], [(64, 512)], ["plain", "qv"], [1]),
    *params(["sm_80"], [(96, 192)], ["qv-paged"], [8]),
    *params(["sm_86"], [(64, 512)], ["qv-paged"], [1]),
    *params(["sm_90"], [(64, 512)], ["qv", "qv-128-heads"], [1]),
    *params(["sm_80", "sm_86", "sm_90"], [(512, 512)], ["plain"], [8]),
    *params(["sm_86"], [(576, 512), (576, 128), (512, 64)], ["paged"], [1]),
]


@pytest.mark.parametrize(("arch", "dims", "feature", "heads"), SAMPLE)
def test_sample(arch: str, dims: tuple[int, int], feature: str, heads: int):
    check_decode(arch, dims, feature, heads)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dims", "feature", "heads"),
    params(ARCHS, NAMED_PAIRS + EQUAL_PAIRS, ["plain", "paged"], [8, 1]),
)
def test_prebuilt(arch: str, dims: tuple[int, int], feature: str, heads: int):
    check_decode(arch, dims, feature, heads)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dims", "feature", "heads"),
    params(["sm_80", "sm_86", "sm_90"], [*NAMED_PAIRS, (128, 128)], list(FEATURES), [8]),
)
def test_features(arch: str, dims: tuple[int, int], feature: str, heads: int):
    check_decode(arch, dims, feature, heads)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dims", "feature", "heads"),
    params(ARCHS, [(64, 512), (64, 256), (192, 128)], ["qv", "qv-paged", "qv-128-heads"], [1, 2])
    + params(ARCHS, [(64, 512), (32, 300)], ["plain", "paged", "prefill"], [1, 8])
    + params(ARCHS, WIDE_PAIRS, ["plain", "paged", "prefill", "everything"], [1, 8]),
)
def test_qv_and_wide_values(arch: str, dims: tuple[int, int], feature: str, heads: int):
    check_decode(arch, dims, feature, heads)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_120"])
@pytest.mark.parametrize("dims", ODD_PAIRS, ids=lambda dims: f"qk{dims[0]}-v{dims[1]}")
@pytest.mark.parametrize("vector_bytes", [2, 8])
def test_odd_dims_and_narrow_vectors(arch: str, dims: tuple[int, int], vector_bytes: int):
    check_decode(arch, dims, "paged", 8, vector_bytes=vector_bytes)


@pytest.mark.parametrize("arch", arch_table.known_archs())
def test_every_pair_of_head_dims_has_a_tile_on_every_arch(arch: str):
    """Planning only; validate() checks shared memory and threads against the arch."""
    for feature, heads in (("plain", 8), ("plain", 1), ("prefill", 8), ("everything", 8)):
        for head_dim_qk in (*range(16, 257, 16), *range(264, 577, 24)):
            for head_dim_v in (*range(16, 257, 16), *range(264, 513, 31)):
                asked = problem((head_dim_qk, head_dim_v), feature, "bf16", heads)
                decode_tiles.decode_spec(asked, arch, True)


@pytest.mark.parametrize("out_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("num_splits", [2, 33])
@pytest.mark.parametrize(("head_dim_v", "wide"), [(128, True), (512, True), (59, False)])
def test_combine(out_dtype: str, num_splits: int, head_dim_v: int, wide: bool):
    spec = decode_tiles.combine_spec("sm_90", out_dtype, head_dim_v, num_splits, wide, wide)
    assert compile_spec(spec).resources.spill_store_bytes == 0
