"""Strides of out are those of torch.empty_like(q): of kernels, reference, operators, fakes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import permutations
from typing import Any

import pytest
import torch
from conftest import Runner, _runner
from torch import Tensor

import flash_attn as fa2
import flash_attn_interface as fa3
from flash_attn_interface import explain, simulate
from flash_attn_interface._common.ask.out_layout import laid_out, memory_order, new_out
from flash_attn_interface.call import dispatch

BF16 = torch.bfloat16

# Axes of the memory that q is a view of, from the outermost to the innermost but the last.
DENSE = {"bshd": (0, 1, 2), "bhsd": (0, 2, 1), "sbhd": (1, 0, 2), "hsbd": (2, 1, 0)}


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("sm_80", marks=pytest.mark.sim),
        pytest.param("sm_90a", marks=pytest.mark.sim),
        pytest.param("gpu", marks=pytest.mark.gpu),
    ]
)
def machine(request: pytest.FixtureRequest) -> Iterator[Runner | None]:
    """cpu: the reference."""
    dispatch.forget_plans()
    if request.param == "cpu":
        yield None
    elif request.param == "gpu":
        yield _runner("gpu")
    else:
        yield Runner("sim", torch.device("cpu"), request.param)
    dispatch.forget_plans()


def run(machine: Runner | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs) if machine is None else machine.call(function, *args, **kwargs)


def device_of(machine: Runner | None) -> torch.device:
    return torch.device("cpu") if machine is None else machine.device


def draw(order: tuple[int, ...], *sizes: int, device: Any = "cpu") -> Tensor:
    """sizes, with the axes in that order in memory and the last one innermost."""
    base = torch.randn([*(sizes[axis] for axis in order), sizes[-1]], device=device).to(BF16)
    return base.permute(*(order.index(axis) for axis in range(len(order))), len(order))


def steps(tensor: Tensor) -> list[int]:
    return [step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def check(got: Tensor, q: Tensor, want: Tensor) -> None:
    like = torch.empty_like(q) if q.shape == got.shape else new_out(q, got.shape[-1])
    assert steps(got) == steps(like)
    torch.testing.assert_close(got.contiguous(), want, rtol=0, atol=0)


@pytest.mark.parametrize("head_dim_v", [32, 48])
@pytest.mark.parametrize("order", DENSE.values(), ids=DENSE)
def test_dense(machine, order: tuple[int, ...], head_dim_v: int):
    device = device_of(machine)
    q = draw(order, 2, 37, 4, 32, device=device)
    k, v = (draw((0, 1, 2), 2, 41, 2, d, device=device) for d in (32, head_dim_v))
    for function in (fa2.flash_attn_func, fa3.flash_attn_func):
        want = run(machine, function, q.contiguous(), k, v, causal=True)
        assert want.is_contiguous()
        check(run(machine, function, q, k, v, causal=True), q, want)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["thd", "htd"])
def test_varlen(machine, order: tuple[int, ...]):
    device = device_of(machine)
    q, k, v = draw(order, 50, 4, 32, device=device), *(
        draw((0, 1), 50, 2, 32, device=device) for _ in "kv"
    )  # fmt: skip
    ends = torch.tensor([0, 20, 20, 47], dtype=torch.int32, device=device)
    for function in (fa2.flash_attn_varlen_func, fa3.flash_attn_varlen_func):
        want = run(machine, function, q.contiguous(), k, v, ends, ends, 27, 27)
        check(run(machine, function, q, k, v, ends, ends, 27, 27), q, want)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("seqlen_q", [1, 5])
@pytest.mark.parametrize("order", DENSE.values(), ids=DENSE)
def test_cache(machine, order: tuple[int, ...], seqlen_q: int, num_splits: int):
    device = device_of(machine)
    q = draw(order, 2, seqlen_q, 4, 32, device=device)
    k, v = (draw((0, 1, 2), 2, 80, 2, 32, device=device) for _ in "kv")
    options = {"cache_seqlens": 77, "num_splits": num_splits, "causal": True}
    for function in (fa2.flash_attn_with_kvcache, fa3.flash_attn_with_kvcache):
        want = run(machine, function, q.contiguous(), k, v, **options)
        check(run(machine, function, q, k, v, **options), q, want)


@pytest.mark.parametrize("order", DENSE.values(), ids=DENSE)
def test_empty_results(machine, order: tuple[int, ...]):
    device = device_of(machine)
    q = draw(order, 2, 5, 4, 32, device=device)
    k, v = (torch.empty(2, 0, 2, 32, dtype=BF16, device=device) for _ in "kv")
    check(run(machine, fa2.flash_attn_func, q, k, v), q, torch.zeros_like(q).contiguous())


@pytest.mark.parametrize("order", DENSE.values(), ids=DENSE)
def test_gradients(machine, order: tuple[int, ...]):
    device = device_of(machine)
    q = draw(order, 2, 37, 4, 32, device=device)
    k, v = (draw((0, 1, 2), 2, 41, 2, 32, device=device) for _ in "kv")
    dout = torch.randn_like(q)
    found = []
    for x in (q, q.contiguous()):
        inputs = [tensor.detach().requires_grad_() for tensor in (x, k, v)]
        with simulate(machine.arch) if machine and machine.name == "sim" else nullcontext():
            found.append(torch.autograd.grad(fa2.flash_attn_func(*inputs), inputs, dout))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02)


def _gaps(q: Tensor) -> Tensor:
    wide = torch.zeros(*q.shape[:-1], q.shape[-1] + 8, dtype=q.dtype, device=q.device)
    wide[..., : q.shape[-1]] = q
    return wide[..., : q.shape[-1]]


def test_other_strides_give_a_contiguous_out(machine):
    device = device_of(machine)
    base = draw((0, 1, 2), 2, 37, 4, 32, device=device)
    k, v = (draw((0, 1, 2), 2, 41, 2, 32, device=device) for _ in "kv")
    want = run(machine, fa2.flash_attn_func, base, k, v)
    strided_last = base.transpose(2, 3).contiguous().transpose(2, 3)
    views = [_gaps(base), _gaps(base.transpose(1, 2).contiguous()).transpose(1, 2), strided_last]
    for q in views:
        got = run(machine, fa2.flash_attn_func, q, k, v)
        assert got.is_contiguous()
        torch.testing.assert_close(got, want, rtol=0, atol=0)


BACKENDS = ["aot_eager", "inductor"] if shutil.which("g++") else ["aot_eager"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", DENSE.values(), ids=DENSE)
def test_compiled(order: tuple[int, ...], backend: str):
    torch._dynamo.reset()
    q = draw(order, 2, 37, 4, 32)
    k, v = draw((0, 1, 2), 2, 41, 2, 32), draw((0, 1, 2), 2, 41, 2, 48)

    def block(q: Tensor) -> Tensor:
        """q is an intermediate of the graph, and so is out."""
        return fa2.flash_attn_func(q + 1, k, v).relu()

    got = torch.compile(block, fullgraph=True, backend=backend)(q)
    check(got, q, block(q.contiguous()))


def test_memory_order():
    for order in permutations(range(3)):
        q = draw(order, 2, 3, 5, 8)
        assert memory_order(q.shape[:-1], q.stride()[:-1], 8) == order
        for width in (8, 12):
            assert new_out(q, width).stride() == draw(order, 2, 3, 5, width).stride()
            out = torch.randn(2, 3, 5, width)
            assert torch.equal(laid_out(out, q), out)
            assert laid_out(out, q).stride() == new_out(q, width).stride()


def test_explain_plans_a_permuted_out():
    q = draw((0, 2, 1), 2, 37, 4, 32)
    with simulate("sm_80"):
        assert explain(q, q, q).problem.out_strides == (37 * 4 * 32, 32, 37 * 32)
