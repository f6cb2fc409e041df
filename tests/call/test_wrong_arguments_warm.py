"""As test_wrong_arguments.py, on the way that CUDA tensors take: there a key of the arguments is
built before any check, and a call that was seen before is not checked again. Tensors pretend to be
on a GPU, and plans compute nothing."""

from __future__ import annotations

from typing import Any

import inputs
import pytest
import torch
from fakes import FakeBackend, FakeBackwardPlan, FakePlan, pretend_cuda
from test_wrong_arguments import described, problem_with, wrong_values
from torch import Tensor
from wrong_argument_cases import FUNCTIONS, Case

from flash_attn_interface._common.ask.call import Tensors
from flash_attn_interface.call import backends, dispatch

CASES = [
    case
    for case in FUNCTIONS
    if any(part in case.name for part in ("flash_attn", "kvcache"))
    and not any(part in case.name for part in ("explain", "combine"))
]


def forward(plan: FakePlan, tensors: Tensors, *others: Any) -> Any:
    p, q = plan.problem, tensors.q
    return q.new_zeros(*q.shape[:-1], p.head_dim_v), torch.zeros(p.lse_shape), None


@pytest.fixture
def gpu(monkeypatch) -> None:
    draw = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *sizes, device, **o: draw(*sizes, **o))
    monkeypatch.setattr(backends, "flash2", lambda: FakeBackend())
    monkeypatch.setattr(backends, "hopper", lambda: None)
    monkeypatch.setattr(dispatch, "device_of", lambda tensor: dispatch.Device((8, 0), 0))
    monkeypatch.setattr(FakePlan, "run", forward)
    monkeypatch.setattr(FakeBackwardPlan, "run", lambda plan, *tensors: torch.zeros(1))
    dispatch.forget_plans()
    yield
    dispatch.forget_plans()


def on_gpu(value: Any) -> Any:
    """Where it can pretend to be."""
    plain = type(value) is Tensor and not (value.is_nested or value.is_meta)
    return pretend_cuda(value)[0] if plain and value.layout is torch.strided else value


def raised(case: Case, arguments: dict[str, Any]) -> BaseException | None:
    try:
        case.call(arguments)
    except BaseException as error:
        return error
    return None


WARM = 0.25  # of the values, drawn: the suite has other things to do
EQUAL_IN_A_KEY = (True, False, 0.0)
"""A warm call takes these for the numbers that they equal, which is what they mean."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_wrong_argument_is_named_cold_and_warm(case: Case, gpu) -> None:
    originals = case.good()
    good = {name: on_gpu(value) for name, value in originals.items()}
    complaints = []
    for name in case.parameters():
        for value in wrong_values(name, originals.get(name)):
            arguments = {**good, name: on_gpu(value)}
            dispatch.forget_plans()
            cold = raised(case, arguments)
            if cold is None:
                continue
            if found := problem_with(cold, [name]):
                complaints.append(f"{name}={described(value)}: {found}: {cold!r:.200}")
            equal = any(value is x or repr(value) == repr(x) for x in EQUAL_IN_A_KEY)
            if equal or inputs.SEEDS.random() > WARM:
                continue
            case.call(good)
            warm = raised(case, arguments)
            if type(warm) is not type(cold):
                complaints.append(f"{name}={described(value)}: cold {cold!r:.100}, warm {warm!r}")
    assert not complaints, "\n" + "\n".join(complaints)
