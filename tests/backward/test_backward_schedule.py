"""Which CTA of the backward has which query heads, and sums of dK and dV over CTAs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cases
import pytest
import torch
from cases import Case, on_both
from conftest import Runner
from test_backward import Call, PlanInOrder, PlanWithCopies, check
from torch import Tensor

from flash_attn_interface._common.ask.backward_problem import BackwardProblem
from flash_attn_interface._common.ask.problem import Problem
from flash_attn_interface._flash2 import bwd_order, bwd_schedule
from flash_attn_interface._flash2.bwd import BackwardPlan
from flash_attn_interface._flash2.bwd_schedule import BackwardSchedule

H100_SMS = 132


def schedule(
    heads: tuple[int, int, int],
    seqlen: int,
    batch: int,
    causal: bool = True,
    varlen: bool = False,
    deterministic: bool = False,
    ordered: bool = False,
    head_dim: int = 128,
) -> BackwardSchedule:
    """Of equal head dims on an H100."""
    total = batch * seqlen
    forward = Problem(
        "bf16", head_dim, head_dim, *heads, batch, seqlen, seqlen, total, total, 1.0,
        varlen, varlen,
        causal=causal, window_right=0 if causal else -1,
    )  # fmt: skip
    strides = [(0, 0, 0)] * 5
    problem = BackwardProblem(forward, *strides, deterministic=deterministic)
    kernel = bwd_order.backward_specs(problem, "sm_90", ordered=ordered)[1]
    return bwd_schedule.schedule(problem, kernel, H100_SMS)


@pytest.mark.parametrize("causal", [False, True])
def test_enough_ctas_share_no_head(causal: bool):
    for heads in ((16, 16, 16), (64, 8, 8), (32, 4, 16)):
        found = schedule(heads, 4096, 8, causal)
        assert found.heads_per_cta == found.heads_per_group
        assert found.sharing_ctas(heads[0] // heads[1]) == 1


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_few_heads_of_keys_are_shared(varlen: bool, deterministic: bool):
    for heads, seqlen, batch in ((16, 8192, 2), (71, 2048, 1), (3, 1024, 1)):
        found = schedule((heads, 1, 1), seqlen, batch, True, varlen, deterministic)
        assert 1 < found.sharing_ctas(heads) < heads
        assert found.ctas_per_group == found.sharing_ctas(heads)


@pytest.mark.parametrize("heads", [(2, 1, 1), (8, 4, 4), (6, 6, 3)])
def test_query_heads_of_pairs_stay_together(heads: tuple[int, int, int]):
    """Else their dK or dV would lie in memory for every query head."""
    assert schedule(heads, 256, 1).heads_per_cta == 2


def test_ctas_of_unequal_groups():
    """12 query heads: K heads of 6, V heads of 4, CTAs of 5, 5 and 2."""
    found = replace(schedule((12, 2, 3), 256, 1), heads_per_cta=5)
    assert (found.heads_per_group, found.ctas_per_group) == (12, 3)
    assert (found.sharing_ctas(6), found.sharing_ctas(4)) == (2, 2)
    assert replace(found, heads_per_cta=4).sharing_ctas(4) == 1


def test_turns_are_of_equal_size():
    found = schedule((16, 4, 4), 2048, 8)
    turns = -(-found.k_units // found.k_units_per_turn)
    assert turns > 1 and found.k_units_per_turn * turns - found.k_units < turns


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_ordered_key_tiles_do_not_queue(head_dim: int, causal: bool):
    """All of a unit's key tiles begin at its last query tile, each some steps after the one ahead;
    so no more begin at a time than a walk has room for, wherever there are units enough.
    """
    for seqlen in (512, 1024, 2048, 4096, 8192):
        shape = ((2048 // head_dim,) * 3, seqlen, 32768 // seqlen, causal)
        found = schedule(*shape, deterministic=True, ordered=True, head_dim=head_dim)
        assert found.dq_splits == 1
        assert found.k_tiles_per_phase == found.k_tiles_per_unit, "earlier key tiles go first"
        together = -(-H100_SMS // found.k_units_per_turn)
        steps = seqlen / 64 / (2 if causal else 1)
        few = found.k_units_per_turn == found.k_units
        assert few or (together - 1) * bwd_schedule.ORDERED_STEPS_APART <= steps


@pytest.mark.sim
@pytest.mark.parametrize(
    ("deterministic", "plan_type"),
    [(False, BackwardPlan), (True, PlanWithCopies), (True, PlanInOrder)],
)
def test_memory_beyond_the_gradients(
    monkeypatch: pytest.MonkeyPatch,
    deterministic: bool,
    plan_type: type[BackwardPlan],
    record_property: Any,
):
    """The fp32 accumulators and two fp32 numbers a row.

    That of dq has dq_splits parts or, if key tiles add to it in order, one and counters; those
    of dk and dv as many as there are CTAs that share a head, fewer than the query heads that do.
    """
    case = Case(seqlen_q=256, seqlen_k=300, batch=1).with_dims(64, 128).with_heads(4, 2, 1)
    taken: list[Tensor] = []
    plans: list[BackwardPlan] = []
    allocate = BackwardPlan._empty

    def empty(plan: BackwardPlan, shape: tuple[int, ...]) -> Tensor:
        taken.append(allocate(plan, shape))
        plans.append(plan)
        return taken[-1]

    monkeypatch.setattr(BackwardPlan, "_empty", empty)
    call = Call(case, "cpu")
    call.run(Runner("sim", torch.device("cpu")), deterministic, plan_type=plan_type)
    taken_bytes = sum(tensor.nbytes for tensor in taken)
    record_property("extra_bytes", taken_bytes)
    schedule = plans[-1].schedule
    parts_k, parts_v = schedule.sharing_ctas(2), schedule.sharing_ctas(4)
    print(f"deterministic={deterministic}: {taken_bytes} bytes, {schedule}")
    rows, key_rows = case.num_heads_q * case.seqlen_q, 304
    floats = schedule.dq_splits * rows * case.head_dim_qk + 2 * rows
    floats += parts_k * case.num_heads_k * key_rows * case.head_dim_qk if parts_k > 1 else 0
    floats += parts_v * case.num_heads_v * key_rows * case.head_dim_v if parts_v > 1 else 0
    floats += rows // 16 if plan_type is PlanInOrder else 0
    assert taken_bytes == 4 * floats
    assert schedule.dq_splits == 1 or plan_type is PlanWithCopies
    assert parts_k < 2 and parts_v < 4


_CAUSAL = Case(causal=True, seqlen_q=70, seqlen_k=150, batch=2)
SHARED = [
    _CAUSAL.with_heads(4, 1, 1),
    _CAUSAL.with_heads(7, 1, 1).but(causal=False, batch=1),
    _CAUSAL.with_heads(8, 2, 4),
    _CAUSAL.with_heads(12, 2, 3).but(batch=1),
    Case(seqlen_q=70, seqlen_k=300, layout="gaps", align_bytes=2).with_heads(4, 1, 1),
    Case(causal=True, seqlen_q=90, seqlen_k=120, batch=1, dropout_p=0.2).with_heads(4, 1, 1),
    cases.VARLEN[1].with_heads(4, 1, 1),
    cases.VARLEN[9].with_heads(6, 1, 2),
    cases.VARLEN[10].with_heads(6, 2, 2),
    Case(causal=True, lengths_q=(150, 0, 270), lengths_k=(150, 3, 300), tail=9).with_heads(4, 2, 2),
    *[
        Case(causal=causal, seqlen_q=1000, seqlen_k=1000, only_gpu=True)
        .with_dims(*dims)
        .with_heads(*heads)
        for dims in [(64, 64), (64, 128), (128, 128), (256, 256)]
        for heads in [(8, 1, 1), (12, 2, 3)]
        for causal in (False, True)
    ],
]


@on_both(SHARED)
@pytest.mark.parametrize("heads_per_cta", [1, 2, 3])
def test_any_number_of_ctas_may_share_a_head(runner: Runner, case: Case, heads_per_cta: int):
    if runner.name == "sim" and heads_per_cta == 1 and case.varlen:
        pytest.skip("as with two heads")
    call = Call(case, runner.device)
    first, _ = call.run(runner, heads_per_cta=heads_per_cta)
    check(call, first)
    for _ in range(1 if runner.name == "sim" else 20):
        again, _ = call.run(runner, heads_per_cta=heads_per_cta)
        for got, want in zip(again[1:], first[1:], strict=True):
            assert torch.equal(got, want), "dk and dv are reproducible"


@on_both([SHARED[0].but(seqlen_k=300), SHARED[3], cases.VARLEN[1].with_heads(4, 1, 1)])
def test_deterministic_with_shared_heads(runner: Runner, case: Case):
    call = Call(case, runner.device)
    first, _ = call.run(runner, deterministic=True, heads_per_cta=2)
    check(call, first)
    for _ in range(1 if runner.name == "sim" else 100):
        again, _ = call.run(runner, deterministic=True, heads_per_cta=2)
        for got, want in zip(again, first, strict=True):
            assert torch.equal(got, want)
