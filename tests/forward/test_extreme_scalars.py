"""softmax_scale, softcap and attention_chunk at the ends of what a number can be: right results, or
a ValueError that names the argument. Gradients of fp16 wherever they fit fp16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import hopper_tree
import pytest
import test_backward
import test_decode
import torch
from cache_cases import CacheCase
from cases import Case, on_both
from conftest import Runner
from test_forward import check_case as check_forward_case
from torch import Tensor

import flash_attn
import flash_attn_interface
from flash_attn_interface._common.ask.check_values import softcap
from flash_attn_interface._flash2 import bwd_tiles
from flash_attn_interface.call import backends, dispatch
from flash_attn_interface.reference.forward import attention_reference

HUGE_INT = 10**400  # beyond float


@pytest.fixture(
    params=[
        pytest.param("reference", id="reference"),
        pytest.param("sm_80", marks=pytest.mark.sim, id="sim-sm_80"),
        pytest.param("sm_90a", marks=pytest.mark.sim, id="sim-sm_90a"),
        pytest.param("gpu", marks=pytest.mark.gpu, id="gpu"),
    ]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "sm_90a":
        tree: Any = hopper_tree.load().BACKEND
        monkeypatch.setattr(backends, "hopper", lambda: tree)
    dispatch.forget_plans()
    simulated = request.param.startswith("sm_")
    with flash_attn_interface.simulate(request.param) if simulated else nullcontext():
        yield "cuda" if request.param == "gpu" else "cpu"
    dispatch.forget_plans()


def tensors(device: str, rows_q: int = 70, rows_k: int = 90) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, rows, 2, 32) for rows in (rows_q, rows_k, rows_k))
    return q.bfloat16().to(device), k.bfloat16().to(device), v.bfloat16().to(device)


def decode(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    lengths = torch.tensor([k.shape[1], 31], dtype=torch.int32, device=q.device)
    function = flash_attn_interface.flash_attn_with_kvcache
    return function(q[:, :3], k, v, cache_seqlens=lengths, causal=True, **options)


def forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return flash_attn_interface.flash_attn_func(q, k, v, causal=True, **options)


def gradients(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """As one tensor."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = flash_attn.flash_attn_func(*leaves, causal=True, deterministic=True, **options)
    return torch.cat([x.flatten() for x in torch.autograd.grad(out, leaves, torch.ones_like(out))])


FUNCTIONS = [forward, gradients, decode]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("softmax_scale", x) for x in (1e-46, -1e-46, 1e-38, 1e300, -1e39, HUGE_INT)),
        *(("softcap", x) for x in (1e-46, 1e-300, 1e-20, HUGE_INT)),
    ],
)
def test_what_float32_cannot_hold_is_refused(device: str, function: Any, name: str, value: Any):
    with pytest.raises(ValueError, match=f"{name} is "):
        function(*tensors(device), **{name: value})


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("exponent", [-110, -60, 60, 110])
def test_extreme_scales_of_ordinary_scores(device: str, function: Any, exponent: int):
    """Powers of two, so that nothing is rounded otherwise."""
    q, k, v = tensors(device)
    scale = 0.25
    want = function(q, k, v, softmax_scale=scale)
    got = function(q * 2.0**-exponent, k, v, softmax_scale=scale * 2.0**exponent)
    assert not got.isnan().any() and not got.isinf().any()
    if function is gradients:  # dq, in the units of the other
        got[: q.numel()] *= 2.0**-exponent
    torch.testing.assert_close(got, want, rtol=1e-2, atol=0.0 if function is forward else 1e-2)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("cap", [1e19, 1e38, 1e300])
def test_a_cap_beyond_all_scores_is_none(device: str, function: Any, cap: float):
    qkv = tensors(device)
    assert torch.equal(function(*qkv, softcap=cap), function(*qkv))


def test_every_cap_is_off_precise_or_refused():
    """Of any scale, what the kernels are given fits float32's normal numbers."""
    for scale in (1e-30, 1e-3, 1.0, 1e3, 1e30):
        for exponent in range(-300, 301):
            cap = 10.0**exponent
            try:
                normal = softcap(cap, scale)
            except ValueError:
                assert cap < max(2.0**-126, scale * 2.0**-50) or cap > 2.0**126
                continue
            assert normal in (0.0, cap)
            if normal:
                assert 2.0**-127 < scale / normal < 2.0**127 and normal < 2.0**127


# Where tanh from exponentials, times the cap, would be off by more than a score may be.
LARGE_CAPS = [1.5e3, 1e6, 1e10]


@on_both([Case(softcap=cap, dtype=d, causal=True) for cap in LARGE_CAPS for d in ("bf16", "fp16")])
def test_forward_with_a_large_cap(runner: Runner, case: Case):
    check_forward_case(runner, case)


@on_both([Case(softcap=1e6, dropout_p=0.3, num_heads_q=4)])
def test_forward_with_a_large_cap_and_dropout(runner: Runner, case: Case):
    """Where no warp looks for small products together."""
    torch.manual_seed(5)
    inputs = test_backward.make_inputs(case.but(dropout_p=0.0), runner.device)
    function, qkv = flash_attn.flash_attn_func, (inputs.q, inputs.k, inputs.v)
    capped, plain = (
        (torch.manual_seed(7), runner.call(function, *qkv, 0.3, softcap=cap))[1]
        for cap in (case.softcap, 0.0)
    )
    torch.testing.assert_close(capped, plain, rtol=1e-2, atol=1e-2)


@on_both([Case(softcap=cap, dtype=d) for cap in LARGE_CAPS for d in ("bf16", "fp16")])
def test_backward_with_a_large_cap(runner: Runner, case: Case):
    test_backward.check_case(runner, case)


@on_both([CacheCase(softcap=cap, num_splits=1) for cap in LARGE_CAPS])
def test_decode_with_a_large_cap(runner: Runner, case: CacheCase):
    test_decode.check(runner, case)


@pytest.mark.parametrize("function", [forward, decode])
@pytest.mark.parametrize("chunk", [2**31 - 1, 2**31, 2**63, 10**30])
@pytest.mark.parametrize("rows_k", [90, 40])
def test_a_chunk_longer_than_the_keys(device: str, function: Any, chunk: int, rows_k: int):
    """All keys are in chunk 0; queries before the first key are in none, and see none."""
    qkv = tensors(device, rows_k=rows_k)
    want = function(*qkv, attention_chunk=1000)
    assert torch.equal(function(*qkv, attention_chunk=chunk), want)
    if function is forward:
        exact, _, _ = attention_reference(
            *(x.double() for x in qkv), causal=True, attention_chunk=1000
        )
        torch.testing.assert_close(want.double(), exact, rtol=2e-2, atol=2e-2)


# Few keys, each with much of the softmax; dS is up to 2^18, gradients are below 2^15.
_LARGE_DS = Case(
    dtype="fp16", batch=1, seqlen_q=8, seqlen_k=3, head_dim_qk=64, head_dim_v=256, num_heads_q=4,
    num_heads_k=4, num_heads_v=4,
)  # fmt: skip
SMALL_SCALES = [0.01, -0.01, 1e-6, 1e-30, 0.0]


def check_large_ds(call: test_backward.Call, **options: Any) -> None:
    """Runs the backward with a dout that makes dS overflow."""
    call.dout *= 9000.0
    exact = call.gradients(torch.float64)
    grads, _ = call.run(**options)
    for got, want in zip(grads, exact, strict=True):
        assert want.abs().max() < 65504.0, "the case is meant to have gradients that fit"
        worst = (got.double() - want).abs().max()
        assert worst <= 4e-3 * want.abs().max() + 2.0**-14, f"off by {worst}"


def largest_ds(call: test_backward.Call) -> float:
    """Of a case without features."""
    q, k, v, dout = (
        x.double().transpose(1, 2) for x in (call.inputs.q, call.inputs.k, call.inputs.v, call.dout)
    )
    probabilities = torch.softmax(call.problem.softmax_scale * (q @ k.mT), dim=-1)
    dp = dout @ v.mT
    return float((probabilities * (dp - (probabilities * dp).sum(-1, keepdim=True))).abs().max())


@on_both([_LARGE_DS.but(softmax_scale=s, causal=c) for s in SMALL_SCALES for c in (False, True)])
def test_fp16_gradients_that_fit_though_ds_does_not(runner: Runner, case: Case):
    """3503 NaN with softmax_scale=0.01: dS was rounded to fp16 before it was scaled."""
    call = test_backward.Call(case, runner.device)
    check_large_ds(call, runner=runner)
    assert case.causal or largest_ds(call) > 65520.0


@on_both(
    [
        _LARGE_DS.but(softmax_scale=0.01, dropout_p=0.1),
        _LARGE_DS.but(softmax_scale=0.01, softcap=20.0),
        _LARGE_DS.but(softmax_scale=0.01, head_dim_qk=128, head_dim_v=128),
        _LARGE_DS.but(softmax_scale=0.01, head_dim_qk=256, head_dim_v=256),
    ]
)
def test_fp16_gradients_that_fit_in_other_kernels(runner: Runner, case: Case):
    check_large_ds(test_backward.Call(case, runner.device), runner=runner)


@pytest.mark.sim
@pytest.mark.parametrize("dims", [(64, 64), (192, 128)])
def test_fp16_gradients_that_fit_on_hopper(dims: tuple[int, int]):
    tree: Any = hopper_tree.load()
    runner = Runner("sim", torch.device("cpu"), "sm_90a")
    call = test_backward.Call(_LARGE_DS.but(softmax_scale=0.01).with_dims(*dims), "cpu")
    check_large_ds(call, runner=runner, backend=tree.BACKEND)


@pytest.mark.parametrize("head_dim", [32, 64, 72, 128, 256])
def test_default_scales_leave_ds_alone(head_dim: int):
    """Results of ordinary calls do not change."""
    case = Case(dtype="fp16").with_dims(head_dim, head_dim)
    inputs = test_backward.make_inputs(case, "cpu")
    for scale, dtype, shift in (
        (None, "fp16", 0),
        (1.0, "fp16", 0),
        (0.6 * head_dim**-0.5, "fp16", 0),
        (2.0**-9, "fp16", 9),
        (-(2.0**-9), "fp16", 9),
        (1e-20, "fp16", bwd_tiles.MAX_DS_SHIFT),
        (1e-20, "bf16", 0),
    ):
        asked = case.but(softmax_scale=scale, dtype=dtype)
        problem = test_backward.problem_of(asked, inputs)
        if dtype == "bf16":
            problem = test_backward.replace(problem, dtype=dtype)
        assert bwd_tiles.ds_shift(problem) == shift
