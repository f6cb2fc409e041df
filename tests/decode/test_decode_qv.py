"""The second query of decoding, qv (absorbed MLA), and values wider than 256: flash2's decode
kernel against the float64 reference. Everything else that it does: test_decode.py."""

from __future__ import annotations

from dataclasses import replace

import cache_cases
import oracle
import pytest
import torch
from cache_cases import CacheCase, call, make_cache
from cases import on_both
from conftest import Runner
from test_decode import check, problem_of, run

from flash_attn_interface import explain_with_kvcache
from flash_attn_interface._common.ask.problem import Target
from flash_attn_interface._common.runtime import arch as arch_table
from flash_attn_interface._common.tiles import tuned_tiles
from flash_attn_interface._flash2 import decode_tiles
from flash_attn_interface._flash2.decode_tiles import DecodeTile
from flash_attn_interface._flash2.kv import CachePlan

_BASE = CacheCase(qv=True, num_splits=1, seqlens=(0, 1, 70, 129), capacity=150).with_heads(8, 1, 1)
_SPLIT = _BASE.but(num_splits=3)
_PAGED = _SPLIT.but(page_size=16)
_MLA = _BASE.with_dims(64, 512).but(seqlens=(0, 90, 33))

CASES = [
    _BASE,
    _SPLIT,
    _PAGED,
    _BASE.but(dtype="fp16", page_size=1),
    _PAGED.but(page_size=3, batch_idx=True, leftpad=(0, 1, 17, 100), seqlen_q=3, causal=True),
    _SPLIT.but(whole=True, seqlens=(0, 0)),
    # Masks and biases.
    _SPLIT.but(seqlen_q=5, causal=True),
    _BASE.but(seqlen_q=9, window_size=(37, 4)),
    _PAGED.but(seqlen_q=3, attention_chunk=48, causal=True),
    _SPLIT.but(softcap=2.0, softmax_scale=0.4),
    _SPLIT.but(softmax_scale=-0.2),
    _BASE.but(alibi=True, seqlen_q=3, causal=True),
    # Rows: of several heads, of packed queries with empty sequences and a tail, many tiles of them.
    _SPLIT.with_heads(40, 1, 1).but(seqlens=(100, 20)),
    _PAGED.with_heads(6, 2, 3).but(seqlen_q=2, causal=True),
    _SPLIT.but(lengths_q=(1, 0, 4, 30), causal=True),
    _BASE.but(seqlen_q=40, causal=True, page_size=16),
    # Head dims; from 256 on, warps share the columns of V.
    *[
        base.with_dims(*dims).but(dtype=dtype, seqlens=(0, 90, 33))
        for base in (_BASE, _PAGED)
        for dims, dtype in (((64, 256), "bf16"), ((40, 59), "bf16"), ((1, 1), "fp16"))
    ],
    _SPLIT.with_dims(256, 256).but(seqlens=(0, 90)),
    _MLA,
    _MLA.but(num_splits=2, page_size=16, dtype="fp16"),
    _MLA.with_heads(40, 1, 1).but(seqlens=(33, 70)),
    _MLA.with_dims(24, 500).with_heads(20, 1, 1).but(num_splits=2),
    # Wide values without qv.
    _MLA.but(qv=False),
    _MLA.but(qv=False, num_splits=2, page_size=16, seqlen_q=3, causal=True),
    _MLA.with_dims(40, 300).but(qv=False),
    *[
        _MLA.with_heads(heads, 1, 1).but(
            only_gpu=True, seqlens=(8000, 1, 4097), capacity=8192, num_splits=0, **options
        )
        for heads in (16, 32, 128)
        for options in (
            {},
            {"page_size": 64, "dtype": "fp16"},
            {"page_size": 1, "seqlen_q": 2, "causal": True, "leftpad": (0, 0, 100)},
        )
    ],
    _MLA.with_heads(16, 1, 1).but(only_gpu=True, seqlens=(3000, 700), capacity=3000, seqlen_q=300,
                                  causal=True),
    _MLA.with_dims(64, 256).with_heads(128, 1, 1).but(only_gpu=True, seqlens=(900, 4000),
                                                      capacity=4096, num_splits=5, softcap=5.0),
]  # fmt: skip


@on_both(CASES)
def test_against_reference(runner: Runner, case: CacheCase):
    check(runner, case)


TILES = [
    DecodeTile(16, 32, 1, 2, 2, col_warps=2),
    DecodeTile(16, 16, 1, 1, 3, q_in_registers=False, col_warps=4),
    DecodeTile(32, 32, 2, 2, 2, q_in_registers=False, col_warps=2),
    DecodeTile(32, 16, 1, 2, 3, col_warps=4),
    DecodeTile(64, 32, 2, 1, 2, col_warps=4),
    DecodeTile(64, 16, 4, 2, 2),
]


@pytest.mark.parametrize("page_size", [0, 3])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_tiles(runner: Runner, tile: DecodeTile, page_size: int):
    check(runner, _SPLIT.but(seqlen_q=11, causal=True, page_size=page_size), tile)


@pytest.mark.parametrize("align_bytes", [2, 4, 8])
def test_views_with_any_alignment(runner: Runner, align_bytes: int):
    """qv alone, and not q, k or v, may be what narrows the loads."""
    case = _PAGED.but(seqlens=(0, 90, 33))
    tensors = make_cache(case, runner.device)
    step = align_bytes // 2
    qv = tensors["qv"]
    wide = torch.full((*qv.shape[:-1], qv.shape[-1] + step), float("nan"), dtype=qv.dtype)
    wide = wide.to(qv.device)
    wide[..., step:] = qv
    tensors["qv"] = wide[..., step:]
    problem = problem_of(case, tensors)
    assert problem.vector_bytes == align_bytes
    expected, _, _ = cache_cases.expect(case, tensors)
    oracle.check(expected, *run(runner, problem, tensors))


@pytest.mark.parametrize("case", [_BASE, _BASE.but(page_size=16, seqlen_q=3, causal=True)])
def test_one_split_does_not_depend_on_the_batch(runner: Runner, case: CacheCase):
    """Bit for bit, each sequence alone and among others."""
    tensors = make_cache(case, runner.device)
    together, lse = run(runner, problem_of(case, tensors), tensors)
    for b in range(len(case.seqlens)):
        one = dict(tensors)
        for name in ("q", "qv", "cache_seqlens", "page_table"):
            if name in one:
                one[name] = one[name][b : b + 1]
        if not case.page_size:
            one |= {name: one[name][b : b + 1] for name in ("k_cache", "v_cache")}
        alone, lse_alone = run(runner, problem_of(case, one), one)
        assert torch.equal(alone[0], together[b])
        assert torch.equal(lse_alone[0], lse[b])


def test_one_split_of_ragged_queries_does_not_depend_on_the_batch(runner: Runner):
    """Not on the longest sequence either."""
    case = _BASE.but(lengths_q=(1, 3, 4, 30), causal=True)
    tensors = make_cache(case, runner.device)
    together, lse = run(runner, problem_of(case, tensors), tensors)
    end = 0
    for b, length in enumerate(case.lengths_q):
        begin, end = end, end + length
        one = dict(tensors)
        for name in ("cache_seqlens", "k_cache", "v_cache"):
            one[name] = one[name][b : b + 1]
        one |= {name: one[name][begin:end] for name in ("q", "qv")}
        one |= {"cu_seqlens_q": tensors["cu_seqlens_q"][:2].clone(), "max_seqlen_q": length}
        one["cu_seqlens_q"][1] = length
        alone, lse_alone = run(runner, problem_of(case, one), one)
        assert torch.equal(alone, together[begin:end])
        assert torch.equal(lse_alone, lse[:, begin:end])


def test_where_q_is_zero_v_is_the_key(runner: Runner):
    """The scores are those of a cache with V in the place of K."""
    case = _BASE.with_dims(64, 64)
    tensors = make_cache(case, runner.device)
    zero = tensors | {"q": torch.zeros_like(tensors["q"])}
    of_v = tensors | {"q": tensors["qv"], "k_cache": tensors["v_cache"]}
    del of_v["qv"]
    scale = replace(case, softmax_scale=0.1)
    out, lse = run(runner, problem_of(scale, zero), zero)
    want, lse_want = run(runner, problem_of(replace(scale, qv=False), of_v), of_v)
    torch.testing.assert_close(out, want, rtol=2**-7, atol=2**-9)
    torch.testing.assert_close(lse, lse_want, rtol=1e-5, atol=1e-5)


# ---- planning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", arch_table.known_archs())
@pytest.mark.parametrize("qv", [True, False])
def test_every_arch_has_a_tile(arch: str, qv: bool):
    """Specs are checked against the arch when made. Every number of rows and every V up to 512."""
    case = _MLA.but(qv=qv)
    asked = problem_of(case, make_cache(case, "cpu"))
    for heads in (1, 16, 17, 32, 33, 128):
        for head_dim_v in (*range(16, 513, 16), 500):
            for head_dim_qk in (16, 64) if head_dim_v > 256 else (16, 64, 256):
                changed = replace(
                    asked, num_heads_q=heads, head_dim_v=head_dim_v, head_dim_qk=head_dim_qk
                )
                decode_tiles.decode_spec(changed, arch, True)


@pytest.mark.parametrize("num_splits", [0, 1, 4])
@pytest.mark.parametrize("seqlen_q", [1, 300])
def test_decode_serves_what_the_forward_cannot(num_splits: int, seqlen_q: int):
    for changes in ({}, {"qv": False}):
        case = _MLA.but(seqlen_q=seqlen_q, seqlens=(1,) * 64, **changes)
        forward = problem_of(case, make_cache(case, "cpu"))
        problem = replace(forward, num_splits=num_splits)
        plan = CachePlan(problem, Target("sm_80", 0, simulated=True))
        assert plan.decode is not None and plan.forward is None


def test_tuned_tiles_of_qv_have_keys_of_their_own():
    case = _BASE
    with_qv = problem_of(case, make_cache(case, "cpu"))
    keys = [
        tuned_tiles.key("flash2", "decode", problem, decode_tiles.row_class(problem))
        for problem in (with_qv, replace(with_qv, qv=False))
    ]
    assert keys[0].replace("+qv", "") == keys[1] != keys[0]


def test_explain_shows_the_kernel():
    shapes = {"q": (16, 1, 128, 64), "k_cache": (900, 64, 1, 64), "v_cache": (900, 64, 1, 512)}
    others = {"cache_seqlens": (16,), "page_table": (16, 50), "qv": (16, 1, 128, 512)}
    for arch in ("sm_80", "sm_86", "sm_90a"):
        answer = explain_with_kvcache(**shapes, **others, arch=arch)
        assert answer.backend == "flash2" and "qv" in str(answer)
        assert "flash2_decode" in answer.plan
    wide = explain_with_kvcache(**shapes, cache_seqlens=(16,), page_table=(16, 50), arch="sm_80")
    assert wide.backend == "flash2" and "flash2_decode" in wide.plan


# ---- the public function -------------------------------------------------------------------------

APPENDS = [
    _BASE.but(seqlen_new=1, num_splits=0, rotary_dim=32, causal=True, seqlens=(0, 5, 33)),
    _PAGED.but(seqlen_new=3, seqlen_q=3, rotary_dim=16, causal=True, interleaved=False,
               batch_idx=True, leftpad=(0, 2, 18), seqlens=(0, 5, 33)),
    _MLA.but(seqlen_new=1, rotary_dim=64, causal=True, page_size=16, num_splits=0),
    _MLA.but(seqlen_new=1, only_gpu=True, seqlens=(4000, 1, 77), capacity=4096, rotary_dim=64,
             causal=True, page_size=64, num_splits=0).with_heads(128, 1, 1),
]  # fmt: skip


@on_both(APPENDS)
def test_appends_rotates_and_attends(runner: Runner, case: CacheCase):
    """Only q turns, never qv: positions are in the keys' rotary part."""
    tensors = make_cache(case, runner.device)
    expected, k_want, v_want = cache_cases.expect(case, tensors)
    before = {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in tensors.items()}
    out, lse = runner.call(call, case, tensors)
    oracle.check(expected, out, lse)
    cache_cases.check_caches(case, before, tensors, k_want, v_want)


@pytest.mark.gpu
def test_decoding_by_graph_replay():
    """Captured once, replayed with other lengths and queries: as many eager calls."""
    runner = Runner("gpu", torch.device("cuda"))
    case = _MLA.but(seqlens=(300, 1, 77), capacity=512, page_size=64, num_splits=0)
    case = case.with_heads(32, 1, 1)
    tensors = make_cache(case.but(seqlens=(400, 400, 400)), runner.device)
    tensors["cache_seqlens"] = torch.tensor(case.seqlens, dtype=torch.int32, device="cuda")
    call(case, tensors)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured, _ = call(case, tensors)
    for _ in range(5):
        tensors["cache_seqlens"] += 7
        for name in ("q", "qv"):
            tensors[name].normal_()
        graph.replay()
        assert torch.equal(captured, call(case, tensors)[0])


# ---- products by warpgroups ----------------------------------------------------------------------

WGMMA = DecodeTile(64, 64, 4, 1, 2, col_warps=2, wgmma=True)
_WIDE = _BASE.with_dims(32, 256).but(seqlens=(0, 1, 70, 149))

WGMMA_CASES = [
    (_WIDE, WGMMA),
    (_WIDE.but(page_size=3, num_splits=2, dtype="fp16"), replace(WGMMA, num_stages=3)),
    (_WIDE.but(page_size=64), WGMMA),
    (_WIDE.but(lengths_q=(1, 0, 4, 30), causal=True), WGMMA),
    (_WIDE.but(seqlen_q=9, window_size=(37, 4), leftpad=(0, 1, 17, 100)), WGMMA),
    (_MLA.with_heads(40, 1, 1).but(seqlens=(33, 210), capacity=210), WGMMA),
    (_WIDE.with_dims(40, 400).but(softcap=2.0, seqlens=(70, 3)), WGMMA),
    (_WIDE.with_dims(192, 200).but(num_splits=2, seqlens=(70, 3)), WGMMA),
]  # fmt: skip


@pytest.mark.parametrize(("case", "tile"), WGMMA_CASES)
def test_warpgroups(runner: Runner, case: CacheCase, tile: DecodeTile):
    if runner.name == "gpu" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("WGMMA is compute capability 9.0 only")
    check(runner, case, tile)
