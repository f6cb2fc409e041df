"""Gradients through the public functions: what is passed to the backward, saved and returned.

`reference` runs the same autograd function as kernels do, on the reference's own backward; `sim`
and `gpu` run kernels. Kernels' accuracy over all shapes and features is test_backward.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gradients
import pytest
import torch
from asked import forward_call
from conftest import Runner, _runner
from fakes import FakeBackend
from gradients import check, results_and_gradients
from torch import Tensor

import flash_attn as fa2
import flash_attn_interface as fa3
from flash_attn_interface import simulate
from flash_attn_interface._common import env
from flash_attn_interface.call import autograd, backends, dispatch

BF16 = torch.bfloat16


@pytest.fixture(
    params=[
        "reference",
        pytest.param("sim", marks=pytest.mark.sim),
        pytest.param("gpu", marks=pytest.mark.gpu),
    ]
)
def machine(request: pytest.FixtureRequest, monkeypatch) -> Iterator[Runner]:
    """Where kernels run, or the reference in their place."""
    if request.param == "reference":
        monkeypatch.setenv(env.FORCE_BACKEND.name, "reference")
    dispatch.forget_plans()
    yield _runner("sim" if request.param == "reference" else request.param)
    dispatch.forget_plans()


@pytest.fixture
def fake(monkeypatch) -> Iterator[FakeBackend]:
    """The only kernel tree; it remembers what it was asked. Used under simulate()."""
    backend = FakeBackend()
    monkeypatch.setattr(backends, "flash2", lambda: backend)
    monkeypatch.setattr(backends, "hopper", lambda: None)
    dispatch.forget_plans()
    with simulate("sm_80"):
        yield backend
    dispatch.forget_plans()


def draw(*shape: int, device: Any = "cpu") -> Tensor:
    return torch.randn(shape, device=device).to(BF16)


def ends(*values: int, device: Any = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


# ---- every function ----------------------------------------------------------------------------

ENDS_Q, ENDS_K, TOTAL = (0, 20, 20, 37), (0, 9, 21, 40), 44


def dense(device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with widths and head counts of their own."""
    return (
        draw(2, 19, 4, 24, device=device),
        draw(2, 23, 2, 24, device=device),
        draw(2, 23, 1, 40, device=device),
    )


def ragged(device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Rows past the last sequence included."""
    return (
        draw(TOTAL, 4, 24, device=device),
        draw(TOTAL, 2, 24, device=device),
        draw(TOTAL, 1, 40, device=device),
    )


def lengths(device: Any, of_q: tuple[int, ...] = ENDS_Q) -> dict[str, Any]:
    return {
        "cu_seqlens_q": ends(*of_q, device=device),
        "cu_seqlens_k": ends(*ENDS_K, device=device),
    }


Call = tuple[Callable[..., Any], list[Tensor], Callable[..., Any], dict[str, Any]]
"""(function of the inputs, inputs, inputs or gradients -> those of q, k, v, reference options)"""


def _separate(function: Callable[..., Any], device: Any, **options: Any) -> Call:
    return partial(function, **options), list(dense(device)), lambda *x: x, options


def _kvpacked(device: Any) -> Call:
    inputs = [draw(2, 19, 4, 24, device=device), draw(2, 23, 2, 2, 24, device=device)]
    return (
        partial(fa2.flash_attn_kvpacked_func, causal=True),
        inputs,
        lambda q, kv: (q, *kv.unbind(2)),
        {"causal": True},
    )


def _qkvpacked(module: Any, device: Any) -> Call:
    inputs = [draw(2, 21, 3, 2, 24, device=device)]
    function = partial(module.flash_attn_qkvpacked_func, causal=True)
    return function, inputs, lambda qkv: qkv.unbind(2), {"causal": True}


def _heads_packed(device: Any) -> Call:
    inputs = [draw(2, 21, 8, 24, device=device)]
    function = partial(fa3.flash_attn_qkvpacked_func, causal=True, num_heads_q=4)
    return function, inputs, lambda qkv: qkv.split((4, 2, 2), 2), {"causal": True}


def _varlen(module: Any, device: Any, **options: Any) -> Call:
    options |= lengths(device)
    function = partial(module.flash_attn_varlen_func, **options, max_seqlen_q=20, max_seqlen_k=19)
    return function, list(ragged(device)), lambda *x: x, options


def _varlen_kvpacked(device: Any) -> Call:
    inputs = [draw(TOTAL, 4, 24, device=device), draw(TOTAL, 2, 2, 24, device=device)]
    options = lengths(device)
    function = partial(
        fa2.flash_attn_varlen_kvpacked_func, **options, max_seqlen_q=20, max_seqlen_k=19
    )
    return function, inputs, lambda q, kv: (q, *kv.unbind(1)), options


def _varlen_qkvpacked(device: Any) -> Call:
    inputs = [draw(TOTAL, 3, 2, 24, device=device)]
    function = partial(
        fa2.flash_attn_varlen_qkvpacked_func,
        cu_seqlens=ends(*ENDS_K, device=device),
        max_seqlen=19,
        window_size=(7, 3),
    )
    options = lengths(device, ENDS_K) | {"window_size": (7, 3)}
    return function, inputs, lambda qkv: qkv.unbind(1), options


CALLS: dict[str, Callable[[Any], Call]] = {
    "fa2": lambda device: _separate(fa2.flash_attn_func, device, softcap=2.0),
    "fa2-kvpacked": _kvpacked,
    "fa2-qkvpacked": lambda device: _qkvpacked(fa2, device),
    "fa2-varlen": lambda device: _varlen(fa2, device, causal=True),
    "fa2-varlen-kvpacked": _varlen_kvpacked,
    "fa2-varlen-qkvpacked": _varlen_qkvpacked,
    "fa3": lambda device: _separate(fa3.flash_attn_func, device, attention_chunk=9),
    "fa3-qkvpacked": lambda device: _qkvpacked(fa3, device),
    "fa3-qkvpacked-heads": _heads_packed,
    "fa3-varlen": lambda device: _varlen(
        fa3,
        device,
        seqused_q=ends(20, 0, 11, device=device),
        seqused_k=ends(4, 12, 19, device=device),
    ),
}


@pytest.mark.parametrize("weigh_lse", [False, True], ids=["out", "lse"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_gradients_of_every_function(machine: Runner, call: Any, weigh_lse: bool):
    function, inputs, split, options = call(machine.device)
    if weigh_lse:
        function = partial(function, return_attn_probs=True)
    with machine.active():
        _, weights, found = results_and_gradients(function, inputs, weigh_lse)
    assert [grad.shape for grad in found] == [tensor.shape for tensor in inputs]
    check(split(*found), split(*inputs), weights, **options)


def test_dropout_is_replayed(machine: Runner):
    q, k, v = dense(machine.device)
    slopes = torch.rand(4, device=machine.device)
    with machine.active():
        torch.manual_seed(3)
        rng_state = torch.randint(0, 2**62, (2,), dtype=torch.int64, device=machine.device)
        torch.manual_seed(3)
        function = partial(fa2.flash_attn_func, dropout_p=0.3, alibi_slopes=slopes)
        results, weights, found = results_and_gradients(function, (q, k, v))
    options = {"dropout_p": 0.3, "rng_state": rng_state, "alibi_slopes": slopes}
    check(found, (q, k, v), weights, **options)


# ---- inputs, outputs and their gradients in unusual forms --------------------------------------


def test_douts_of_any_strides(machine: Runner):
    q, k, v = (tensor.requires_grad_() for tensor in dense(machine.device))
    with machine.active():
        out = fa3.flash_attn_func(q, k, v)
        dense_dout = draw(*out.shape, device=machine.device)
        one = draw(1, device=machine.device)
        gaps = torch.full((2, 19, 8, 80), float("nan"), dtype=BF16, device=machine.device)
        gaps[:, :, ::2, :40] = dense_dout
        for dout in (
            gaps[:, :, ::2, :40],
            dense_dout.transpose(1, 2).contiguous().transpose(1, 2),
            dense_dout.transpose(1, 3).contiguous().transpose(1, 3),
            one.expand(out.shape),
            one.expand(2, 19, 4, 1).expand(out.shape),
        ):
            found = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
            check(found, (q, k, v), (dout,))


def test_inputs_of_any_strides(machine: Runner):
    plain = dense(machine.device)
    odd = [
        plain[0].transpose(1, 2).contiguous().transpose(1, 2),
        plain[1].transpose(-1, -2).contiguous().transpose(-1, -2),  # gaps in the last dim
        plain[2][:, :, :, :1].expand(2, 23, 1, 40),
    ]
    with machine.active():
        _, weights, found = results_and_gradients(fa3.flash_attn_func, odd)
    check(found, odd, weights)


def test_one_input_is_enough(machine: Runner):
    q, k, v = dense(machine.device)
    for index in range(3):
        inputs = [tensor.detach() for tensor in (q, k, v)]
        inputs[index].requires_grad_()
        with machine.active():
            out = fa3.flash_attn_func(*inputs)
            weights = (gradients.random_like(out),)
            gradients.objective((out,), weights).backward()
        want = gradients.reference_gradients(q, k, v, weights, torch.float64)[index]
        assert inputs[index].grad is not None
        torch.testing.assert_close(inputs[index].grad.double(), want, rtol=0.05, atol=0.05)
        assert [tensor.grad is None for tensor in inputs].count(True) == 2


def test_only_the_lse_is_used(machine: Runner):
    q, k, v = (tensor.requires_grad_() for tensor in dense(machine.device))
    with machine.active():
        _, lse, empty = fa2.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        weight = gradients.random_like(lse)
        found = torch.autograd.grad((lse * weight).sum(), (q, k, v))
    assert not empty.requires_grad and empty.shape == (0,)
    zero = torch.zeros(2, 19, 4, 40, device=machine.device)
    check(found, (q, k, v), (zero, weight), causal=True)
    assert not found[2].any()


def test_s_dmask_is_not_differentiable(machine: Runner):
    q, k, v = (tensor.requires_grad_() for tensor in dense(machine.device))
    with machine.active():
        out, lse, s_dmask = fa2.flash_attn_func(q, k, v, 0.5, return_attn_probs=True)
    assert out.requires_grad and lse.requires_grad
    assert not s_dmask.requires_grad and s_dmask.shape == (2, 4, 128, 128)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 5), (3, 0)])
def test_no_queries_or_no_keys(machine: Runner, seqlen_q: int, seqlen_k: int):
    inputs = [draw(2, n, 2, 16, device=machine.device) for n in (seqlen_q, seqlen_k, seqlen_k)]
    with machine.active():
        _, _, found = results_and_gradients(fa3.flash_attn_func, inputs)
    for grad, tensor in zip(found, inputs, strict=True):
        assert grad.shape == tensor.shape and not grad.any()


def test_rows_without_keys_have_zero_gradients(machine: Runner):
    q, k, v = (draw(1, n, 2, 16, device=machine.device) for n in (9, 4, 4))
    function = partial(fa3.flash_attn_func, causal=True, return_attn_probs=True)
    with machine.active():
        results, weights, found = results_and_gradients(function, (q, k, v), weigh_lse=True)
    assert results[1][:, :, :5].isneginf().all()
    assert not found[0][:, :5].any()
    check(found, (q, k, v), weights, causal=True)


def test_a_second_derivative_is_a_clear_error(machine: Runner):
    q, k, v = (tensor.requires_grad_() for tensor in dense(machine.device))
    qkv = draw(1, 5, 3, 2, 16, device=machine.device).requires_grad_()
    with machine.active():
        (dq,) = torch.autograd.grad(fa3.flash_attn_func(q, k, v).sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once more"):
            dq.float().square().sum().backward()
        (dqkv,) = torch.autograd.grad(
            fa2.flash_attn_qkvpacked_func(qkv).sum(), qkv, create_graph=True
        )
        with pytest.raises(RuntimeError, match="differentiated once more"):
            dqkv.sum().backward()


def test_the_reference_on_cpu_tensors_has_second_derivatives():
    q, k, v = (tensor.requires_grad_() for tensor in dense("cpu"))
    (dq,) = torch.autograd.grad(fa3.flash_attn_func(q, k, v).sum(), q, create_graph=True)
    dq.float().square().sum().backward()
    assert k.grad is not None and k.grad.any()


# ---- what kernels are asked --------------------------------------------------------------------


def test_packed_gradients_are_written_in_place(fake):
    for name in ("fa2-kvpacked", "fa2-qkvpacked", "fa3-qkvpacked-heads", "fa2-varlen-qkvpacked"):
        function, inputs, split, _ = CALLS[name]("cpu")
        _, _, found = results_and_gradients(function, inputs)
        (run,) = fake.backward_plans[-1].runs
        (q, k, v), (dq, dk, dv) = run[0][:3], run[1][3:6]
        for mine, theirs in zip(split(*found), (dq, dk, dv), strict=True):
            assert mine.data_ptr() == theirs.data_ptr() and mine.stride() == theirs.stride()
        for mine, theirs in zip(split(*inputs), (q, k, v), strict=True):
            assert mine.data_ptr() == theirs.data_ptr() and mine.stride() == theirs.stride()


def test_nothing_is_copied_to_be_saved(fake):
    q, k, v = (tensor.requires_grad_() for tensor in dense("cpu"))
    out = fa3.flash_attn_func(q[..., :17], k[..., :17], v)
    saved = out.grad_fn.saved_tensors
    kept = [tensor for tensor in saved if tensor is not None]
    assert [tensor.data_ptr() for tensor in kept[:4]] == [
        tensor.data_ptr() for tensor in (q, k, v, out)
    ]
    assert [tensor.shape for tensor in kept[4:]] == [(2, 4, 19)]
    qkv = draw(2, 5, 3, 2, 16).requires_grad_()
    saved = fa2.flash_attn_qkvpacked_func(qkv).grad_fn.saved_tensors
    assert saved[0].data_ptr() == qkv.data_ptr() and saved[1:3] == (None, None)


def test_gradients_are_laid_out_like_their_inputs(fake):
    q, k, v = dense("cpu")
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    _, _, (dq, dk, _) = results_and_gradients(fa3.flash_attn_func, (q, k, v))
    assert (dq.stride(), dk.stride()) == (q.stride(), k.stride())


def test_no_lse_without_gradients(fake):
    q, k, v = (tensor.requires_grad_() for tensor in dense("cpu"))
    with torch.no_grad():
        fa3.flash_attn_func(q, k, v)
    assert [plan.problem.return_lse for plan in fake.plans] == [False]
    fa3.flash_attn_func(q, k, v)
    assert [plan.problem.return_lse for plan in fake.plans] == [False, True]
    fa3.flash_attn_func(*(tensor.detach() for tensor in (q, k, v)))
    assert len(fake.plans) == 2


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_reaches_the_backward(fake, deterministic):
    inputs, one = dense("cpu"), draw(1, 5, 3, 2, 16)
    for function, tensors in (
        (fa2.flash_attn_func, inputs),
        (fa3.flash_attn_func, inputs),
        (fa2.flash_attn_qkvpacked_func, (one,)),
        (fa3.flash_attn_qkvpacked_func, (one,)),
        (partial(fa2.flash_attn_varlen_func, **lengths("cpu"), max_seqlen_q=20, max_seqlen_k=19),
         ragged("cpu")),
    ):  # fmt: skip
        results_and_gradients(partial(function, deterministic=deterministic), tensors)
        assert fake.backward_plans[-1].problem.deterministic is deterministic


def test_backward_plans_are_remembered(fake):
    for _ in range(3):
        results_and_gradients(fa3.flash_attn_func, dense("cpu"))
    assert [len(plan.runs) for plan in fake.backward_plans] == [3]


def test_the_simulator_of_the_forward_runs_the_backward(monkeypatch):
    backend = FakeBackend()
    monkeypatch.setattr(backends, "flash2", lambda: backend)
    dispatch.forget_plans()
    q, k, v = (tensor.requires_grad_() for tensor in dense("cpu"))
    with simulate("sm_86"):
        out = fa3.flash_attn_func(q, k, v)
    out.sum().backward()
    assert backend.backward_plans[0].target.arch == "sm_86"
    dispatch.forget_plans()


def test_the_backward_may_be_another_trees(fake, monkeypatch):
    hopper = FakeBackend("hopper")
    monkeypatch.setattr(backends, "hopper", lambda: hopper)
    q, k, v = (tensor.requires_grad_() for tensor in dense("cpu"))

    def attention(backward_backend: str | None) -> Tensor:
        return autograd.attention(forward_call(q, k, v, backward_backend=backward_backend))[0]

    with simulate("sm_90a"):
        attention("flash2").sum().backward()
        assert (len(hopper.plans), len(hopper.backward_plans), len(fake.backward_plans)) == (
            1,
            0,
            1,
        )
        attention(None).sum().backward()
        assert (len(hopper.backward_plans), len(fake.backward_plans)) == (1, 1)


def test_a_refused_backward_names_the_reason(fake):
    q, k, v = (tensor.requires_grad_() for tensor in dense("cpu"))
    out = fa3.flash_attn_func(q, k, v)
    fake.refusal = "it only goes forward"
    with pytest.raises(NotImplementedError, match="backward of bf16.*flash2: it only goes forward"):
        out.sum().backward()
