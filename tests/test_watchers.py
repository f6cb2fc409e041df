"""Tensors that somebody watches: subclasses, modes, transforms, traces, pending negations.

Every public function either gives what it gives for plain tensors, or says why not. `cpu` runs the
reference, `sim` the dispatch of kernels (by the reference as well), `gpu` kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from cache_cases import CacheCase, call, make_cache
from conftest import _runner
from fakes import FakeBackend
from test_autograd import CALLS, dense, draw, ends
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import flash_attn as fa2
import flash_attn_interface as fa3
from flash_attn_interface import backends, dispatch, simulate, traced

BF16 = torch.bfloat16


@pytest.fixture(params=["cpu", "sim", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch) -> Iterator[torch.device]:
    """sim: kernels are asked for, a stand-in computes them with the reference."""
    dispatch.forget_plans()
    if request.param == "sim":
        monkeypatch.setattr(backends, "flash2", FakeBackend)
    with simulate("sm_80") if request.param == "sim" else nullcontext():
        yield _runner(request.param).device
    dispatch.forget_plans()


# ---- every public function ---------------------------------------------------------------------

Made = tuple[Callable[..., Any], dict[str, Any]]
"""(function, all its arguments by name). Results are compared, and the caches after the call."""

NAMES = {"fa2-kvpacked": ("q", "kv"), "fa2-varlen-kvpacked": ("q", "kv")}


def _of_autograd(name: str, device: torch.device) -> Made:
    function, inputs, _, _ = CALLS[name](device)
    names = ("qkv",) if len(inputs) == 1 else NAMES.get(name, ("q", "k", "v"))
    return function.func, dict(zip(names, inputs, strict=True)) | function.keywords


def _f3b2(name: str, device: torch.device) -> Made:
    _, arguments = _of_autograd(name.replace("f3b2", "fa3"), device)
    function = fa3.flash_attn_f3b2_varlen_func if "varlen" in name else fa3.flash_attn_f3b2_func
    return function, arguments


def _paged(device: torch.device) -> Made:
    pages = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32, device=device)
    return fa2.flash_attn_varlen_func, {
        "q": draw(12, 4, 24, device=device),
        "k": draw(4, 16, 2, 24, device=device),
        "v": draw(4, 16, 2, 24, device=device),
        "cu_seqlens_q": ends(0, 5, 12, device=device),
        "cu_seqlens_k": ends(0, 20, 51, device=device),
        "max_seqlen_q": 7,
        "max_seqlen_k": 31,
        "causal": True,
        "block_table": pages,
    }


def _cache(case: CacheCase, device: torch.device) -> Made:
    return partial(call, case), {"tensors": make_cache(case, str(device))}


def _combine(device: torch.device) -> Made:
    parts = {
        "out_partial": torch.randn(3, 2, 7, 2, 24, device=device),
        "lse_partial": torch.randn(3, 2, 7, 2, device=device),
    }
    return fa3.flash_attn_combine, parts


APPEND = CacheCase(seqlens=(3, 33), seqlen_new=2, seqlen_q=2, causal=True, rotary_dim=16)
FUNCTIONS: dict[str, Callable[[torch.device], Made]] = {
    **{name: partial(_of_autograd, name) for name in CALLS},
    "fa2-alibi": lambda device: (
        fa2.flash_attn_func,
        {
            **dict(zip("qkv", dense(device), strict=True)),
            "alibi_slopes": torch.rand(4, device=device),
        },
    ),
    "f3b2": partial(_f3b2, "f3b2"),
    "f3b2-varlen": partial(_f3b2, "f3b2-varlen"),
    "fa2-paged": _paged,
    "fa3-kvcache": partial(_cache, CacheCase(seqlens=(3, 33))),
    "fa3-kvcache-append": partial(_cache, APPEND),
    "fa3-kvcache-ragged-pages": partial(
        _cache, APPEND.but(lengths_q=(1, 3), lengths_new=(2, 1), page_size=16, qv=True)
    ),
    "fa2-kvcache": partial(_cache, CacheCase(seqlens=(3, 33), alibi=True)),
    "fa2-kvcache-append": partial(_cache, APPEND.but(alibi=True, leftpad=(1, 2), batch_idx=True)),
    "combine": _combine,
}
every_function = pytest.mark.parametrize("make", FUNCTIONS.values(), ids=FUNCTIONS)


def mapped(change: Callable[[Tensor], Tensor], made: Made) -> Made:
    """With a changed copy of every tensor."""
    function, arguments = made

    def change_one(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: change_one(item) for name, item in value.items()}
        return change(value.clone()) if isinstance(value, Tensor) else value

    return function, change_one(arguments)


def run(made: Made) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Results, and the caches after the call."""
    function, arguments = made
    results = function(**arguments)
    tensors = arguments.get("tensors", {})
    caches = {name: tensors[name] for name in ("k_cache", "v_cache") if name in tensors}
    return [results] if isinstance(results, Tensor) else list(results), caches


def steps(tensor: Tensor) -> list[int]:
    """Strides that matter."""
    return [step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def check_same(made: Made, watched: Made, watching: Any = None) -> None:
    want, caches = run(mapped(lambda tensor: tensor, made))
    with nullcontext() if watching is None else watching:
        got, changed = run(watched)
    for mine, theirs in zip(got, want, strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert steps(mine) == steps(theirs)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    for name, cache in caches.items():
        torch.testing.assert_close(changed[name], cache, rtol=0, atol=0, equal_nan=True)


class Operators(TorchDispatchMode):
    """Remembers whose operators it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if "flash_attn" in str(function):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Likewise."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Subclass(Tensor):
    """Knows nothing but its type."""


@every_function
def test_plain_tensors_take_the_direct_way(device, make, monkeypatch):
    def no_operators(*arguments: Any, **keywords: Any) -> Any:
        raise AssertionError("an operator was called")

    for operation in ("_flash_attn_forward", "_flash_attn_varlen_forward", "attention_forward"):
        monkeypatch.setattr(traced, operation, no_operators)
    with Watch("flash_attn") as seen:
        run(make(device))
        torch.set_default_device(device)
        try:
            run(make(device))
        finally:
            torch.set_default_device(None)
    assert not seen.names


class Watch:
    """The operators that torch's profiler sees, which watches without changing anything."""

    def __init__(self, part: str) -> None:
        self._part = part
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.names: list[str] = []

    def __enter__(self) -> Watch:
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        self.names = [event.name for event in self._profile.events() if self._part in event.name]


@every_function
def test_dispatch_modes_see_an_operator(device, make):
    mode = Operators()
    check_same(made := make(device), mapped(lambda tensor: tensor, made), mode)
    assert len(mode.names) == 1


@every_function
def test_function_modes_see_an_operator(device, make):
    mode = Functions()
    check_same(made := make(device), mapped(lambda tensor: tensor, made), mode)
    assert any("flash_attn" in name for name in mode.names)


@every_function
def test_subclasses(device, make):
    check_same(made := make(device), mapped(lambda tensor: tensor.as_subclass(Subclass), made))


@every_function
def test_results_of_collectives_are_waited_for(device, make):
    made = make(device)
    check_same(made, mapped(AsyncCollectiveTensor, made))


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"])
def test_lengths_from_collectives_are_waited_for(device, name: str):
    made = function, arguments = FUNCTIONS["fa3-varlen"](device)
    watched = dict(arguments) | {name: AsyncCollectiveTensor(arguments[name].clone())}
    check_same(made, (function, watched))


@every_function
def test_a_pending_negation_is_applied(device, make):
    def negated(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch._neg_view(tensor.neg())

    made = make(device)
    watched = mapped(negated, made)
    if "k" in made[1].get("tensors", {}):
        with pytest.raises(NotImplementedError, match=r"pass k_cache.resolve_neg\(\)"):
            run(watched)
        for name in ("k_cache", "v_cache"):
            watched[1]["tensors"][name] = watched[1]["tensors"][name].resolve_neg()
    check_same(made, watched)


@every_function
def test_meta_and_fake_tensors_have_the_shapes_of_the_results(device, make):
    from torch._subclasses import FakeTensorMode

    made = make(device)
    want, _ = run(mapped(lambda tensor: tensor, made))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake, _ = run(mapped(mode.from_tensor, made))
    meta, _ = run(mapped(lambda tensor: tensor.to("meta"), made))
    for mine, theirs in zip((*fake, *meta), (*want, *want), strict=True):
        assert mine.is_meta or mine.device.type == device.type
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert steps(mine) == steps(theirs)


@every_function
def test_one_meta_tensor_among_others_is_an_error(device, make):
    function, arguments = make(device)
    tensors = arguments.get("tensors", arguments)
    for name, value in tensors.items():
        if isinstance(value, Tensor) and name != "qkv":
            changed = tensors | {name: value.to("meta")}
            changed = {"tensors": changed} if "tensors" in arguments else changed
            with pytest.raises(ValueError, match="on meta|on cpu|on cuda"):
                function(**changed)


@every_function
def test_make_fx_records_an_operator(device, make):
    function, arguments = made = make(device)
    if "tensors" in arguments:
        tensors, others = arguments["tensors"], {}
    else:
        tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
        others = {name: x for name, x in arguments.items() if not isinstance(x, Tensor)}
    length = tensors.get("max_seqlen_q")

    def of_list(*values: Tensor) -> Any:
        named = dict(zip(names, values, strict=True)) | ({"max_seqlen_q": length} if length else {})
        return function(tensors=named) if "tensors" in arguments else function(**named, **others)

    names = [name for name, x in tensors.items() if isinstance(x, Tensor)]
    graph = make_fx(of_list)(*(tensors[name].clone() for name in names))
    targets = [str(node.target) for node in graph.graph.nodes]
    assert sum("flash_attn" in target for target in targets) == 1
    want, _ = run(mapped(lambda tensor: tensor, made))
    got = graph(*(tensors[name].clone() for name in names))
    for mine, theirs in zip([got] if isinstance(got, Tensor) else got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@every_function
def test_jit_trace_records_an_operator(device, make):
    function, arguments = make(device)
    tensors = arguments.get("tensors", arguments)
    first = next(name for name in ("q", "qkv", "out_partial") if name in tensors)

    def of_first(x: Tensor) -> Any:
        changed = {name: y.clone() if isinstance(y, Tensor) else y for name, y in tensors.items()}
        changed[first] = x
        return function(tensors=changed) if "tensors" in arguments else function(**changed)

    with torch.no_grad():
        recorded = torch.jit.trace(of_first, (tensors[first],), check_trace=False)
        assert "flash_attn" in str(recorded.graph)
        other = torch.randn_like(tensors[first])
        for mine, theirs in zip(recorded(other), of_first(other), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@every_function
def test_vmap_is_a_loop(device, make):
    function, arguments = make(device)
    tensors = arguments.get("tensors", arguments)
    first = next(name for name in ("q", "qkv", "out_partial") if name in tensors)

    def of_first(x: Tensor) -> Any:
        changed = tensors | {first: x}
        results = function(tensors=changed) if "tensors" in arguments else function(**changed)
        return results if isinstance(results, Tensor) else results[0]

    if "k" in tensors and "k_cache" in tensors:
        with pytest.raises(NotImplementedError, match="under torch.vmap"):
            torch.vmap(of_first)(torch.stack([tensors[first]] * 2))
        return
    several = torch.stack([tensors[first], torch.randn_like(tensors[first])])
    got = torch.vmap(of_first)(several)
    want = torch.stack([of_first(one) for one in several])
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("make", [FUNCTIONS["fa3-kvcache"], FUNCTIONS["fa2-kvcache-append"]])
def test_caches_have_no_gradient_under_transforms(device, make):
    function, arguments = make(device)
    tensors = arguments["tensors"]

    def of_q(q: Tensor) -> Tensor:
        return function(tensors=tensors | {"q": q})[0].float().sum()

    with pytest.raises(NotImplementedError, match="no backward"):
        torch.func.grad(of_q)(tensors["q"])


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
    function, arguments = _cache(case, device)
    pairs = case.num_heads_q * 2 * (5 + 35)
    want = 2 * pairs * (case.head_dim_qk + case.head_dim_v)
    assert counted(lambda: function(**arguments)) == want
