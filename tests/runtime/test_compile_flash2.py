"""Every flash2 forward kernel that is prebuilt compiles for every architecture: tensor cores used,
no spills, limits met.

Needs NVRTC, no GPU. A sample runs by default; `make compile-check` (-m "slow or not slow") runs
all.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from cases import EQUAL_PAIRS, NAMED_PAIRS, ODD_PAIRS

from flash_attn_interface._common.ask.kv_problem import Append
from flash_attn_interface._common.ask.problem import Problem
from flash_attn_interface._common.runtime import arch as arch_table
from flash_attn_interface._common.runtime import compiler, sass, sources
from flash_attn_interface._common.runtime.compiler import Compiled
from flash_attn_interface._common.runtime.spec import KernelSpec
from flash_attn_interface._flash2 import fwd_tiles
from flash_attn_interface._flash2.append import append_spec

ARCHS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]

FEATURES: dict[str, dict[str, object]] = {
    "plain": {},
    "causal": {"causal": True, "window_right": 0},
    "window": {"window_left": 100, "window_right": 7},
    "chunk": {"attention_chunk": 64},
    "softcap": {"softcap": 30.0, "causal": True, "window_right": 0},
    "alibi": {"alibi": True},
    "sink": {"sink": True},
    "varlen": {"varlen_q": True, "varlen_k": True, "causal": True, "window_right": 0},
    "paged": {"page_size": 16, "cache_slots": 999, "has_seqused_k": True},
    "cache": {
        "cache_batch_idx": True, "leftpad_k": True, "cache_slots": 99, "has_seqused_k": True,
    },
    "paged_varlen": {
        "page_size": 16, "cache_slots": 999, "leftpad_k": True, "cache_batch_idx": True,
        "varlen_q": True, "varlen_k": True, "causal": True, "window_right": 0,
    },
    "dropout": {"dropout_p": 0.1},
    "dmask": {"dropout_p": 0.1, "return_softmax": True},
    "everything": {
        "window_left": 100,
        "window_right": 7,
        "attention_chunk": 64,
        "softcap": 30.0,
        "alibi": True,
        "varlen_q": True,
        "varlen_k": True,
        "dropout_p": 0.1,
    },
}  # fmt: skip


def max_spill_bytes(dims: tuple[int, int], feature: str, vector_bytes: int = 16) -> int:
    """Bound on the bytes that a thread stores to local memory; 0 wherever speed was asked for."""
    if feature == "dmask":
        return 2048  # a debugging aid
    if dims == (256, 256):
        return 256  # O alone takes half of the registers
    if feature in ("dropout", "everything"):
        return 128  # Philox lives beside the accumulators
    if 64 < dims[1] <= 128:
        return 128  # 64 keys a tile: faster than 32 keys that do not spill
    return 64 if vector_bytes < 16 else 0


def problem(dims: tuple[int, int], feature: str, dtype: str, vector_bytes: int = 16) -> Problem:
    return Problem(
        dtype=dtype,
        head_dim_qk=dims[0],
        head_dim_v=dims[1],
        num_heads_q=16,
        num_heads_k=16,
        num_heads_v=16,
        batch=4,
        seqlen_q=4096,
        seqlen_k=4096,
        total_q=4 * 4096,
        total_k=4 * 4096,
        softmax_scale=dims[0] ** -0.5,
        vector_bytes=vector_bytes,
        **FEATURES[feature],  # type: ignore[arg-type]
    )


def compile_spec(spec: KernelSpec) -> Compiled:
    try:
        compiler.load_nvrtc()
    except compiler.MissingCompilerError as error:
        pytest.skip(str(error))
    return compiler.compile_cubin(spec, sources.resolve(spec.source, constants=spec.constants))


def check(spec: KernelSpec, spill_limit: int) -> None:
    compiled = compile_spec(spec)
    limits = arch_table.limits(spec.arch)
    used = compiled.resources
    products = "HGMMA" if ("wgmma", True) in spec.constants else "HMMA"
    assert sass.count(compiled.cubin, spec.entry, products) > 0, f"{spec.label()}: no {products}"
    assert used.spill_store_bytes <= spill_limit, f"{spec.label()}: {used}"
    assert used.spill_load_bytes <= 4 * spill_limit, f"{spec.label()}: {used}"
    smem_bytes, threads, ctas = (
        int(spec[name]) for name in ("smem_bytes", "num_threads", "min_ctas_per_sm")
    )
    assert smem_bytes <= limits.max_smem_per_cta
    assert used.registers * threads * ctas <= limits.registers_per_sm
    assert limits.max_ctas_per_sm(smem_bytes, threads) >= ctas


def params(archs: list[str], pairs: list[tuple[int, int]], features: list[str], dtypes: list[str]):
    return [
        pytest.param(
            arch, dims, feature, dtype, id=f"{arch}-qk{dims[0]}-v{dims[1]}-{feature}-{dtype}"
        )
        for arch in archs
        for dims in pairs
        for feature in features
        for dtype in dtypes
    ]


def check_named(arch: str, dims: tuple[int, int], feature: str, dtype: str) -> None:
    spec = fwd_tiles.forward_spec(problem(dims, feature, dtype), arch)
    check(spec, max_spill_bytes(dims, feature))


SAMPLE = [
    *params(["sm_80"], [(64, 128), (128, 256)], ["plain", "causal"], ["bf16"]),
    *params(["sm_80"], [(192, 128)], ["everything"], ["fp16"]),
    *params(["sm_86"], [(128, 256)], ["causal"], ["bf16"]),
    *params(["sm_90"], [(96, 192)], ["varlen"], ["bf16"]),
    *params(["sm_80"], [(64, 128)], ["paged", "cache"], ["bf16"]),
    *params(["sm_80"], [(128, 256)], ["paged"], ["bf16"]),
    *params(["sm_100"], [(128, 128)], ["plain"], ["fp16"]),
    *params(["sm_90"], [(192, 128)], ["paged_varlen"], ["bf16"]),
    *params(["sm_89", "sm_100", "sm_120"], [(128, 128)], ["causal"], ["fp16"]),
    *params(["sm_80", "sm_86", "sm_90"], [(512, 256)], ["causal"], ["bf16"]),
    *params(["sm_86"], [(576, 64)], ["paged", "dropout"], ["bf16"]),
]
WIDE_PAIRS = [(320, 192), (512, 64), (512, 128), (512, 256), (576, 256), (264, 40)]


@pytest.mark.parametrize(("arch", "dims", "feature", "dtype"), SAMPLE)
def test_sample(arch: str, dims: tuple[int, int], feature: str, dtype: str):
    check_named(arch, dims, feature, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dims", "feature", "dtype"),
    params(ARCHS, NAMED_PAIRS + EQUAL_PAIRS, ["plain", "causal"], ["fp16", "bf16"]),
)
def test_prebuilt(arch: str, dims: tuple[int, int], feature: str, dtype: str):
    """What setup.py builds from headdim.json, and the equal dims."""
    check_named(arch, dims, feature, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dims", "feature", "dtype"),
    params(["sm_80", "sm_86", "sm_90"], NAMED_PAIRS + [(256, 256)], list(FEATURES), ["bf16"])
    + params(["sm_80", "sm_86", "sm_90"], WIDE_PAIRS, list(FEATURES), ["bf16"]),
)
def test_features(arch: str, dims: tuple[int, int], feature: str, dtype: str):
    check_named(arch, dims, feature, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_120"])
@pytest.mark.parametrize("dims", ODD_PAIRS, ids=lambda dims: f"qk{dims[0]}-v{dims[1]}")
@pytest.mark.parametrize("vector_bytes", [2, 8])
def test_odd_dims_and_narrow_vectors(arch: str, dims: tuple[int, int], vector_bytes: int):
    spec = fwd_tiles.forward_spec(problem(dims, "causal", "bf16", vector_bytes), arch)
    check(spec, max_spill_bytes(dims, "causal", vector_bytes))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("vector_bytes", [16, 2])
def test_append(arch: str, interleaved: bool, vector_bytes: int):
    forward = problem((128, 256), "paged", "bf16")
    append = Append(seqlen_new=1, rotary_dim=64, rotary_interleaved=interleaved)
    appended = replace(forward, append=append)
    spec = append_spec(appended, arch, vector_bytes)
    used = compile_spec(spec).resources
    assert used.spill_store_bytes == used.stack_bytes == 0
    assert used.registers <= 64  # memory latency is hidden by many warps


def test_same_problem_same_spec():
    first, second = (
        fwd_tiles.forward_spec(problem((64, 128), "causal", "bf16"), "sm_80") for _ in "ab"
    )
    assert first == second
    assert hash(first) == hash(second)


@pytest.mark.parametrize("arch", arch_table.known_archs())
def test_pages_change_no_more_of_a_tile_than_its_layout(arch: str):
    """They promise the bits of packed keys, which a tile's sizes and order decide."""
    for head_dim_qk in range(8, 257, 8):
        for head_dim_v in range(8, 257, 8):
            packed = problem((head_dim_qk, head_dim_v), "plain", "bf16")
            paged = fwd_tiles.forward_tile(replace(packed, page_size=16), arch)
            expected = fwd_tiles.forward_tile(packed, arch)
            assert replace(paged, lines=False) == replace(expected, lines=False)


@pytest.mark.parametrize("arch", arch_table.known_archs())
def test_every_pair_of_head_dims_has_a_tile_on_every_arch(arch: str):
    """Planning only; validate() checks shared memory and threads against the arch."""
    for feature in FEATURES:
        for head_dim_qk in range(16, 257, 16):
            for head_dim_v in range(16, 257, 16):
                fwd_tiles.forward_spec(problem((head_dim_qk, head_dim_v), feature, "bf16"), arch)
