"""Which tree gets the backward of a call on a Hopper GPU: this tree's for every function but
`flash_attn_f3b2_func` and `flash_attn_f3b2_varlen_func`, the Ampere one for what it refuses. Then
gradients through the public functions, by its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import hopper_tree
import pytest
import torch
from conftest import Runner
from fakes import FakeBackend, qkv, ragged_qkv
from gradients import check, results_and_gradients
from test_autograd import CALLS
from torch import Tensor

import flash_attn as fa2
import flash_attn_2_cuda
import flash_attn_interface as fa3
from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_varlen_backward
from flash_attn_interface import explain, simulate
from flash_attn_interface._common.ask import call as ask
from flash_attn_interface._common.ask.backward_problem import BackwardProblem
from flash_attn_interface._common.ask.problem import Target
from flash_attn_interface.call import backends, dispatch, selection
from flash_attn_interface.call.selection import Device
from flash_attn_interface.compat import fa3_library

TREE = hopper_tree.load()
ARCH = "sm_90a"


@pytest.fixture
def trees(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FakeBackend, FakeBackend]]:
    """Two trees that serve everything, forward and backward."""
    hopper, flash2 = FakeBackend("hopper"), FakeBackend("flash2")
    monkeypatch.setattr(backends, "hopper", lambda: hopper)
    monkeypatch.setattr(backends, "flash2", lambda: flash2)
    dispatch.forget_plans()
    yield hopper, flash2
    dispatch.forget_plans()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[BackwardProblem]]:
    """The tree itself, and the backward problems that it makes plans for in this test."""
    tree, planned = TREE.BACKEND, []

    def plan_backward(problem: BackwardProblem, target: Target) -> Any:
        planned.append(problem)
        return type(tree).plan_backward(tree, problem, target)

    monkeypatch.setattr(tree, "plan_backward", plan_backward)
    monkeypatch.setattr(backends, "hopper", lambda: tree)
    dispatch.forget_plans()
    yield planned
    dispatch.forget_plans()


# ---- every function ----------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_public_functions_have_both_directions_here(trees, call):
    function, inputs, *_ = call("cpu")
    with simulate(ARCH):
        results_and_gradients(function, inputs)
    hopper, flash2 = trees
    assert (len(hopper.plans), len(hopper.backward_plans)) == (1, 1)
    assert (flash2.plans, flash2.backward_plans) == ([], [])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100", "sm_120"])
def test_f3b2_keeps_the_ampere_backward(trees, arch):
    q, k, v = (x.requires_grad_() for x in qkv())
    ragged = ragged_qkv()
    ragged["q"].requires_grad_()
    with simulate(arch):
        fa3.flash_attn_f3b2_func(q, k, v, causal=True).sum().backward()
        fa3.flash_attn_f3b2_varlen_func(**ragged).sum().backward()
    hopper, flash2 = trees
    assert (len(hopper.plans), len(flash2.plans)) == ((2, 0) if arch == "sm_90a" else (0, 2))
    assert (len(hopper.backward_plans), len(flash2.backward_plans)) == (0, 2)


def dense() -> tuple[Tensor, ...]:
    """(dout, q, k, v, out, softmax_lse)"""
    q, k, v = qkv()
    out, lse = fa3.flash_attn_func(q, k, v, return_attn_probs=True)
    return torch.randn_like(out), q, k, v, out, lse


def packed() -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """The same of packed sequences, and their lengths."""
    lengths = ragged_qkv()
    q, k, v = (lengths.pop(name) for name in "qkv")
    out, lse = fa3.flash_attn_varlen_func(q, k, v, **lengths, return_attn_probs=True)
    return (torch.randn_like(out), q, k, v, out, lse), lengths


GRADS = (None, None, None)
SCORES = (0.0, 0.3, True, -1, -1, 0.0)  # dropout_p, scale, causal, window, softcap


def fa2_private() -> None:
    _flash_attn_backward(*dense(), *GRADS, *SCORES, None, False)


def fa2_operator() -> None:
    torch.ops.flash_attn._flash_attn_backward(*dense(), *GRADS, *SCORES, None, False)


def fa2_private_varlen() -> None:
    tensors, lengths = packed()
    _flash_attn_varlen_backward(*tensors, *GRADS, *lengths.values(), *SCORES, None, False)


def fa2_raw() -> None:
    flash_attn_2_cuda.bwd(*dense(), *GRADS, None, *SCORES, False, None, None)


def fa2_raw_varlen() -> None:
    tensors, lengths = packed()
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = lengths.values()
    flash_attn_2_cuda.varlen_bwd(
        *tensors, *GRADS, cu_seqlens_q, cu_seqlens_k, None, max_seqlen_q, max_seqlen_k, *SCORES[:2],
        False, *SCORES[2:], False, None, None,
    )  # fmt: skip


def fa3_private() -> None:
    fa3._flash_attn_backward(*dense(), softmax_scale=0.3)


def fa3_private_varlen() -> None:
    tensors, lengths = packed()
    fa3._flash_attn_backward(*tensors, **lengths)


def fa3_operator() -> None:
    fa3_library.register()
    torch.ops.flash_attn_3.bwd(*dense(), softmax_scale=0.3)


def compiled() -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    function = torch.compile(fa3.flash_attn_func, backend="aot_eager", fullgraph=True)
    function(q, k, v, causal=True).sum().backward()


@pytest.mark.parametrize(
    "call",
    [
        fa2_private, fa2_operator, fa2_private_varlen, fa2_raw, fa2_raw_varlen, fa3_private,
        fa3_private_varlen, fa3_operator, compiled,
    ],
    ids=lambda call: call.__name__,
)  # fmt: skip
def test_private_and_raw_functions_have_it_too(trees, call: Callable[[], None]):
    with simulate(ARCH):
        call()
    assert [len(tree.backward_plans) for tree in trees] == [1, 0]


# ---- what it refuses ---------------------------------------------------------------------------


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def problem_of(**changes: Any) -> BackwardProblem:
    """Of tensors whose rows are contiguous, but for those in changes."""
    shapes = {"q": (2, 512, 8, 64), "k": (2, 512, 2, 64), "v": (2, 512, 2, 128)}
    shapes |= {"out": (2, 512, 8, 128), "dout": (2, 512, 8, 128)}
    t = {name: changes.pop(name, meta(*shape)) for name, shape in shapes.items()}
    explained = explain(t["q"], t["k"], t["v"], arch=ARCH)
    forward = replace(explained.problem, **changes)
    q, k, v, out, dout = t.values()
    gradients = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    asked = ask.Backward(dout, out, out, *gradients)
    return BackwardProblem.of(forward, ask.Call(ask.Tensors(q, k, v)), asked)


REFUSED = {
    "dout-expanded-rows": ({"dout": meta(2, 1, 8, 128).expand(-1, 512, -1, -1)}, "its row axis"),
    "dout-expanded-batch": ({"dout": meta(1, 512, 8, 128).expand(2, -1, -1, -1)}, "its batch axis"),
    "dout-odd-rows": ({"dout": meta(2, 512, 8, 132)[..., :128]}, "multiples of 8"),
    "k-odd-rows": ({"k": meta(2, 512, 2, 68)[..., :64]}, "multiples of 8"),
    "v-expanded-heads": ({"v": meta(2, 512, 1, 128).expand(-1, -1, 2, -1)}, "its head axis"),
    "rows-too-far": ({"q": meta(512, 2**31 + 8).as_strided((2, 512, 8, 64), (512, 2**40, 64, 1))},
                     "row stride"),
    "scale-0": ({"softmax_scale": 0.0}, "the scale, which must not be 0"),
    "long": ({"seqlen_k": 2**29}, "limited to"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_it_refuses_goes_to_the_ampere_backward(installed, changes, reason, monkeypatch):
    """With its reason. Limits that both trees have are not the Ampere tree's to show here."""
    problem = problem_of(**changes)
    monkeypatch.setattr(backends.flash2(), "refuses_backward", lambda *_: None)
    decision = selection.select_backward(problem, Device((9, 0)))
    assert decision.backend.name == "flash2" and decision.target == Target("sm_90", 0)
    ((name, why),) = decision.refused
    assert name == "hopper" and reason in why


SERVED = {
    "plain": {},
    "slices": {"q": meta(2, 512, 12, 64)[:, :, :8], "k": meta(2, 512, 2, 192)[..., :64]},
    "heads-first": {"dout": meta(2, 8, 512, 128).transpose(1, 2)},
    "one-row": {"dout": meta(2, 1, 8, 128), "out": meta(2, 1, 8, 128), "q": meta(2, 1, 8, 64)},
    "features": {"softcap": 3.0, "dropout_p": 0.1, "alibi": True, "attention_chunk": 7},
    "negative-scale": {"softmax_scale": -0.1},
}


@pytest.mark.parametrize("changes", SERVED.values(), ids=SERVED)
def test_what_it_serves(installed, changes):
    problem = problem_of(**changes)
    decision = selection.select_backward(problem, Device((9, 0)))
    assert decision.backend is TREE.BACKEND and decision.target == Target(ARCH, 0)
    assert decision.refused == ()


SHAPES = ((2, 512, 8, 64), (2, 512, 2, 64), (2, 512, 2, 128))


def test_explain_shows_both_directions(installed):
    explanation = explain(*SHAPES, causal=True, arch=ARCH, verbose=True)
    assert (explanation.backend, explanation.backward.backend) == ("hopper", "hopper")
    lines = str(explanation).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("backward"))
    assert "hopper for sm_90a" in lines[first]
    assert any("hopper_bwd" in line for line in lines[first:])


def test_explain_says_why_a_backward_is_the_other_trees(installed):
    explanation = explain(*SHAPES, softmax_scale=0.0, arch=ARCH, verbose=True)
    assert (explanation.backend, explanation.backward.backend) == ("hopper", "flash2")
    text = str(explanation).partition("\nbackward")[2]
    assert "flash2 for sm_90" in text
    assert "not hopper: its masks are applied before the scale, which must not be 0" in text


def explained(**changes: Any) -> Any:
    shapes = {"q": SHAPES[0], "k": SHAPES[1], "v": SHAPES[2]}
    q, k, v = (changes.pop(name, meta(*shape)) for name, shape in shapes.items())
    return explain(q, k, v, arch=ARCH, **changes)


# As the table in docs/features.md.
DIRECTIONS = {
    "rows": ({"v": meta(2, 512, 2, 100)}, "flash2", "flash2"),
    "strides": ({"k": meta(2, 512, 2, 68)[..., :64]}, "flash2", "flash2"),
    "expanded-batch": ({"k": meta(1, 512, 2, 64).expand(2, -1, -1, -1)}, "flash2", "flash2"),
    "expanded-rows": ({"v": meta(2, 1, 2, 128).expand(-1, 512, -1, -1)}, "flash2", "flash2"),
    "expanded-heads-of-q": ({"q": meta(2, 512, 1, 64).expand(-1, -1, 8, -1)}, "flash2", "flash2"),
    "expanded-heads-of-k": ({"k": meta(2, 512, 1, 64).expand(-1, -1, 2, -1)}, "hopper", "flash2"),
    "scale-0": ({"softmax_scale": 0.0}, "hopper", "flash2"),
    "s-dmask": ({"dropout_p": 0.1, "return_attn_probs": True}, "flash2", "hopper"),
    "features": ({"dropout_p": 0.1, "softcap": 2.0, "window_size": (9, 9)}, "hopper", "hopper"),
}


@pytest.mark.parametrize(("changes", "forward", "backward"), DIRECTIONS.values(), ids=DIRECTIONS)
def test_each_direction_is_chosen_by_itself(installed, changes, forward, backward):
    explanation = explained(**changes)
    assert (explanation.backend, explanation.backward.backend) == (forward, backward)
    assert ("hopper" in explanation.refused) == (forward == "flash2")
    assert ("hopper" in dict(explanation.backward.decision.refused)) == (backward == "flash2")


def test_pages_have_no_backward(installed):
    paged = {"cu_seqlens_q": (3,), "cu_seqlens_k": (3,), "max_seqlen_q": 9, "max_seqlen_k": 9}
    explanation = explain((18, 8, 64), (4, 16, 2, 64), (4, 16, 2, 128), arch=ARCH, **paged,
                          block_table=(2, 1))  # fmt: skip
    assert (explanation.backend, explanation.backward.backend) == ("flash2", None)


def test_explain_says_that_wide_v_takes_the_other_trees_backward(installed):
    shapes = (2, 512, 8, 64), (2, 512, 2, 64), (2, 512, 2, 512)
    explanation = explain(*shapes, arch=ARCH, verbose=True)
    assert (explanation.backend, explanation.backward.backend) == ("hopper", "flash2")
    text = str(explanation).partition("\nbackward")[2]
    assert "its backward has head dims up to 256" in text


# ---- gradients ---------------------------------------------------------------------------------


@pytest.fixture(
    params=[
        pytest.param("sim", marks=pytest.mark.sim),
        pytest.param("gpu", marks=[pytest.mark.gpu, pytest.mark.hopper]),
    ]
)
def machine(request: pytest.FixtureRequest) -> Runner:
    return Runner(request.param, torch.device("cuda" if request.param == "gpu" else "cpu"), ARCH)


@pytest.mark.parametrize("weigh_lse", [False, True], ids=["out", "lse"])
@pytest.mark.parametrize("name", ["fa2", "fa2-varlen", "fa3-qkvpacked", "fa3-varlen"])
def test_gradients(machine: Runner, installed, name: str, weigh_lse: bool):
    function, inputs, split, options = CALLS[name](machine.device)
    if weigh_lse:
        function = partial(function, return_attn_probs=True)
    with machine.active():
        _, weights, found = results_and_gradients(function, inputs, weigh_lse)
    assert len(installed) == 1
    check(split(*found), split(*inputs), weights, **options)


def test_gradients_of_dropout(machine: Runner, installed):
    q, k, v = (
        torch.randn(1, 80, heads, dim, device=machine.device).bfloat16()
        for heads, dim in ((4, 64), (2, 64), (1, 128))
    )
    with machine.active():
        torch.manual_seed(3)
        rng_state = torch.randint(0, 2**62, (2,), dtype=torch.int64, device=machine.device)
        torch.manual_seed(3)
        function = partial(fa2.flash_attn_func, dropout_p=0.3)
        _, weights, found = results_and_gradients(function, (q, k, v))
    assert len(installed) == 1
    check(found, (q, k, v), weights, dropout_p=0.3, rng_state=rng_state)


def test_an_expanded_dout_takes_the_ampere_kernels(machine: Runner, installed):
    q, k, v = (
        torch.randn(2, 40, heads, dim, device=machine.device).bfloat16().requires_grad_()
        for heads, dim in ((4, 64), (2, 64), (1, 128))
    )
    weights = torch.randn(1, 1, 4, 128, device=machine.device).bfloat16()
    dout = weights.expand(2, 40, -1, -1)
    with machine.active():
        found = torch.autograd.grad(fa3.flash_attn_func(q, k, v), (q, k, v), dout)
    assert installed == []
    check(found, tuple(x.detach() for x in (q, k, v)), (dout,))
