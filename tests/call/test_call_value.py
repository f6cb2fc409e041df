"""One value carries a call: what is added to it reaches every layer, and kernels refuse it."""

from __future__ import annotations

import hopper_tree
import pytest
import torch
from asked import cache_call, forward_call
from fakes import FakeBackend, pretend_cuda, qkv

from flash_attn_interface import simulate
from flash_attn_interface._common.ask.backward_problem import BackwardProblem
from flash_attn_interface._common.ask.call import Backward, Call, Options
from flash_attn_interface._common.ask.check import check
from flash_attn_interface._common.ask.problem import Target
from flash_attn_interface._flash2 import BACKEND as FLASH2
from flash_attn_interface.call import autograd, backends, dispatch, keys

NEW = "a new feature"


@pytest.fixture
def fake(monkeypatch):
    """The only kernel tree, which has the new feature."""
    fake = FakeBackend(extra=NEW)
    monkeypatch.setattr(backends, "flash2", lambda: fake)
    monkeypatch.setattr(backends, "hopper", lambda: None)
    dispatch.forget_plans()
    yield fake
    dispatch.forget_plans()


def new_call(requires_grad: bool = False) -> Call:
    return forward_call(*(x.requires_grad_(requires_grad) for x in qkv()), extra=NEW)


def cached() -> Call:
    q, k, v = qkv()
    return cache_call(q, k, v, extra=NEW)


def test_an_added_option_reaches_forward_and_backward(fake):
    with simulate("sm_80"):
        out, _, _ = autograd.attention(new_call(requires_grad=True))
        out.float().sum().backward()
    assert [plan.problem.extra for plan in fake.plans] == [NEW]
    assert [plan.problem.forward.extra for plan in fake.backward_plans] == [NEW]
    assert NEW in fake.plans[0].problem.describe()


def test_an_added_option_reaches_the_compiled_operators(fake):
    tensors = new_call(requires_grad=True).tensors

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q, k, v):
        return autograd.attention(forward_call(q, k, v, extra=NEW))[0]

    with simulate("sm_80"):
        compiled(*tensors[:3]).float().sum().backward()
    assert {plan.problem.extra for plan in fake.plans} == {NEW}
    assert {plan.problem.forward.extra for plan in fake.backward_plans} == {NEW}


def test_an_added_option_reaches_calls_over_a_cache(fake):
    with simulate("sm_80"):
        autograd.attention(cached())
    assert [plan.problem.extra for plan in fake.cache_plans] == [NEW]


def test_an_added_option_reaches_the_compiled_operator_over_a_cache(fake):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q, k, v):
        return autograd.attention(cache_call(q, k, v, extra=NEW))[0]

    with simulate("sm_80"):
        compiled(*cached().tensors[:3])
    assert [plan.problem.extra for plan in fake.cache_plans] == [NEW]


@pytest.mark.parametrize("name", Options._fields)
def test_each_option_is_part_of_a_plans_key(name: str):
    q, k, v = pretend_cuda(*qkv())
    other = {"window_size": (3, 0), "packing": None, "backward_backend": "flash2", "extra": NEW}
    default = Options._field_defaults[name]
    value = other.get(name, not default if isinstance(default, bool) else 3)
    if name == "packing":
        value = "another"
    dout, lse = v.new_zeros(2, 5, 4, 24), v.new_zeros(2, 4, 5)
    backward = Backward(*pretend_cuda(dout, dout, lse, q, k, v))
    plain, changed = forward_call(q, k, v), forward_call(q, k, v, **{name: value})
    assert keys.of_forward(plain, False)[1] != keys.of_forward(changed, False)[1]
    assert keys.of_backward(plain, backward)[1] != keys.of_backward(changed, backward)[1]
    plain, changed = cache_call(q, k, v), cache_call(q, k, v, **{name: value})
    assert keys.of_cache(plain)[1] != keys.of_cache(changed)[1]


def every_backend() -> list[tuple[backends.Backend, Target | None]]:
    hopper = hopper_tree.load().BACKEND
    return [
        (FLASH2, Target("sm_80", 0)),
        (hopper, Target("sm_90a", 0)),
        (backends.REFERENCE, None),
    ]


def test_every_backend_refuses_a_feature_that_it_does_not_list():
    call = new_call()
    known = check(call._replace(options=Options()))
    problem = check(call)
    dout = torch.zeros(2, 5, 4, 24, dtype=torch.bfloat16)
    tensors = Backward(dout, dout, torch.zeros(2, 4, 5), *qkv())
    for backend, target in every_backend():
        assert backend.refuses_forward(known, target) is None
        assert NEW in backend.refuses_forward(problem, target)
        backward = BackwardProblem.of(problem, call, tensors)
        assert NEW in backend.refuses_backward(backward, target)
        assert backend.refuses_forward(check(cached()), target) is not None


@pytest.mark.parametrize("arch", [None, "sm_80"])
def test_a_call_with_a_feature_that_nothing_serves_is_an_error(arch: str | None):
    for call in (new_call(), cached()):
        if arch is None:
            with pytest.raises(NotImplementedError, match=NEW):
                autograd.attention(call)
        else:
            with simulate(arch), pytest.raises(NotImplementedError, match=NEW):
                autograd.attention(call)
