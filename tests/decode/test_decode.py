"""Decode plans of flash2, their merge of splits included, against the float64 reference. The plan
is called as `flash2/kv.py` calls it, without an append."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import cache_cases
import oracle
import pytest
import torch
from asked import cache_call
from cache_cases import CacheCase, CacheTensors, make_cache
from cases import on_both
from conftest import Runner
from torch import Tensor

from flash_attn_interface._common.ask.check import check as check_call
from flash_attn_interface._common.ask.kv_problem import Append
from flash_attn_interface._common.ask.problem import Problem, Target
from flash_attn_interface._common.sim import launcher as sim_launcher
from flash_attn_interface._flash2 import decode, decode_merge, decode_splits, decode_tiles
from flash_attn_interface._flash2.decode import DecodePlan
from flash_attn_interface._flash2.decode_tiles import DecodeTile
from flash_attn_interface._flash2.kv import CachePlan

NAN = float("nan")


def problem_of(case: CacheCase, tensors: CacheTensors) -> Problem:
    arguments = dict(tensors)
    del arguments["q"], arguments["k_cache"], arguments["v_cache"]
    return check_call(
        cache_call(
            tensors["q"],
            tensors["k_cache"],
            tensors["v_cache"],
            **arguments,
            **{"attention_chunk": case.attention_chunk, **case.options},
            num_splits=case.num_splits,
            return_lse=True,
        )
    )


def run(
    runner: Runner,
    problem: Problem,
    tensors: CacheTensors,
    tile: DecodeTile | None = None,
) -> tuple[Tensor, Tensor | None]:
    return run_plan(runner, DecodePlan(problem, runner.target(), tile), tensors)


def run_plan(
    runner: Runner, plan: DecodePlan, tensors: CacheTensors
) -> tuple[Tensor, Tensor | None]:
    with runner.active():
        call = cache_call(**tensors)
        return plan.run(call.tensors, call.cache)


def over_cache(forward: Problem, num_splits: int) -> Problem:
    return replace(forward, append=Append(), num_splits=num_splits)


def check(runner: Runner, case: CacheCase, tile: DecodeTile | None = None) -> None:
    tensors = make_cache(case, runner.device)
    expected, _, _ = cache_cases.expect(case, tensors)
    out, lse = run(runner, problem_of(case, tensors), tensors, tile)
    oracle.check(expected, out, lse)


_BASE = CacheCase(num_splits=1)
_SPLIT = CacheCase(num_splits=3, seqlens=(0, 1, 70, 300, 129), capacity=400)
_PAGED = _SPLIT.but(page_size=16)

CASES = [
    _BASE,
    _SPLIT,
    _PAGED,
    *[_PAGED.but(page_size=size) for size in (1, 3, 64, 256)],
    *[_SPLIT.but(num_splits=n) for n in (2, 5, 17)],
    _PAGED.but(num_splits=1),
    _SPLIT.but(whole=True, seqlens=(0, 0)),
    _SPLIT.but(capacity=3000, seqlens=(3, 0, 65)),
    _SPLIT.but(batch_idx=True),
    _PAGED.but(batch_idx=True, page_size=3),
    _SPLIT.but(leftpad=(0, 1, 17, 100, 129)),
    _PAGED.but(leftpad=(0, 1, 17, 100, 129), batch_idx=True, seqlen_q=3, causal=True),
    # Masks, with rows of several queries.
    _SPLIT.but(seqlen_q=5, causal=True),
    _BASE.but(seqlen_q=5, causal=True),
    _PAGED.but(seqlen_q=40, causal=True),
    _SPLIT.but(seqlen_q=9, window_size=(37, 4)),
    _BASE.but(window_size=(20, 0)),
    _PAGED.but(seqlen_q=3, window_size=(90, -1), causal=True),
    _SPLIT.but(seqlen_q=3, window_size=(-1, 2)),
    _SPLIT.but(attention_chunk=48, seqlen_q=5, causal=True),
    _BASE.but(attention_chunk=16),
    _SPLIT.but(softcap=2.0, softmax_scale=0.4, dtype="fp16"),
    _SPLIT.but(softmax_scale=-0.2),
    _SPLIT.but(alibi=True, seqlen_q=3, causal=True),
    _PAGED.but(alibi=True, softcap=3.0),
    # Packed queries with empty sequences and a tail.
    _SPLIT.but(lengths_q=(1, 0, 4, 2, 30), causal=True),
    _BASE.but(lengths_q=(1, 1, 0, 9), alibi=True),
    _PAGED.but(lengths_q=(1, 0, 4, 20, 3), window_size=(30, 1)),
    # Heads: MQA, equal, and different numbers of K and V heads, also where neither divides.
    _SPLIT.with_heads(8, 1, 1).but(dtype="fp16"),
    _SPLIT.with_heads(40, 1, 1).but(seqlens=(100, 20)),
    _SPLIT.with_heads(3, 3, 3),
    _SPLIT.with_heads(8, 2, 4),
    _PAGED.with_heads(6, 2, 3).but(seqlen_q=2, causal=True),
    _BASE.with_heads(4, 4, 1),
    # Head dims.
    *[
        base.with_dims(*dims).but(dtype=dtype)
        for base in (_SPLIT.but(seqlens=(0, 90, 203)), _PAGED.but(seqlens=(150, 31), num_splits=1))
        for dims, dtype in (
            ((64, 128), "bf16"),
            ((192, 128), "bf16"),
            ((128, 128), "fp16"),
            ((40, 59), "bf16"),
            ((256, 256), "bf16"),
            ((1, 1), "fp16"),
            ((8, 200), "bf16"),
        )
    ],
    _SPLIT.but(only_gpu=True, seqlens=(8000, 1, 4097), capacity=8192, num_splits=0),
    _PAGED.but(only_gpu=True, seqlens=(8000, 1, 4097), capacity=8192, num_splits=0)
    .with_dims(128, 128)
    .with_heads(32, 8, 8),
    _PAGED.but(only_gpu=True, seqlens=(70000,), capacity=70400, num_splits=256)
    .with_dims(192, 128)
    .with_heads(16, 1, 1),
]


@on_both(CASES)
def test_against_reference(runner: Runner, case: CacheCase):
    check(runner, case)


TILES = [
    DecodeTile(16, 32, 1, 2, 2),
    DecodeTile(16, 16, 1, 8, 3, min_ctas_per_sm=1),
    DecodeTile(16, 16, 1, 1, 4),
    DecodeTile(32, 32, 1, 4, 2),
    DecodeTile(32, 16, 2, 4, 3, q_in_registers=False),
    DecodeTile(64, 32, 4, 2, 2),
    DecodeTile(64, 32, 2, 3, 2),
    DecodeTile(16, 16, 1, 2, 2, col_warps=2),
    DecodeTile(32, 32, 2, 2, 2, col_warps=4),
]


@pytest.mark.parametrize("page_size", [0, 3])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_tiles(runner: Runner, tile: DecodeTile, page_size: int):
    check(runner, _SPLIT.but(seqlen_q=11, causal=True, page_size=page_size), tile)


def test_warps_that_are_no_power_of_two_merge_many_splits(runner: Runner):
    case = _SPLIT.but(seqlen_q=11, causal=True, num_splits=40)
    check(runner, case, DecodeTile(64, 32, 2, 3, 2))


@pytest.mark.parametrize("align_bytes", [2, 4, 8])
@pytest.mark.parametrize("page_size", [0, 16])
def test_views_with_any_alignment(runner: Runner, align_bytes: int, page_size: int):
    """Caches, and q, that are views of wider rows."""
    case = _SPLIT.but(page_size=page_size, seqlens=(0, 90, 203))
    tensors = make_cache(case, runner.device)
    expected, _, _ = cache_cases.expect(case, tensors)
    step = align_bytes // 2
    for name in ("q", "k_cache", "v_cache"):
        x = tensors[name]
        wide = torch.full((*x.shape[:-1], x.shape[-1] + step), NAN, dtype=x.dtype, device=x.device)
        wide[..., step:] = x
        tensors[name] = wide[..., step:]
    problem = problem_of(case, tensors)
    assert problem.vector_bytes == align_bytes
    oracle.check(expected, *run(runner, problem, tensors))


def test_wild_lengths_and_tables_stay_inside(runner: Runner):
    """Whatever the integers hold, no access leaves the tensors (which the simulator checks)."""
    case = _PAGED.but(leftpad=(0, 1, 2, 3, 4), batch_idx=True)
    tensors = make_cache(case, runner.device)
    for name in ("k_cache", "v_cache"):
        tensors[name] = torch.nan_to_num(tensors[name])
    problem = problem_of(case, tensors)
    wild = torch.tensor([2**31 - 1, -(2**31), 10**6, -1, 401], dtype=torch.int32)
    for name in ("cache_seqlens", "cache_batch_idx", "cache_leftpad"):
        for other in ("cache_seqlens", "cache_batch_idx", "cache_leftpad"):
            changed = {**tensors, name: wild.to(runner.device), other: wild.to(runner.device)}
            out, _ = run(runner, problem, changed)
            assert not out.isnan().any()


def test_split_does_not_change_the_result(runner: Runner):
    """Each number of splits gives the same up to rounding, 1 to more than there are tiles."""
    case = _PAGED.with_heads(8, 2, 2).but(dtype="fp16")
    tensors = make_cache(case, runner.device)
    problem = problem_of(case, tensors)
    results = [
        run(runner, replace(problem, num_splits=splits), tensors) for splits in (1, 2, 4, 32, 256)
    ]
    for out, lse in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(lse, results[0][1], rtol=1e-5, atol=1e-5)


def test_same_call_same_bits(runner: Runner):
    case = _PAGED.with_heads(8, 2, 2)
    tensors = make_cache(case, runner.device)
    problem = problem_of(case, tensors)
    first, second = (run(runner, problem, tensors) for _ in "ab")
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    "case",
    [_PAGED, _SPLIT.with_heads(40, 1, 1), _PAGED.with_dims(16, 256), _SPLIT.with_dims(64, 128)],
    ids=lambda case: case.id,
)
def test_refilling_first_changes_no_bit(
    runner: Runner, case: CacheCase, monkeypatch: pytest.MonkeyPatch
):
    """CTAs that are alone on an SM request keys earlier."""
    tensors = make_cache(case, runner.device)
    problem = problem_of(case, tensors)
    expected, _, _ = cache_cases.expect(case, tensors)
    results = []
    for num_sms, refills_first in ((1, 0), (10_000, 1)):
        monkeypatch.setattr(decode, "num_sms", lambda _target, num_sms=num_sms: num_sms)
        plan = DecodePlan(problem, runner.target())
        assert plan._values()["refill_first"] == refills_first
        results.append(run_plan(runner, plan, tensors))
        oracle.check(expected, *results[-1])
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


# ---- the merge by the last CTA -------------------------------------------------------------------

MERGED = [
    _SPLIT,
    _PAGED.but(lengths_q=(1, 0, 4, 2, 30), causal=True, num_splits=9),
    _SPLIT.with_heads(40, 1, 1).but(seqlens=(0, 300, 7), num_splits=7),
    _SPLIT.with_dims(40, 59).but(seqlens=(0, 90, 203), dtype="fp16"),
    _SPLIT.with_dims(16, 256).but(seqlens=(0, 90, 203), num_splits=40),
    _SPLIT.but(batch_idx=True, leftpad=(0, 1, 17, 100, 129), seqlen_q=20),
]


@pytest.mark.parametrize("case", MERGED, ids=lambda case: case.id)
def test_last_cta_and_combine_agree(
    runner: Runner, case: CacheCase, monkeypatch: pytest.MonkeyPatch
):
    """Run several times: the counters are left as they were found, and the last CTA is any."""
    tensors = make_cache(case, runner.device)
    problem = problem_of(case, tensors)
    expected, _, _ = cache_cases.expect(case, tensors)
    plans = []
    for limit in (decode_merge.MAX_BYTES_TO_MERGE, 0):
        monkeypatch.setattr(decode_merge, "MAX_BYTES_TO_MERGE", limit)
        plans.append(DecodePlan(problem, runner.target()))
    assert [plan.merges_in_place for plan in plans] == [True, False]
    assert ["flash2_combine" in plan.describe() for plan in plans] == [False, True]
    for plan in plans:
        first = run_plan(runner, plan, tensors)
        oracle.check(expected, *first)
        for seed in range(1, 4):
            with sim_launcher.checks(seed=seed):
                again = run_plan(runner, plan, tensors)
            assert torch.equal(again[0], first[0])
            assert torch.equal(again[1], first[1])


@pytest.mark.parametrize("case", [MERGED[1], MERGED[2], MERGED[4]], ids=lambda case: case.id)
def test_any_number_of_ctas_may_merge(
    runner: Runner, case: CacheCase, monkeypatch: pytest.MonkeyPatch
):
    """With the same bits. In the simulator CTAs run one after the other, or a few at a time: those
    that wait for the others hand their shares over to the last one."""
    tensors = make_cache(case, runner.device)
    problem = problem_of(case, tensors)
    expected, _, _ = cache_cases.expect(case, tensors)
    results = []
    for most in (1, 2, 5, 32):
        monkeypatch.setattr(
            decode_merge, "num_mergers", lambda _p, _t, splits, _s, most=most: min(most, splits)
        )
        plan = DecodePlan(problem, runner.target())
        assert plan.merges_in_place
        results += [run_plan(runner, plan, tensors) for _ in range(3)]
    oracle.check(expected, *results[0])
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_mergers_are_as_many_as_have_enough_to_do():
    """A launch merges for itself, but for CTAs that cannot all run at once or have no counters."""
    target = Target("sm_90", 0, simulated=True)
    for heads, splits, mergers in (((32, 1), 2, 2), ((32, 1), 100, 32), ((32, 8), 16, 2)):
        forward = forward_of(1, 65536, heads)
        plan = DecodePlan(over_cache(forward, splits), target)
        assert plan.merges_in_place and plan.combine is None
        assert plan.num_mergers == mergers
    crowded = DecodePlan(over_cache(forward_of(8, 65536, (32, 1)), 20), target)
    assert (crowded.num_mergers, crowded.merges_in_place) == (1, False)
    assert crowded.combine is not None
    many_tiles = over_cache(forward_of(400, 512, (32, 32)), 2)
    assert DecodePlan(many_tiles, target).combine is not None


@pytest.mark.gpu
def test_merges_on_several_streams_and_in_graphs():
    """Each launch in flight has counters of its own."""
    runner = Runner("gpu", torch.device("cuda"))
    case = _SPLIT.but(seqlens=(8000, 4097, 1), capacity=8192, num_splits=9)
    case = case.with_dims(128, 128).with_heads(32, 8, 8)
    calls = []
    for _ in range(4):
        tensors = make_cache(case, runner.device)
        plan = DecodePlan(problem_of(case, tensors), runner.target())
        calls.append((plan, tensors, run_plan(runner, plan, tensors)[0].clone()))
    streams = [torch.cuda.Stream() for _ in calls]

    def on_all_streams() -> list[Tensor]:
        start = torch.cuda.current_stream()
        outs = []
        for stream, (plan, tensors, _) in zip(streams, calls, strict=True):
            stream.wait_stream(start)
            with torch.cuda.stream(stream):
                outs.append(run_plan(runner, plan, tensors)[0])
        for stream in streams:
            start.wait_stream(stream)
        return outs

    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = on_all_streams()
    for _ in range(50):
        graph.replay()
        with torch.cuda.stream(streams[0]):  # beside the graph
            eager = run_plan(runner, calls[0][0], calls[0][1])[0]
        together = on_all_streams()
        torch.cuda.synchronize()
        assert torch.equal(eager, calls[0][2])
        for out, replayed, (_, _, want) in zip(together, captured, calls, strict=True):
            assert torch.equal(out, want)
            assert torch.equal(replayed, want)


# ---- kernel and number of splits -----------------------------------------------------------------


def forward_of(batch: int, seqlen_k: int, heads: tuple[int, int], seqlen_q: int = 1):
    case = CacheCase(seqlens=(1,) * batch, seqlen_q=seqlen_q).with_heads(*heads, heads[1])
    problem = problem_of(case, make_cache(case, "cpu"))
    return replace(problem, seqlen_k=seqlen_k, head_dim_qk=128, head_dim_v=128)


@pytest.mark.parametrize(
    ("num_splits", "seqlen_q", "batch", "decodes"),
    [
        (1, 1, 4, False),  # a promise: the bits of the plain forward
        (2, 1, 4, True),
        (2, 300, 4, True),
        (0, 1, 4, True),
        (0, 32, 4, True),  # 64 packed rows: one tile
        (0, 300, 1, True),  # the forward would leave most of the machine idle
        (0, 300, 64, False),
    ],
)
def test_choice_of_the_kernel(num_splits: int, seqlen_q: int, batch: int, decodes: bool):
    forward = forward_of(batch, 65536, (4, 2), seqlen_q)
    problem = over_cache(forward, num_splits)
    plan = CachePlan(problem, Target("sm_80", 0, simulated=True))
    assert (plan.decode is not None) == decodes
    assert (plan.forward is None) == decodes
    assert ("flash2_decode" if decodes else "flash2_fwd") in plan.describe()


MEASURED_SPLITS = [  # on an H100, head dims 128: query and key heads, batch, keys, best splits
    ((32, 8), 16, 8192, (1,)),
    ((32, 4), 16, 8192, (2,)),
    ((32, 1), 16, 8192, (8,)),
    ((32, 8), 1, 65536, (16,)),
    ((32, 4), 1, 65536, (31, 32, 33)),
    ((32, 1), 1, 65536, range(118, 133)),
    ((32, 4), 64, 8192, (1,)),
    ((32, 1), 64, 8192, (2,)),
    ((32, 1), 128, 2048, (1,)),
]


@pytest.mark.parametrize(("heads", "batch", "seqlen_k", "best"), MEASURED_SPLITS)
def test_splits_are_those_that_measured_best(
    heads: tuple[int, int], batch: int, seqlen_k: int, best: Sequence[int]
):
    problem = forward_of(batch, seqlen_k, heads)
    tile = decode_tiles.decode_tile(problem, "sm_90")
    assert decode_splits.choose_num_splits(problem, tile, 132) in best


@pytest.mark.parametrize("num_sms", [84, 108, 132, 188])
@pytest.mark.parametrize("num_heads_k", [32, 8, 4, 1])
def test_splits_keep_the_sms_busy(num_heads_k: int, num_sms: int):
    for batch, seqlen_k in product((1, 3, 16, 23, 64, 128, 300), (100, 1000, 2048, 8192, 65536)):
        problem = replace(forward_of(1, seqlen_k, (32, num_heads_k)), batch=batch)
        tile = decode_tiles.decode_tile(problem, "sm_90")
        splits = decode_splits.choose_num_splits(problem, tile, num_sms)
        most = max(1, min(decode_splits.MAX_CHOSEN_SPLITS, seqlen_k // 128))
        assert 1 <= splits <= most
        busy = batch * num_heads_k * splits / num_sms
        assert busy > 0.65 or splits > 0.6 * most, (batch, seqlen_k, splits)


def test_ragged_queries_are_split_like_regular_ones():
    """One token each: the number of tiles is bounded by about twice what there are."""
    case = CacheCase(seqlens=(1,) * 16, lengths_q=(1,) * 16).with_heads(32, 1, 1)
    ragged = problem_of(case, make_cache(case, "cpu"))
    ragged = replace(ragged, seqlen_k=8192, head_dim_qk=128, head_dim_v=128, total_q=16)
    tile = decode_tiles.decode_tile(ragged, "sm_90")
    assert decode_splits.choose_num_splits(ragged, tile, 132) == 8


@pytest.mark.parametrize(("batch", "seqlen_k", "splits"), [(16, 8192, 1), (1, 65536, 16)])
def test_long_paged_splits_share_an_sm(batch: int, seqlen_k: int, splits: int):
    problem = replace(forward_of(1, seqlen_k, (32, 8)), batch=batch)
    tile = decode_tiles.decode_tile(problem, "sm_90")
    assert decode_splits.choose_num_splits(problem, tile, 132) == splits
    paged = replace(problem, page_size=16)
    assert decode_splits.choose_num_splits(paged, tile, 132) == 2 * splits
    short = replace(paged, seqlen_k=1024, batch=16)
    assert decode_splits.choose_num_splits(short, tile, 132) == 1


def test_windows_and_chunks_limit_splits():
    problem = forward_of(1, 65536, (32, 8))
    tile = decode_tiles.decode_tile(problem, "sm_90")
    assert decode_splits.choose_num_splits(problem, tile, 132) >= 16
    windowed = replace(problem, window_left=1023, window_right=0)
    assert decode_splits.choose_num_splits(windowed, tile, 132) <= 8
    chunked = replace(problem, attention_chunk=512)
    assert decode_splits.choose_num_splits(chunked, tile, 132) <= 4
