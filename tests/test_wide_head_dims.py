"""Head dims beyond 256, up to 576 of q and k and 512 of v: the reference, the Ampere forward and
decoding on the archs that differ in shared memory, and what refuses the rest. The Hopper forward's
own: test_hopper_forward.py and test_hopper_forward_wide.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import cache_cases
import oracle
import pytest
import torch
from cache_cases import CacheCase, call, make_cache
from cases import Case
from conftest import Runner
from test_compile_flash2 import FEATURES, problem
from test_forward import check_case

import flash_attn_interface
from flash_attn_interface import backends, dispatch, explain
from flash_attn_interface._common import arch as arch_table
from flash_attn_interface._common.problem import Target
from flash_attn_interface._flash2 import BACKEND, tiles

PAIRS = [(512, 512), (576, 512), (256, 512), (512, 64), (320, 384), (264, 40)]
SIM_ARCHS = ("sm_80", "sm_86", "sm_90")


@pytest.fixture(autouse=True)
def without_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On an H100 too, the Ampere tree is what is tested here."""
    monkeypatch.setattr(backends, "hopper", lambda: None)
    dispatch.forget_plans()
    yield
    dispatch.forget_plans()


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> Runner:
    """A simulated GPU of this arch, or the GPU."""
    if request.param == "gpu":
        return Runner("gpu", torch.device("cuda"))
    return Runner("sim", torch.device("cpu"), request.param)


def everywhere(some: Iterable[Any], archs: Iterable[str] = SIM_ARCHS) -> pytest.MarkDecorator:
    """Parametrises (machine, case): each case on the simulated archs and on the GPU."""
    params = []
    for case in some:
        for arch in archs:
            params.append(pytest.param(arch, case, id=f"{arch}-{case.id}", marks=pytest.mark.sim))
        params.append(pytest.param("gpu", case, id=f"gpu-{case.id}", marks=pytest.mark.gpu))
    return pytest.mark.parametrize(("machine", "case"), params, indirect=["machine"])


# ---- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", PAIRS, ids=str)
def test_the_reference_agrees_with_torch(dims: tuple[int, int]):
    """Forward and backward of CPU tensors in bf16, against torch in float64."""
    shapes = ((2, 7, 2, dims[0]), (2, 9, 2, dims[0]), (2, 9, 2, dims[1]))
    ours = [torch.randn(shape).to(torch.bfloat16).requires_grad_() for shape in shapes]
    theirs = [x.detach().double().transpose(1, 2).requires_grad_() for x in ours]
    out = flash_attn_interface.flash_attn_func(*ours)
    expected = torch.nn.functional.scaled_dot_product_attention(*theirs)
    dout = torch.randn_like(out)
    out.backward(dout)
    expected.backward(dout.double().transpose(1, 2))
    results = [(out, expected)] + [(x.grad, y.grad) for x, y in zip(ours, theirs, strict=True)]
    for got, want in results:
        assert got is not None and want is not None
        error = (got.double() - want.transpose(1, 2)).abs().max()
        assert error < 2**-6 * want.abs().max()  # two roundings to bf16


@pytest.mark.parametrize("name", ["k", "v"])
def test_beyond_the_limits(name: str):
    dims = {"k": (577, 8), "v": (8, 513)}[name]
    q, k, v = (torch.zeros(1, 3, 1, dim, dtype=torch.bfloat16) for dim in (dims[0], *dims))
    with pytest.raises(NotImplementedError, match=f"{name}: head_dim is {max(dims)}, at most"):
        flash_attn_interface.flash_attn_func(q, k, v)


# ---- the Ampere forward --------------------------------------------------------------------------

_SMALL = Case(seqlen_q=70, seqlen_k=83, batch=1)
FORWARD = [
    _SMALL.with_dims(512, 64).but(causal=True),
    _SMALL.with_dims(264, 40).with_heads(4, 2, 1).but(window_size=(30, 9)),
    _SMALL.with_dims(576, 256).but(softcap=3.0, dtype="fp16"),
    _SMALL.with_dims(320, 192).but(alibi="heads"),
    _SMALL.with_dims(575, 33),
    Case(lengths_q=(37, 0, 65), lengths_k=(41, 12, 90), causal=True).with_dims(512, 128),
]


@everywhere(FORWARD, ("sm_80", "sm_86"))
def test_forward(machine: Runner, case: Case):
    check_case(machine, case)


@pytest.mark.parametrize("arch", arch_table.known_archs())
def test_every_pair_has_a_forward_tile(arch: str):
    """Planning only; validate() checks shared memory and threads against the arch."""
    for feature in FEATURES:
        for head_dim_qk in range(264, 577, 24):
            for head_dim_v in (8, 64, 128, 200, 256):
                asked = problem((head_dim_qk, head_dim_v), feature, "bf16")
                tiles.forward_spec(asked, arch)


# ---- decoding ------------------------------------------------------------------------------------

_CACHE = CacheCase(num_splits=1, seqlens=(0, 70, 33), capacity=100)
_SPLIT = _CACHE.but(num_splits=3, page_size=16)
DECODE = [
    _CACHE.with_dims(512, 512),
    _SPLIT.with_dims(512, 512).but(seqlen_new=1, rotary_dim=512),
    _SPLIT.with_dims(576, 512).with_heads(16, 1, 1).but(seqlen_q=2, seqlen_new=2, causal=True),
    _SPLIT.with_dims(256, 512).but(dtype="fp16", window_size=(20, 0)),
    _SPLIT.with_dims(512, 64).but(seqlen_new=3, rotary_dim=64, interleaved=False),
    _SPLIT.with_dims(320, 384).but(lengths_q=(1, 0, 4), softcap=2.0),
    _SPLIT.with_dims(264, 40).with_heads(8, 2, 4),
    _SPLIT.with_dims(575, 511).but(alibi=True),
    _SPLIT.with_dims(576, 184).with_heads(40, 1, 1).but(rotary_dim=576, seqlen_new=1),
]


@everywhere(DECODE)
def test_decode(machine: Runner, case: CacheCase):
    tensors = make_cache(case, machine.device)
    expected, k_cache, v_cache = cache_cases.expect(case, tensors)
    out, lse = machine.call(call, case, tensors)
    oracle.check(expected, out, lse)
    if case.seqlen_new:
        for name, wanted in (("k_cache", k_cache), ("v_cache", v_cache)):
            assert torch.allclose(tensors[name].float(), wanted.float(), equal_nan=True, atol=2e-2)


@everywhere([_CACHE.with_dims(512, 256).but(seqlen_q=80, seqlens=(90, 80), causal=True)], ["sm_86"])
def test_prefill_into_a_cache(machine: Runner, case: CacheCase):
    """One split is the forward, where it has such a V."""
    test_decode(machine, case)


def test_qv_goes_with_narrower_queries():
    case = CacheCase(qv=True).with_dims(264, 64).with_heads(8, 1, 1)
    with pytest.raises(NotImplementedError, match="beside qv, head_dim_qk is limited to 256"):
        Runner("sim", torch.device("cpu")).call(call, case, make_cache(case, "cpu"))


# ---- refusals ------------------------------------------------------------------------------------


def test_a_wide_v_is_refused_by_the_ampere_forward():
    asked = problem((512, 512), "plain", "bf16")
    reason = BACKEND.refuses_forward(asked, Target("sm_80", 0))
    assert reason == "head dims are limited to 576, that of v to 256"
    q, k, v = (torch.zeros(1, 4, 1, 512, dtype=torch.bfloat16) for _ in range(3))
    with pytest.raises(NotImplementedError, match=r"that of v to 256\. Way out: .*=reference"):
        Runner("sim", torch.device("cpu")).call(flash_attn_interface.flash_attn_func, q, k, v)


@pytest.mark.sim
def test_a_wide_q_has_no_backward_in_the_ampere_tree():
    q, k = (torch.randn(1, 9, 1, 264, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    v = torch.randn(1, 9, 1, 40, dtype=torch.bfloat16)
    out = Runner("sim", torch.device("cpu")).call(flash_attn_interface.flash_attn_func, q, k, v)
    with pytest.raises(NotImplementedError, match="head dims of its backward are limited to 256"):
        out.sum().backward()
    explanation = explain((1, 9, 1, 264), (1, 9, 1, 264), (1, 9, 1, 40), arch="sm_80")
    assert (explanation.backend, explanation.backward.backend) == ("flash2", None)
