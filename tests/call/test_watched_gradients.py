"""Gradients and counted operations of calls that somebody watches (test_watchers.py): by modes,
torch.func, selective checkpointing, forward-mode AD."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cache_cases import CacheCase
from fakes import FakeBackend
from public_calls import FUNCTIONS, Operators, cache_call, every_function
from test_autograd import CALLS, dense
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import flash_attn as fa2
import flash_attn_interface as fa3
from flash_attn_interface import simulate
from flash_attn_interface.call import backends, dispatch, simulation

BF16 = torch.bfloat16


# ---- gradients ---------------------------------------------------------------------------------


def gradients_of(function: Callable[..., Any], inputs: list[Tensor], dout: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return list(torch.autograd.grad(function(*leaves), leaves, dout))


def first_result(function: Callable[..., Any], *inputs: Tensor) -> Tensor:
    results = function(*inputs)
    return results if isinstance(results, Tensor) else results[0]


def close(got: Tensor, want: Tensor) -> None:
    """The reference's two backwards round differently."""
    torch.testing.assert_close(got, want, rtol=2.0**-6, atol=2.0**-6)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_gradients_under_modes(device, call):
    function, inputs, _, _ = call(device)
    function = partial(first_result, function)
    dout = torch.randn_like(function(*inputs))
    want = gradients_of(function, inputs, dout)
    mode = Operators()
    with mode:
        got = gradients_of(function, inputs, dout)
    assert len(mode.names) == 2 and "attention_backward" in mode.names[1]
    for mine, theirs in zip(got, want, strict=True):
        close(mine, theirs)


ARRIVALS: dict[str, Callable[[Tensor], Tensor]] = {
    "negated": lambda x: torch._neg_view(-x),
    "collective": AsyncCollectiveTensor,
    "zero": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device),
    "expanded": lambda x: x[..., :1].expand_as(x),
}


@pytest.mark.parametrize("arrival", ARRIVALS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_gradients_that_arrive_in_disguise(device, call, arrival: str):
    """The forward saw plain tensors; the backward gets what other operations made."""
    function, inputs, _, _ = call(device)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    results = function(*leaves)
    if isinstance(results, Tensor):
        results = (results,)
    results = results[:2]  # not s_dmask
    douts = [ARRIVALS[arrival](torch.randn_like(x)) for x in results]
    plain = [(x + 0).contiguous() if arrival != "zero" else torch.zeros_like(x) for x in douts]
    got = torch.autograd.grad(results, leaves, douts, retain_graph=True)
    want = torch.autograd.grad(results, leaves, plain)
    for mine, theirs in zip(got, want, strict=True):
        assert type(mine) is Tensor
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_a_mode_sees_a_backward_alone(device):
    """A counter or a policy that is entered after the forward."""
    q, k, v = (tensor.requires_grad_() for tensor in dense(device))
    out = fa2.flash_attn_func(q, k, v, causal=True)
    with Operators() as mode:
        out.sum().backward()
    if device.type != "cpu" or simulation.simulated_arch():  # of the reference it sees the parts
        assert mode.names == ["flash_attn_interface.attention_backward.default"]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_torch_func_grad(device, call):
    function, inputs, _, _ = call(device)
    function = partial(first_result, function)
    dout = torch.randn_like(function(*inputs))
    want = gradients_of(function, inputs, dout)
    _, pullback = torch.func.vjp(function, *inputs)
    for mine, theirs in zip(pullback(dout), want, strict=True):
        close(mine, theirs)


def test_gradients_per_sample(device):
    """vmap over grad, as differential privacy does it."""
    q, k, v = dense(device)
    several = torch.stack([q, 0.5 * q])

    def loss(x: Tensor) -> Tensor:
        return fa2.flash_attn_func(x, k, v, causal=True).float().square().sum()

    got = torch.vmap(torch.func.grad(loss))(several)
    want = torch.stack([torch.func.grad(loss)(one) for one in several])
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_the_options_of_a_watched_call_reach_its_backward(monkeypatch):
    backend, hopper = FakeBackend(), FakeBackend("hopper")
    monkeypatch.setattr(backends, "flash2", lambda: backend)
    monkeypatch.setattr(backends, "hopper", lambda: hopper)
    dispatch.forget_plans()
    tensors = [tensor.requires_grad_() for tensor in dense("cpu")]
    with simulate("sm_90a"), Operators():
        fa3.flash_attn_f3b2_func(*tensors, deterministic=True).sum().backward()
    assert (len(hopper.plans), len(hopper.backward_plans)) == (1, 0)
    assert [plan.problem.deterministic for plan in backend.backward_plans] == [True]
    dispatch.forget_plans()


def test_dropout_of_a_watched_call_is_replayed(device):
    q, k, v = dense(device)
    dout = torch.randn(*q.shape[:-1], v.shape[-1], dtype=BF16, device=device)
    function = partial(fa2.flash_attn_func, dropout_p=0.3)
    torch.manual_seed(5)
    want = gradients_of(function, [q, k, v], dout)
    torch.manual_seed(5)
    with Operators():
        got = gradients_of(function, [q, k, v], dout)
    for mine, theirs in zip(got, want, strict=True):
        close(mine, theirs)


def test_selective_checkpointing_saves_the_forward(device):
    """With the policy that everybody writes: save attention, compute the rest again."""

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if "flash_attn" in str(operator):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    q, k, v = (tensor.requires_grad_() for tensor in dense(device))

    def block(q: Tensor) -> Tensor:
        return fa2.flash_attn_func(q * 1, k, v, causal=True) * 2

    with Operators() as mode:
        out = checkpoint(
            block,
            q,
            use_reentrant=False,
            context_fn=partial(create_selective_checkpoint_contexts, policy),
        )
        out.sum().backward()
    assert sum("forward" in name for name in mode.names) == 1
    got, q.grad = q.grad, None
    block(q).sum().backward()
    close(got, q.grad)


def test_second_derivatives_under_transforms_are_refused(device):
    q, k, v = dense(device)

    def loss(x: Tensor) -> Tensor:
        return fa2.flash_attn_func(x, k[:, :, :1], v).float().sum()

    twice = torch.func.grad(lambda x: torch.func.grad(loss)(x).float().sum())
    with pytest.raises(RuntimeError, match="differentiated once more"):
        twice(q[:, :, :1])


def test_forward_mode_goes_through_the_reference_only(device, request):
    q, k, v = dense(device)
    tangent = torch.randn_like(q)
    if "cpu" not in request.node.name:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(q, tangent)
            with pytest.raises(NotImplementedError, match="forward-mode AD"):
                fa2.flash_attn_func(dual, k, v)
            fa2.flash_attn_func(q, k, v)
        return
    with forward_ad.dual_level():
        out = fa2.flash_attn_func(forward_ad.make_dual(q, tangent), k, v)
        change = forward_ad.unpack_dual(out).tangent
    weights = torch.randn_like(change)
    (dq,) = gradients_of(lambda x: fa2.flash_attn_func(x, k, v), [q], weights)
    forwards = (change.double() * weights.double()).sum()
    backwards = (dq.double() * tangent.double()).sum()
    torch.testing.assert_close(forwards, backwards, rtol=0.05, atol=0.5)


@every_function
@pytest.mark.parametrize("transform", ["jvp", "jvp-vmap", "jacfwd"])
def test_forward_mode_transforms_are_refused(device, make, transform: str):
    function, arguments = make(device)
    tensors = arguments.get("tensors", arguments)
    first = next(name for name in ("q", "qkv", "out_partial") if name in tensors)

    def of_first(x: Tensor) -> Any:
        changed = tensors | {first: x}
        results = function(tensors=changed) if "tensors" in arguments else function(**changed)
        return results if isinstance(results, Tensor) else results[0]

    x = tensors[first]
    with pytest.raises(NotImplementedError, match="forward-mode AD"):
        if transform == "jvp":
            torch.func.jvp(of_first, (x,), (x,))
        elif transform == "jacfwd":
            torch.func.jacfwd(lambda scale: of_first(x * scale))(torch.ones((), device=device))
        else:
            torch.func.jvp(torch.vmap(of_first), (torch.stack([x]),), (torch.stack([x]),))


def test_dropout_under_vmap_is_refused(device):
    q, k, v = dense(device)
    with pytest.raises(NotImplementedError, match="dropout_p > 0 under torch.vmap"):
        torch.vmap(lambda x: fa2.flash_attn_func(x, k, v, dropout_p=0.1))(torch.stack([q, q]))


def test_combine_has_a_gradient_everywhere(device):
    out = torch.randn(3, 2, 7, 2, 24, device=device, requires_grad=True)
    lse = torch.randn(3, 2, 7, 2, device=device)
    lse[1, 0] = float("-inf")
    lse.requires_grad_()
    merged, total = fa3.flash_attn_combine(out, lse)
    weights, lse_weights = torch.randn_like(merged), torch.randn_like(total)
    got = torch.autograd.grad([merged, total], [out, lse], [weights, lse_weights])
    exact = [tensor.detach().double().requires_grad_() for tensor in (out, lse)]
    results = [
        (torch.softmax(exact[1], 0).unsqueeze(-1) * exact[0]).sum(0),
        torch.logsumexp(exact[1], 0),
    ]
    want = torch.autograd.grad(results, exact, [weights.double(), lse_weights.double()])
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)


@every_function
def test_alibi_slopes_have_no_gradient_and_say_so(device, make):
    function, arguments = make(device)
    if "alibi_slopes" in arguments:
        slopes = arguments["alibi_slopes"].requires_grad_()
        with pytest.raises(NotImplementedError, match="alibi_slopes requires a gradient"):
            function(**arguments)
        with pytest.raises(NotImplementedError, match="alibi_slopes requires a gradient"):
            arguments["q"].requires_grad_()
            operation = torch.ops.flash_attn._flash_attn_forward
            operation(*(arguments[name] for name in "qkv"), 0.0, 1.0, False, -1, -1, 0.0, slopes,
                      False)  # fmt: skip
        with torch.no_grad():
            assert not function(**arguments).requires_grad
    elif "alibi_slopes" in arguments.get("tensors", {}):
        arguments["tensors"]["alibi_slopes"].requires_grad_()
        with pytest.raises(NotImplementedError, match="no backward"):
            function(**arguments)[0].sum().backward()


# ---- counted operations --------------------------------------------------------------------------


def counted(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return sum(
        count
        for operator, count in counter.get_flop_counts().get("Global", {}).items()
        if "flash_attn" in str(operator)
    )


def test_flops_of_a_forward_and_a_backward(device):
    q, k, v = dense(device)
    pairs = 2 * 19 * 23 * 4
    assert counted(lambda: fa2.flash_attn_func(q, k, v, causal=True)) == 2 * pairs * (24 + 40)
    q.requires_grad_()
    both = counted(lambda: fa2.flash_attn_func(q, k, v).sum().backward())
    assert both == 2 * pairs * (24 + 40) + 2 * pairs * (3 * 24 + 2 * 40)


def test_flops_follow_the_lengths(device):
    function, arguments = FUNCTIONS["fa2-varlen"](device)
    pairs = 4 * (20 * 9 + 0 * 12 + 17 * 19)
    assert counted(lambda: function(**arguments)) == 2 * pairs * (24 + 40)
    function, arguments = FUNCTIONS["fa3-varlen"](device)
    pairs = 4 * (20 * 4 + 0 * 12 + 11 * 19)
    assert counted(lambda: function(**arguments)) == 2 * pairs * (24 + 40)
    function, arguments = FUNCTIONS["fa2-paged"](device)
    assert counted(lambda: function(**arguments)) == 2 * 4 * (5 * 20 + 7 * 31) * (24 + 24)


@every_function
def test_flops_of_every_function(device, make):
    function, arguments = make(device)
    count = counted(lambda: function(**arguments))
    assert (count > 0) == ("out_partial" not in arguments)


def test_flops_of_a_cache(device):
    case = CacheCase(seqlens=(3, 33), seqlen_new=2, seqlen_q=2)
    function, arguments = cache_call(case, device)
    pairs = case.num_heads_q * 2 * (5 + 35)
    want = 2 * pairs * (case.head_dim_qk + case.head_dim_v)
    assert counted(lambda: function(**arguments)) == want
