"""The Hopper backward's kernels compile for sm_90a: WGMMA used, no spills, products not serialised,
registers that add up. Needs NVRTC, no GPU. A sample runs by default, all with -m "slow or not
slow".
"""

from __future__ import annotations

from dataclasses import replace

import hopper_tree
import pytest
from cases import EQUAL_PAIRS, NAMED_PAIRS
from test_compile_flash2 import problem
from test_compile_hopper import ARCH, FEATURE_NAMES, MAX_SECONDS, SERIALISED, params

from flash_attn_interface._common.ask.backward_problem import BackwardProblem
from flash_attn_interface._common.runtime import compiler, sass, sources
from flash_attn_interface._common.runtime.spec import KernelSpec

hopper_tree.load()
from flash_attn_3 import bwd_tiles  # noqa: E402

# At (256, 256), where P^T comes twice and lies beside 256 columns of dV.
MAY_SPILL = {"softcap": 24, "dropout": 4, "everything": 144}
UNTUNED_PAIRS = [(16, 16), (80, 80), (112, 48), (160, 224), (256, 64), (72, 200), (192, 192)]


def main_spec(
    dims: tuple[int, int], feature: str, dtype: str, seqlen: int = 0, deterministic: bool = False
) -> KernelSpec:
    forward = problem(dims, feature, dtype)
    if seqlen:
        forward = replace(forward, seqlen_q=seqlen, seqlen_k=seqlen)
    strides = (1, 1, 1)
    return bwd_tiles.backward_specs(
        BackwardProblem(forward, *[strides] * 5, deterministic=deterministic), ARCH
    )[1]


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
    scores, gradient = int(spec["score_registers"]), int(spec["gradient_registers"])
    warpgroups = int(spec["num_threads"]) // 128
    roles = scores + gradient if spec["split_roles"] else (warpgroups - 2) * scores
    taken = int(spec["producer_registers"]) + int(spec["dq_registers"]) + roles
    assert taken <= used.registers * warpgroups, "an increase would wait forever"
    assert compiled.seconds < MAX_SECONDS


def check_named(dims: tuple[int, int], feature: str, dtype: str, seqlen: int = 0) -> None:
    bound = MAY_SPILL.get(feature, 0) if dims == (256, 256) else 0
    check(main_spec(dims, feature, dtype, seqlen), bound)


@pytest.mark.parametrize(
    ("dims", "feature", "dtype"),
    [
        *params([(64, 64), (64, 128), (192, 128), (256, 256)], ["causal"], ["bf16"]),
        *params([(128, 128)], ["plain", "varlen"], ["fp16"]),
        *params([(96, 192), (128, 256)], ["plain"], ["bf16"]),
        *params([(64, 64)], ["softcap", "dropout", "window"], ["bf16"]),
    ],
)
def test_sample(dims: tuple[int, int], feature: str, dtype: str):
    check_named(dims, feature, dtype)


@pytest.mark.parametrize("dims", [(128, 128)], ids=["qk128-v128"])
def test_long_sequences(dims: tuple[int, int]):
    """Tiles that the table keeps for many queries."""
    check_named(dims, "plain", "bf16", seqlen=16384)


@pytest.mark.parametrize(
    "dims",
    [(64, 64), (128, 128), (192, 128)]
    + [pytest.param(dims, marks=pytest.mark.slow) for dims in (*NAMED_PAIRS[:4], (256, 256))],
    ids=lambda dims: f"qk{dims[0]}-v{dims[1]}",
)
@pytest.mark.parametrize("feature", ["plain", "causal"])
def test_deterministic(dims: tuple[int, int], feature: str):
    check(main_spec(dims, feature, "bf16", deterministic=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dims", "feature", "dtype"),
    params(NAMED_PAIRS + EQUAL_PAIRS + UNTUNED_PAIRS, ["plain", "causal"], ["fp16", "bf16"]),
)
def test_prebuilt(dims: tuple[int, int], feature: str, dtype: str):
    check_named(dims, feature, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dims", "feature", "dtype"),
    params([*NAMED_PAIRS, (128, 128), (256, 256)], FEATURE_NAMES, ["bf16"]),
)
def test_features(dims: tuple[int, int], feature: str, dtype: str):
    check_named(dims, feature, dtype)
