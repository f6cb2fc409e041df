"""The append kernel by itself: new keys and values enter the cache, queries turn, lengths grow.

Caches are compared with `reference/kvcache.py` in float64, rotations with `rotary.py` in float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cache_cases
import pytest
import rotation
import torch
from asked import cache_call
from cache_cases import CacheCase, CacheTensors, make_cache
from cases import on_both
from conftest import Runner
from torch import Tensor

from flash_attn.layers.rotary import apply_rotary_emb
from flash_attn_interface._common.ask.check import check
from flash_attn_interface._common.ask.problem import Problem
from flash_attn_interface._flash2.append import AppendPlan, attention_after_append
from flash_attn_interface.call.selection import device_of, target_for

_NEW = CacheCase(seqlen_new=3, seqlens=(0, 5, 33, 61), seqlen_q=3, causal=True)
_ROTARY = _NEW.but(rotary_dim=32)
_RAGGED = _NEW.but(lengths_new=(2, 0, 7, 1), lengths_q=(1, 3, 0, 2))

CASES = [
    _NEW,
    _NEW.but(page_size=1),
    _NEW.but(page_size=3, batch_idx=True),
    _NEW.but(page_size=64, leftpad=(0, 1, 2, 3)),
    _NEW.but(batch_idx=True).with_heads(4, 1, 2),
    _NEW.but(seqlen_new=1, seqlen_q=5).with_dims(59, 40),
    _NEW.but(seqlen_new=1, dtype="fp16").with_dims(256, 1),
    _NEW.but(page_size=16).with_dims(192, 128),
    _RAGGED,
    _RAGGED.but(page_size=5),
    _ROTARY,
    _ROTARY.but(interleaved=False),
    _ROTARY.but(interleaved=False, rotary_dim=16, dtype="fp16", page_size=16),
    _ROTARY.but(rotary_dim=48, interleaved=False).with_dims(128, 64),
    _ROTARY.but(causal=False),
    _ROTARY.but(causal=False, window_size=(9, 1), leftpad=(0, 1, 2, 3)),
    _ROTARY.but(rotary_seqlens=(7, 0, 40, 3)),
    _ROTARY.but(lengths_new=(2, 0, 7, 1), lengths_q=(1, 3, 0, 2), page_size=7, batch_idx=True),
    _ROTARY.but(lengths_new=(2, 0, 7, 1), lengths_q=(1, 3, 0, 2), interleaved=False),
    *[_ROTARY.but(interleaved=way).with_dims(dim, 20) for way in (True, False) for dim in (34, 36)],
    *[_ROTARY.but(interleaved=way).with_dims(35, 16) for way in (True, False)],
]
LARGE = [  # about 300 MB each, most of it the expected caches in float64
    CacheCase(seqlens=(2500, 1, 1100), capacity=4096, seqlen_new=1500, seqlen_q=1500, causal=True,
              only_gpu=True, rotary_dim=64, page_size=page_size, interleaved=interleaved)
    .with_dims(128, 256).with_heads(16, 2, 4)
    for page_size in (0, 16, 256)
    for interleaved in (True, False)
]  # fmt: skip


def problem_of(case: CacheCase, tensors: CacheTensors) -> Problem:
    return check(cache_call(**tensors, **case.options))


def append(
    runner: Runner, problem: Problem, tensors: CacheTensors, **changes: Any
) -> tuple[Tensor, Tensor]:
    """(rotated q, seqused_k) of the kernel."""
    call = cache_call(**(tensors | changes))
    with runner.active():
        target = target_for("flash2", device_of(call.tensors.q))
        return AppendPlan(problem, target).run(call.tensors, call.cache)


def copy(tensors: CacheTensors) -> CacheTensors:
    return {n: x.clone() if isinstance(x, Tensor) else x for n, x in tensors.items()}


def turned(case: CacheCase, tensors: CacheTensors) -> Tensor:
    """q as rotary.py rotates it; rows that belong to no sequence stay."""
    q, cos, sin = (tensors[name] for name in ("q", "rotary_cos", "rotary_sin"))
    base = tensors.get("rotary_seqlens", tensors["cache_seqlens"])
    cu_seqlens = tensors.get("cu_seqlens_q")
    result = q.clone()
    for b in range(len(case.seqlens)):
        rows = (b,) if cu_seqlens is None else slice(int(cu_seqlens[b]), int(cu_seqlens[b + 1]))
        sequence = q[rows].unsqueeze(0)
        if case.causal or case.window_size != (-1, -1):
            first = int(base[b])
        else:  # every row turns by the first one's position
            first, sequence = int(base[b]), sequence.transpose(0, 1)
        sequence = apply_rotary_emb(sequence, cos, sin, case.interleaved, seqlen_offsets=first)
        per_row = case.causal or case.window_size != (-1, -1)
        result[rows] = (sequence if per_row else sequence.transpose(0, 1)).squeeze(0)
    return result


def check_case(runner: Runner, case: CacheCase) -> None:
    tensors = make_cache(case, runner.device)
    before = copy(tensors)
    k_want, v_want = cache_cases.expect_caches(case, tensors)
    q, seqused_k = append(runner, problem_of(case, tensors), tensors)
    cache_cases.check_caches(case, before, tensors, k_want, v_want)
    new = case.lengths_new or [case.seqlen_new] * len(case.seqlens)
    assert seqused_k.tolist() == [n + more for n, more in zip(case.seqlens, new, strict=True)]
    if not case.rotary_dim:
        assert q is tensors["q"]
        return
    rows = slice(0, sum(case.lengths_q)) if case.lengths_q else slice(None)
    assert q.is_contiguous()
    rotation.close(q[rows], turned(case, before)[rows])
    assert torch.equal(q[rows][..., case.rotary_dim :], before["q"][rows][..., case.rotary_dim :])


@on_both([*CASES, *LARGE])
def test_append(runner: Runner, case: CacheCase):
    check_case(runner, case)


@on_both([_ROTARY, _ROTARY.but(interleaved=False)])
@pytest.mark.parametrize("elements", [1, 2, 4])
def test_layouts_with_gaps_and_odd_alignment(runner: Runner, case: CacheCase, elements: int):
    """All tensors begin `elements` into a buffer and have gaps between their heads."""
    tensors = make_cache(case, runner.device)
    for name in ("q", "k", "v", "k_cache", "v_cache"):
        *rows, heads, dim = tensors[name].shape
        width = heads * (dim + elements) + elements
        buffer = tensors[name].new_full((*rows, width), torch.nan)
        view = buffer[..., elements:].unflatten(-1, (heads, dim + elements))[..., :dim]
        tensors[name] = view.copy_(tensors[name])
    for name in ("rotary_cos", "rotary_sin"):
        table = tensors[name]
        shifted = table.new_zeros(table.numel() + elements)[elements:].view(table.shape)
        tensors[name] = shifted.copy_(table)
    before = copy(tensors)
    k_want, v_want = cache_cases.expect_caches(case, tensors)
    problem = problem_of(case, tensors)
    assert problem.vector_bytes == 2 * elements
    q, _ = append(runner, problem, tensors)
    cache_cases.check_caches(case, before, tensors, k_want, v_want)
    rotation.close(q, turned(case, before))


@on_both([_ROTARY])
def test_rotary_tables_alone_may_be_badly_aligned(runner: Runner, case: CacheCase):
    """One plan serves tables of any alignment, which is not part of the problem."""
    tensors = make_cache(case, runner.device)
    problem = problem_of(case, tensors)
    want, _ = append(runner, problem, copy(tensors))
    for name in ("rotary_cos", "rotary_sin"):
        shifted = torch.zeros_like(torch.cat([tensors[name].flatten()] * 2))[1:]
        tensors[name] = (
            shifted[: tensors[name].numel()].view(tensors[name].shape).copy_(tensors[name])
        )
    got, _ = append(runner, problem, tensors)
    assert torch.equal(got, want)


@on_both([CacheCase(rotary_dim=32, seqlen_q=3, causal=True)])
def test_queries_alone_are_rotated(runner: Runner, case: CacheCase):
    tensors = make_cache(case.but(seqlen_new=1), runner.device)
    problem = problem_of(case, tensors)
    problem = replace(problem, append=replace(problem.append, seqlen_new=0, total_new=0))
    before = copy(tensors)
    q, seqused_k = append(runner, problem, tensors, k=None, v=None)
    rotation.close(q, turned(case, before))
    assert seqused_k.tolist() == list(case.seqlens)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(tensors[name].nan_to_num(7.0), before[name].nan_to_num(7.0))


@on_both([_NEW, _NEW.but(page_size=16)])
def test_a_whole_cache_is_counted_by_its_capacity(runner: Runner, case: CacheCase):
    tensors = make_cache(case, runner.device)
    problem = problem_of(case, tensors)
    problem = replace(problem, append=replace(problem.append, seqlen_new=0, total_new=0))
    _, seqused_k = append(runner, problem, tensors, k=None, v=None, cache_seqlens=None)
    assert seqused_k.tolist() == [problem.seqlen_k] * 4


# Data out of range: nothing outside of the cache is touched, which the simulator sees and
# compute-sanitizer would.

HUGE = 2**31 - 1


@on_both([_ROTARY, _ROTARY.but(page_size=16), _ROTARY.but(page_size=16, batch_idx=True)])
def test_rows_without_a_place_are_dropped(runner: Runner, case: CacheCase):
    """Lengths beyond the capacity or negative; here capacity is 80, the tables have 140 rows."""
    tensors = make_cache(case, runner.device)
    if case.page_size:  # pages for all that is written
        row = int(tensors["cache_batch_idx"][3]) if case.batch_idx else 3
        tensors["page_table"][row, 4] = tensors["k_cache"].shape[0] - 1
    seqlens = torch.tensor([80, HUGE, -5, 79], dtype=torch.int32, device=runner.device)
    before = copy(tensors)
    _, seqused_k = append(runner, problem_of(case, tensors), tensors, cache_seqlens=seqlens)
    assert seqused_k.tolist() == [80, 80, 3, 80]
    changed = ~torch.eq(tensors["v_cache"].nan_to_num(7.0), before["v_cache"].nan_to_num(7.0))
    written = changed.any(-1).any(-1)
    if case.page_size:
        assert written.sum() <= 3 + 1  # sequence 2 has a page only if its table row names one
    else:
        assert written.nonzero().tolist() == [[2, 0], [2, 1], [2, 2], [3, 79]]
        assert torch.equal(tensors["v_cache"][3, 79], tensors["v"][3, 0])


@on_both([_NEW.but(page_size=16)])
@pytest.mark.parametrize("entry", [-1, HUGE, "pages"])
def test_pages_out_of_range_are_not_written(runner: Runner, case: CacheCase, entry: Any):
    tensors = make_cache(case, runner.device)
    before = copy(tensors)
    tensors["page_table"].fill_(tensors["k_cache"].shape[0] if entry == "pages" else entry)
    append(runner, problem_of(case, tensors), tensors)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(tensors[name].nan_to_num(7.0), before[name].nan_to_num(7.0))


@on_both([_NEW.but(batch_idx=True), _NEW.but(batch_idx=True, page_size=16)])
@pytest.mark.parametrize("index", [-1, HUGE, 8])
def test_slots_out_of_range_are_not_written(runner: Runner, case: CacheCase, index: int):
    tensors = make_cache(case, runner.device)
    assert (tensors["page_table"] if case.page_size else tensors["k_cache"]).shape[0] == 8
    before = copy(tensors)
    tensors["cache_batch_idx"].fill_(index)
    append(runner, problem_of(case, tensors), tensors)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(tensors[name].nan_to_num(7.0), before[name].nan_to_num(7.0))


@on_both([_ROTARY])
@pytest.mark.parametrize("base", [-3, 139, HUGE])
def test_positions_beyond_the_tables_stay_unrotated(runner: Runner, case: CacheCase, base: int):
    tensors = make_cache(case, runner.device)
    assert tensors["rotary_cos"].shape[0] == 140
    bases = torch.full((4,), base, dtype=torch.int32, device=runner.device)
    tensors |= {"rotary_seqlens": bases}
    tensors["cache_seqlens"].fill_(10)
    q, _ = append(runner, problem_of(case, tensors), tensors)
    inside = 1 if base == 139 else 0
    assert torch.equal(q[:, inside:], tensors["q"][:, inside:])
    assert torch.equal(tensors["k_cache"][:, 10 + inside : 13], tensors["k"][:, inside:])
    assert inside == 0 or not torch.equal(q[:, :1], tensors["q"][:, :1])


# ---- planning -----------------------------------------------------------------------------------


def test_attention_after_append_reads_the_rotated_queries():
    tensors = make_cache(_ROTARY, "cpu")
    tensors["q"] = torch.cat([tensors["q"], tensors["q"]], -2)[..., ::2, :]  # head stride 64
    problem = problem_of(_ROTARY, tensors)
    assert problem.q_strides == (768, 256, 64)
    after = attention_after_append(problem)
    assert after.q_strides == (384, 128, 32)
    assert replace(after, q_strides=problem.q_strides) == problem
    plain = replace(problem, append=replace(problem.append, rotary_dim=0))
    assert attention_after_append(plain) == plain


def test_sizes_are_not_part_of_the_kernel():
    """One kernel appends for every model: only the dtype, the rotation and the width of a row."""
    specs = set()
    for case in (_NEW, _NEW.but(page_size=16), _RAGGED, _NEW.with_heads(8, 2, 4)):
        problem = problem_of(case, make_cache(case, "cpu"))
        with Runner("sim", torch.device("cpu")).active():
            target = target_for("flash2", device_of(torch.empty(0)))
        specs.add(AppendPlan(problem, target).spec)
    assert len(specs) == 1
