"""Attention sinks in the kernels' own ends: forward plans of both trees and decode plans, against
the reference in float64. The public functions with `s_aux`: tests/call/.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cache_cases
import oracle
import pytest
import torch
from asked import cache_call, forward_call
from cache_cases import CacheCase, make_cache
from cases import Case, on_both
from conftest import Runner
from inputs import make_inputs
from oracle import Expected
from test_decode import problem_of
from test_hopper_forward import TREE, machine, on_hopper
from torch import Tensor

from flash_attn_interface._common.ask.call import Tensors
from flash_attn_interface._common.ask.check import check as check_call
from flash_attn_interface._common.ask.problem import Problem
from flash_attn_interface._flash2 import BACKEND
from flash_attn_interface._flash2.decode import DecodePlan
from flash_attn_interface.reference.sinks import apply_sinks

__all__ = ["machine"]  # a fixture

NEG_INF = float("-inf")


def draw_sinks(heads: int, device: torch.device) -> Tensor:
    """Of all sizes beside scores of about 1: some take nearly all, one takes nothing."""
    sinks = 3.0 * torch.randn(heads, device=device)
    sinks[0] = 40.0
    if heads > 1:
        sinks[1] = NEG_INF
    return sinks


def with_sinks(expected: Expected, sinks: Tensor, dtype: torch.dtype) -> Expected:
    """What is expected of the same call with sinks, from what is expected of the one without."""
    out, lse = apply_sinks(expected.out, expected.softmax_lse, sinks.double())
    largest = float(lse[torch.isfinite(lse)].abs().max())
    rounding = float((out.to(dtype).double() - out).abs().max())
    return replace(
        expected, out=out, softmax_lse=lse, lse_bound=2e-5 * max(1.0, largest),
        out_bound=max(expected.out_bound, 2.0 * rounding + 1e-5),
    )  # fmt: skip


def check(expected: Expected, sinks: Tensor, out: Tensor, lse: Tensor | None) -> None:
    oracle.check(with_sinks(expected, sinks, out.dtype), out, lse)
    without_keys = (expected.softmax_lse == NEG_INF).transpose(-1, -2)
    assert torch.count_nonzero(out[without_keys]) == 0


def problem_with_sinks(case: Case, inputs: Any) -> Problem:
    call = forward_call(
        inputs.q,
        inputs.k,
        inputs.v,
        cu_seqlens_q=inputs.cu_seqlens_q,
        cu_seqlens_k=inputs.cu_seqlens_k,
        max_seqlen_q=inputs.max_seqlen_q,
        max_seqlen_k=inputs.max_seqlen_k,
        seqused_q=inputs.seqused_q,
        seqused_k=inputs.seqused_k,
        softmax_scale=case.softmax_scale,
        causal=case.causal,
        window_size=case.window_size,
        attention_chunk=case.attention_chunk,
        softcap=case.softcap,
        alibi_slopes=inputs.alibi_slopes,
        return_lse=True,
    )
    return replace(check_call(call), sink=True)


def check_forward_plan(backend: Any, runner: Runner, case: Case) -> None:
    inputs = make_inputs(case, runner.device)
    sinks = draw_sinks(case.num_heads_q, runner.device)
    plan = backend.plan_forward(problem_with_sinks(case, inputs), runner.target())
    with runner.active():
        lengths = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, inputs.seqused_q, inputs.seqused_k)
        qkv = (inputs.q, inputs.k, inputs.v)
        tensors = Tensors(*qkv, *lengths, inputs.alibi_slopes, s_aux=sinks)
        out, lse, _ = plan.run(tensors)
    check(oracle.expect(case, inputs), sinks, out, lse)


_BASE = Case(batch=2, seqlen_q=70, seqlen_k=150)
FORWARD = [
    _BASE,
    _BASE.but(causal=True, seqlen_q=150, seqlen_k=70),  # queries without keys
    _BASE.but(window_size=(40, 9), softcap=3.0),
    _BASE.but(alibi=True, causal=True, dtype="fp16").with_heads(4, 2, 1),
    _BASE.but(softmax_scale=-0.3),
    _BASE.but(lengths_q=(37, 0, 65, 1), lengths_k=(41, 12, 0, 130), tail=5),
]
DIMS = [case.with_dims(64, 128) for case in FORWARD]


WIDE = _BASE.but(causal=True, seqlen_q=80, seqlen_k=70).with_dims(96, 264)


@on_both([*DIMS, WIDE])
def test_forward(runner: Runner, case: Case) -> None:
    check_forward_plan(BACKEND, runner, case)


@on_hopper([*DIMS, WIDE, _BASE.with_dims(64, 512), _BASE.but(seqlen_q=9).with_heads(8, 2, 2)])
def test_hopper_forward(machine: Runner, case: Case) -> None:
    check_forward_plan(TREE.BACKEND, machine, case)


_SPLIT = CacheCase(num_splits=3, seqlens=(0, 1, 70, 300, 129), capacity=400)
DECODE = [
    _SPLIT.but(num_splits=1),
    _SPLIT,
    _SPLIT.but(page_size=16, seqlen_q=3, causal=True),
    _SPLIT.but(num_splits=17, seqlen_q=5, window_size=(37, 4)),
    _SPLIT.but(lengths_q=(1, 0, 4, 2, 30), causal=True),
    _SPLIT.with_heads(8, 2, 4),
]


@pytest.mark.parametrize("in_place", [True, False], ids=["merged-in-place", "merged-later"])
@on_both(DECODE)
def test_decode(
    runner: Runner, case: CacheCase, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of splits it enters once: by the CTAs that merge them, or by the launch that does."""
    tensors = make_cache(case, runner.device)
    problem = problem_of(case, tensors)
    problem = replace(problem, sink=True)
    sinks = draw_sinks(problem.num_heads_q, runner.device)
    if not in_place:
        monkeypatch.setattr(
            "flash_attn_interface._flash2.decode_merge.merges_in_place", lambda *facts: False
        )
    plan = DecodePlan(problem, runner.target())
    assert plan.merges_in_place == (in_place and plan.num_splits > 1)
    expected, _, _ = cache_cases.expect(case, tensors)
    call = cache_call(**tensors)
    with runner.active():
        out, lse = plan.run(call.tensors._replace(s_aux=sinks), call.cache)
    check(expected, sinks, out, lse)
