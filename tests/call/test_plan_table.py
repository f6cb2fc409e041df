"""The table of plans: who gets which, how many there are, and which go first."""

from __future__ import annotations

import gc
import sys
import threading
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from fakes import FakeBackend

import flash_attn as fa2
import flash_attn_interface as fa3
from flash_attn_interface import simulate
from flash_attn_interface.call import backends, dispatch, plans
from flash_attn_interface.call.plans import MAX_PLANS, PlanTable

BF16 = torch.bfloat16
MIB = 2**20


def use(table: PlanTable, key: Any) -> Any:
    """One call: the plan that it ran."""
    slot, plan = table.take(key, object)
    slot.idle.append(plan)
    return plan


def test_equal_keys_share_a_plan():
    table = PlanTable()
    assert use(table, (1, "a")) is use(table, (1, "a"))
    assert use(table, (1, "b")) is not use(table, (1, "a"))
    assert len(table) == 2


def test_a_plan_in_use_is_not_handed_out_again():
    table = PlanTable()
    slot, first = table.take("key", object)
    same, second = table.take("key", object)
    assert same is slot and second is not first
    for plan in (first, second):
        slot.idle.append(plan)
    assert {use(table, "key"), table.take("key", object)[1]} <= {first, second}
    assert len(table) == 2


def test_the_least_recently_used_go_first():
    table = PlanTable(bound=8)
    for key in range(8):
        use(table, key)
    kept = use(table, 0)
    for key in range(8, 13):  # each makes one plan, and one in eight goes when there are too many
        use(table, key)
        use(table, 0)
        assert len(table) <= 8
    assert table.find(0) is not None and use(table, 0) is kept
    assert [key for key in range(13) if table.find(key) is None] == [1, 2, 3, 4, 5, 6]


def test_a_plan_may_be_evicted_while_it_runs():
    table = PlanTable(bound=2)
    slot, plan = table.take("running", object)
    for key in range(4):
        use(table, key)
    slot.idle.append(plan)
    assert table.find("running") is None and len(table) <= 2
    assert use(table, "running") is not plan


def test_clear():
    table = PlanTable()
    plan = use(table, 1)
    table.clear()
    assert len(table) == 0 and use(table, 1) is not plan


def test_a_plan_that_cannot_be_made_leaves_nothing():
    table = PlanTable()

    def fail() -> None:
        raise NotImplementedError

    with pytest.raises(NotImplementedError):
        table.take("key", fail)
    assert len(table) == 0 and table.find("key") is None


def test_a_run_that_fails_gives_its_plan_back(monkeypatch):
    backend = FakeBackend()
    monkeypatch.setattr(backends, "flash2", lambda: backend)
    dispatch.forget_plans()
    q = torch.randn(1, 4, 1, 16).to(BF16)
    with simulate("sm_80"):
        fa2.flash_attn_func(q, q, q)
        run = backend.plans[0].run
        backend.plans[0].run = lambda *tensors: 1 / 0  # type: ignore[method-assign]
        with pytest.raises(ZeroDivisionError):
            fa2.flash_attn_func(q, q, q)
        backend.plans[0].run = run  # type: ignore[method-assign]
        fa2.flash_attn_func(q, q, q)
    assert len(backend.plans) == 1
    dispatch.forget_plans()


def test_threads_at_once_never_share_a_plan():
    """Many threads and keys; a plan that two of them run would count its own runs wrongly."""
    table = PlanTable(bound=16)
    errors: list[Any] = []
    begin = threading.Barrier(8)

    def work(seed: int) -> None:
        begin.wait()
        for step in range(2000):
            slot, plan = table.take((seed * step) % 24, lambda: {"running": False})
            if plan["running"]:
                errors.append((seed, step))
            plan["running"] = True
            plan["running"] = False
            slot.idle.append(plan)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(table) <= 16


def _calls() -> dict[str, Callable[[float], Any]]:
    """What makes another plan of the same kernels for each scale; the costliest plans there are."""
    q = torch.randn(1, 2, 1, 32).to(BF16)
    ends = torch.tensor([0, 2], dtype=torch.int32)
    table = torch.zeros(1, 2, dtype=torch.int32)

    def train(softmax_scale: float) -> None:
        leaf = q[0].clone().requires_grad_()
        fa2.flash_attn_varlen_func(
            leaf, leaf, leaf, ends, ends, 2, 2, softmax_scale=softmax_scale
        ).sum().backward()

    def decode(softmax_scale: float) -> None:
        one = q[:, :1]
        fa3.flash_attn_with_kvcache(
            one, q.clone(), q.clone(), one, one, cache_seqlens=1, page_table=table,
            softmax_scale=softmax_scale, num_splits=2,
        )  # fmt: skip

    return {
        "forward": lambda scale: fa3.flash_attn_func(q, q, q, softmax_scale=scale),
        "train": train,
        "decode": decode,
    }


@pytest.mark.sim
@pytest.mark.parametrize("name", ["forward", "train", "decode"])
def test_a_full_table_takes_less_than_32_mib(name: str):
    call = _calls()[name]
    with simulate("sm_80"):
        call(0.5)  # compiles
        gc.collect()
        tracemalloc.start()
        before, made = tracemalloc.get_traced_memory()[0], len(plans.plans)
        for step in range(30):
            call(1.0 + step)
        gc.collect()
        size = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
    count = len(plans.plans) - made
    assert count >= 30
    # What a plan remembers of tensors that do not overlap, on a GPU alone.
    hashes = {hash((first,) * 6) for first in range(dispatch._MAX_APART)}
    remembered = sys.getsizeof(hashes) + sum(map(sys.getsizeof, hashes))
    each = size / count + (remembered if name == "decode" else 0)
    assert each * MAX_PLANS < 32 * MIB
    dispatch.forget_plans()


def test_shapes_that_never_repeat_stay_within_the_bound(monkeypatch):
    monkeypatch.setattr(backends, "flash2", FakeBackend)
    monkeypatch.setattr(plans.plans, "bound", 20)
    dispatch.forget_plans()
    with simulate("sm_80"):
        for length in range(1, 60):
            q = torch.randn(1, length, 1, 8).to(BF16)
            partial(fa2.flash_attn_func, causal=True)(q, q, q)
            assert len(plans.plans) <= 20
    dispatch.forget_plans()
