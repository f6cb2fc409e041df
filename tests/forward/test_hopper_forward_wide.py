"""The Hopper forward for a head_dim_v over 256 beside a wide q, fwd_wide.cu, on the simulator and
on an H100, against the float64 reference.
"""

from __future__ import annotations

from typing import Any

import calls
import cases
import oracle
import pytest
import test_hopper_forward
import torch
from cases import Case
from conftest import Runner
from inputs import make_inputs
from test_hopper_forward import ARCH, TREE, check_case, on_hopper

# Fixtures.
hopper_plans, machine = test_hopper_forward.hopper_plans, test_hopper_forward.machine

PAIRS = [(512, 512), (576, 512), (256, 512), (320, 384), (72, 264)]
_BASE = Case(seqlen_q=150, seqlen_k=200, batch=1)
_WIDE = _BASE.with_dims(72, 264)  # the cheapest to simulate


@pytest.fixture(autouse=True)
def wide_kernel(hopper_plans: list[Any]) -> Any:
    """All plans of a test are of this kernel."""
    yield
    assert {plan.spec.entry for plan in hopper_plans} <= {"hopper_fwd_wide"}


@on_hopper(
    [
        *[_BASE.with_dims(*pair) for pair in PAIRS],
        _BASE.with_dims(512, 512).but(causal=True, dtype="fp16"),
        _BASE.with_dims(576, 400).but(causal=True),
        _BASE.with_dims(136, 512).but(causal=True, batch=3, seqlen_q=300, seqlen_k=400),
    ]
)
def test_head_dims(machine: Runner, case: Case, hopper_plans: list[Any]):
    check_case(machine, case, hopper_plans)


@on_hopper(
    [
        _WIDE.but(seqlen_q=sq, seqlen_k=sk, batch=batch, causal=causal).with_heads(4, 2, 1)
        for sq, sk, batch in [(1, 1, 4), (3, 130, 3), (300, 1, 1), (130, 64, 2), (64, 65, 1)]
        for causal in (False, True)
    ]
)
def test_lengths_and_heads(machine: Runner, case: Case, hopper_plans: list[Any]):
    check_case(machine, case, hopper_plans)


@on_hopper(
    [
        _WIDE.but(window_size=(30, 10), seqlen_q=300, seqlen_k=260),
        _WIDE.but(window_size=(3, 2), seqlen_q=200, seqlen_k=200),
        _WIDE.but(window_size=(-1, 5), seqlen_q=140, seqlen_k=60),
        _WIDE.but(window_size=(-7, -3)),
        _WIDE.but(causal=True, seqlen_q=140, seqlen_k=40),  # rows without keys
        _WIDE.but(attention_chunk=70, seqlen_q=300),
        _WIDE.but(attention_chunk=275, seqlen_q=140, seqlen_k=470),
        _WIDE.but(softcap=1.5, causal=True),
        _WIDE.but(softcap=30.0, q_factor=20.0, dtype="fp16"),
        _WIDE.but(alibi="batched", causal=True, batch=2),
        _WIDE.but(softcap=1.5, alibi="heads", window_size=(31, -1)),
        _WIDE.but(softmax_scale=-0.3),
        _WIDE.but(q_factor=60.0),
    ]
)
def test_masks_and_scores(machine: Runner, case: Case, hopper_plans: list[Any]):
    check_case(machine, case, hopper_plans)


@on_hopper(
    [
        *[c.with_dims(72, 264) for c in cases.VARLEN if sum(c.lengths_q) and sum(c.lengths_k)],
        cases.VARLEN[1].but(lengths_q=(200, 3, 129), lengths_k=(190, 130, 260)).with_dims(256, 512),
        Case(lengths_q=tuple(range(1, 40)), lengths_k=tuple(range(40, 1, -1)), causal=True)
        .with_dims(72, 264),
    ]
)  # fmt: skip
def test_varlen(machine: Runner, case: Case, hopper_plans: list[Any]):
    check_case(machine, case, hopper_plans)


@on_hopper(
    [
        Case(layout=layout, seqlen_q=50, seqlen_k=50, causal=True).with_dims(72, 264)
        for layout in ("bhsd", "gaps", "fused")
    ]
)
def test_layouts(machine: Runner, case: Case, hopper_plans: list[Any]):
    check_case(machine, case, hopper_plans)


@on_hopper(
    [
        Case(dropout_p=0.17, seqlen_q=150, seqlen_k=200).with_dims(72, 264),
        Case(dropout_p=0.3, alibi="heads", window_size=(25, 7), softcap=3.0).with_dims(256, 512),
        Case(dropout_p=0.17, lengths_q=(37, 0, 65), lengths_k=(41, 12, 90)).with_dims(72, 264),
    ]
)
def test_dropout(machine: Runner, case: Case, hopper_plans: list[Any]):
    test_hopper_forward.test_dropout(machine, case, hopper_plans)


_GQA = Case(batch=3, seqlen_q=5, seqlen_k=150, causal=True).with_dims(72, 264)


@pytest.mark.parametrize("group", [2, 5, 8])
@on_hopper(
    [
        _GQA,
        _GQA.but(attention_chunk=70, softcap=2.0, causal=False),
        cases.VARLEN[1].but(lengths_q=(20, 0, 3, 1), lengths_k=(190, 30, 0, 60)).with_dims(72, 264),
    ]
)
def test_packed_heads(machine: Runner, case: Case, group: int, hopper_plans: list[Any]):
    case = case.with_heads(2 * group, 2, 1)
    inputs = make_inputs(case, machine.device)
    expected = oracle.expect(case, inputs)
    for pack_gqa in (False, True):
        out, lse, _ = calls.forward(machine, case, inputs, pack_gqa=pack_gqa)
        assert (hopper_plans[-1].gqa_group > 1) is pack_gqa
        oracle.check(expected, out, lse)


@pytest.mark.sim
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("case", [_WIDE.but(causal=True, batch=3), cases.VARLEN[1]], ids=str)
def test_any_order_of_warps(case: Case, seed: int, hopper_plans: list[Any]):
    from flash_attn_interface._common.sim import launcher

    with launcher.checks(seed=seed):
        runner = Runner("sim", torch.device("cpu"), ARCH)
        check_case(runner, case.with_dims(72, 264), hopper_plans)


def test_every_pair_has_stages():
    """Planning only; validate() checks shared memory and threads."""
    from test_compile_flash2 import problem

    for head_dim_qk in range(72, 577, 8):
        for head_dim_v in range(264, 513, 8):
            spec = TREE.fwd_tiles.forward_spec(
                problem((head_dim_qk, head_dim_v), "plain", "bf16"), ARCH
            )
            assert spec.entry == "hopper_fwd_wide"
            assert min(int(spec["num_stages_k"]), int(spec["num_stages_v"])) >= 2
