"""`s_aux` of every public function: on the reference, in the simulator and on the GPU, against the
same call without sinks and `apply_sinks`, whose own test is in tests/integrations/test_sinks.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Runner
from torch import Tensor

import flash_attn as fa2
import flash_attn_interface as fa3
from flash_attn_interface.reference.sinks import apply_sinks

BF16 = torch.bfloat16
HEADS, DIM, DIM_V = 4, 32, 16
ENDS = (0, 5, 5, 14)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("sim", marks=pytest.mark.sim),
        pytest.param("gpu", marks=pytest.mark.gpu),
    ]
)
def machine(request: pytest.FixtureRequest) -> Runner:
    return Runner(request.param, torch.device("cuda" if request.param == "gpu" else "cpu"))


def draw(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(BF16)


def draw_sinks(device: torch.device) -> Tensor:
    sinks = torch.randn(HEADS, device=device)
    sinks[1], sinks[2] = float("-inf"), 30.0
    return sinks


def dense(device: torch.device) -> dict[str, Any]:
    shapes = {"q": (2, 9, HEADS, DIM), "k": (2, 7, 2, DIM), "v": (2, 7, 2, DIM_V)}
    return {name: draw(device, *shape) for name, shape in shapes.items()} | {"causal": True}


def ragged(device: torch.device) -> dict[str, Any]:
    shapes = {"q": (14, HEADS, DIM), "k": (14, 2, DIM), "v": (14, 2, DIM_V)}
    ends = torch.tensor(ENDS, dtype=torch.int32, device=device)
    lengths = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": 9, "max_seqlen_k": 9}
    return {name: draw(device, *shape) for name, shape in shapes.items()} | lengths


def kv_packed(device: torch.device) -> dict[str, Any]:
    return {"q": draw(device, 2, 9, HEADS, DIM), "kv": draw(device, 2, 7, 2, 2, DIM)}


def qkv_packed(device: torch.device) -> dict[str, Any]:
    return {"qkv": draw(device, 2, 9, 3, HEADS, DIM), "window_size": (3, 1)}


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[[torch.device], dict[str, Any]]]] = {
    "fa3": (fa3.flash_attn_func, dense),
    "fa3-varlen": (fa3.flash_attn_varlen_func, ragged),
    "fa3-qkvpacked": (fa3.flash_attn_qkvpacked_func, qkv_packed),
    "f3b2": (fa3.flash_attn_f3b2_func, dense),
    "f3b2-varlen": (fa3.flash_attn_f3b2_varlen_func, ragged),
    "fa2": (fa2.flash_attn_func, dense),
    "fa2-varlen": (fa2.flash_attn_varlen_func, ragged),
    "fa2-kvpacked": (fa2.flash_attn_kvpacked_func, kv_packed),
    "fa2-qkvpacked": (fa2.flash_attn_qkvpacked_func, qkv_packed),
}
on_all = pytest.mark.parametrize("name", FUNCTIONS)


def close(got: Tensor, want: Tensor, bound: float = 0.02) -> None:
    assert got.shape == want.shape
    same = torch.isneginf(want)
    assert torch.equal(torch.isneginf(got), same)
    error = (got.double() - want.double()).masked_fill(same, 0.0).abs().max()
    assert error <= bound * max(1.0, float(want.masked_fill(same, 0.0).abs().max()))


@on_all
def test_results(name: str, machine: Runner) -> None:
    function, make = FUNCTIONS[name]
    inputs, sinks = make(machine.device), draw_sinks(machine.device)
    without = machine.call(function, **inputs, return_attn_probs=True)
    found = machine.call(function, **inputs, return_attn_probs=True, s_aux=sinks)
    wanted = apply_sinks(without[0], without[1], sinks)
    close(found[0], wanted[0])
    close(found[1], wanted[1], 1e-5)
    assert found[0].dtype == BF16 and found[1].dtype == torch.float32
    alone = machine.call(function, **inputs, s_aux=sinks.to(BF16))
    close(alone, apply_sinks(without[0], without[1], sinks.to(BF16))[0])


@on_all
def test_gradients(name: str, machine: Runner) -> None:
    """Of all tensors and of the sinks, through out and softmax_lse."""
    function, make = FUNCTIONS[name]
    inputs, sinks = make(machine.device), draw_sinks(machine.device)
    names = [
        key for key, value in inputs.items() if isinstance(value, Tensor) and value.dtype == BF16
    ]

    def gradients(composed: bool) -> list[Tensor]:
        leaves = {key: inputs[key].clone().requires_grad_() for key in names}
        s_aux = sinks.clone().requires_grad_()
        given = {**inputs, **leaves, "return_attn_probs": True}
        if composed:
            out, lse, *_ = machine.call(function, **given)
            out, lse = apply_sinks(out, lse, s_aux)
        else:
            out, lse, *_ = machine.call(function, **given, s_aux=s_aux)
        finite = lse.masked_fill(torch.isneginf(lse), 0.0)
        loss = (out.float() * weights).sum() + finite.sum()
        with machine.active():
            return list(torch.autograd.grad(loss, [*leaves.values(), s_aux]))

    out = machine.call(function, **inputs)
    weights = torch.randn(out.shape, device=machine.device)
    for got, want in zip(gradients(False), gradients(True), strict=True):
        close(got, want)


def test_gradients_in_float64_terms(machine: Runner) -> None:
    """Against the softmax that has one logit more."""
    inputs, sinks = dense(machine.device), torch.randn(HEADS, device=machine.device)
    leaves = [inputs[name].clone().requires_grad_() for name in "qkv"]
    s_aux = sinks.clone().requires_grad_()
    out = machine.call(fa3.flash_attn_func, *leaves, s_aux=s_aux)
    dout = torch.randn_like(out)
    with machine.active():
        got = torch.autograd.grad(out, [*leaves, s_aux], dout)
    exact = [x.detach().double().requires_grad_() for x in (*leaves, s_aux)]
    q, k, v = exact[0], *(x.repeat_interleave(HEADS // 2, 2) for x in exact[1:3])
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * DIM**-0.5
    column = exact[3][None, :, None, None].expand(*scores.shape[:3], 1)
    probabilities = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
    right = torch.einsum("bhij,bjhd->bihd", probabilities, v)
    close(out, right)
    for found, wanted in zip(got, torch.autograd.grad(right, exact, dout.double()), strict=True):
        close(found, wanted, 0.03)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_cache(machine: Runner, num_splits: int) -> None:
    device, sinks = machine.device, draw_sinks(machine.device)
    q, k, v = (
        draw(device, 3, 1, HEADS, DIM),
        draw(device, 3, 70, 2, DIM),
        draw(device, 3, 70, 2, DIM_V),
    )
    lengths = torch.tensor((70, 0, 33), dtype=torch.int32, device=device)
    for module in (fa2, fa3):
        arguments: dict[str, Any] = {
            "cache_seqlens": lengths, "num_splits": num_splits, "return_softmax_lse": True,
        }  # fmt: skip
        without = machine.call(module.flash_attn_with_kvcache, q, k, v, **arguments)
        found = machine.call(module.flash_attn_with_kvcache, q, k, v, **arguments, s_aux=sinks)
        wanted = apply_sinks(without[0], without[1], sinks)
        close(found[0], wanted[0])
        close(found[1], wanted[1], 1e-5)
    with pytest.raises(NotImplementedError, match="s_aux requires a gradient"):
        fa3.flash_attn_with_kvcache(q, k, v, s_aux=sinks.requires_grad_())


def test_pages(machine: Runner) -> None:
    device, sinks = machine.device, draw_sinks(machine.device)
    inputs = ragged(device) | {"k": draw(device, 3, 16, 2, DIM), "v": draw(device, 3, 16, 2, DIM_V)}
    inputs["block_table"] = torch.tensor(((2,), (0,), (1,)), dtype=torch.int32, device=device)
    function = fa2.flash_attn_varlen_func
    without = machine.call(function, **inputs, return_attn_probs=True)
    found = machine.call(function, **inputs, return_attn_probs=True, s_aux=sinks)
    close(found[0], apply_sinks(without[0], without[1], sinks)[0])


def test_compiled() -> None:
    inputs, sinks = dense(torch.device("cpu")), draw_sinks(torch.device("cpu"))
    names = ("q", "k", "v")

    def gradients(function: Callable[..., Any]) -> list[Tensor]:
        leaves = [inputs[name].clone().requires_grad_() for name in names]
        s_aux = sinks.clone().requires_grad_()
        out = function(*leaves, s_aux)
        return [out, *torch.autograd.grad(out.float().sum(), [*leaves, s_aux])]

    def call(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor) -> Any:
        return fa3.flash_attn_func(q, k, v, causal=True, s_aux=s_aux)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled), gradients(call), strict=True):
        close(got, want)


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "shape": (torch.zeros(3), ValueError, r"s_aux has shape \(3,\): expected \(num_heads_q,\)"),
    "dims": (torch.zeros(1, 4), ValueError, "s_aux has shape"),
    "dtype": (torch.zeros(4, dtype=torch.int32), TypeError, "s_aux has dtype torch.int32"),
    "type": ([0.0] * 4, TypeError, "s_aux is list"),
    "device": (torch.zeros(4, device="meta"), ValueError, "s_aux is on meta but q is on cpu"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("gradient", [False, True])
def test_wrong_sinks_are_named(case: str, gradient: bool) -> None:
    value, error, message = WRONG[case]
    inputs = dense(torch.device("cpu"))
    inputs["q"].requires_grad_(gradient)
    with pytest.raises(error, match=message):
        fa3.flash_attn_func(**inputs, s_aux=value)
    q, cache = draw(torch.device("cpu"), 2, 1, HEADS, DIM), draw(torch.device("cpu"), 2, 9, 2, DIM)
    with pytest.raises(error, match=message):
        fa2.flash_attn_with_kvcache(q, cache, cache, s_aux=value)
