"""flash_attn_with_kvcache: the reference against attention over gathered keys, then the kernels on
the simulator and on the GPU against the reference. Bad inputs: test_kvcache_checks.py; what else is
returned or ignored: test_kvcache_results.py."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cache_cases
import oracle
import pytest
import torch
from cache_cases import CASES, LARGE, CacheCase, CacheTensors, call, check_caches, make_cache
from cases import on_both
from conftest import Runner
from torch import Tensor

import flash_attn
from flash_attn.layers.rotary import apply_rotary_emb
from flash_attn_interface import flash_attn_func, flash_attn_with_kvcache
from flash_attn_interface.call import dispatch

BF16 = torch.bfloat16


def copy(tensors: CacheTensors) -> CacheTensors:
    return {n: x.clone() if isinstance(x, Tensor) else x for n, x in tensors.items()}


def check(case: CacheCase, tensors: CacheTensors, runner: Runner | None = None) -> None:
    before = copy(tensors)
    expected, k_want, v_want = cache_cases.expect(case, tensors)
    out, lse = runner.call(call, case, tensors) if runner else call(case, tensors)
    oracle.check(expected, out, lse)
    check_caches(case, before, tensors, k_want, v_want)


# ---- the reference, which CPU tensors run -------------------------------------------------------


def rows(tensor: Tensor, cu_seqlens: Tensor | None, b: int) -> Tensor:
    """(1, rows of sequence b, ...)"""
    if cu_seqlens is None:
        return tensor[b : b + 1]
    return tensor[int(cu_seqlens[b]) : int(cu_seqlens[b + 1])].unsqueeze(0)


def recompute(case: CacheCase, t: CacheTensors, b: int) -> tuple[Tensor, Tensor]:
    """(out, lse) of one sequence: its keys listed one by one, rotation and attention as the public
    functions of training do them."""

    def cached(cache: Tensor, position: int) -> Tensor:
        row = int(t["cache_batch_idx"][b]) if case.batch_idx else b
        if not case.page_size:
            return cache[row, position]
        page = int(t["page_table"][row, position // case.page_size])
        return cache[page, position % case.page_size]

    length = case.capacity if case.whole else case.seqlens[b]
    first = case.leftpad[b] if case.leftpad else 0
    q = rows(t["q"], t.get("cu_seqlens_q"), b)
    keys, values = (
        torch.stack([cached(t[name], p) for p in range(first, length)]).unsqueeze(0)
        if first < length
        else t[name].new_empty(1, 0, *t[name].shape[2:])
        for name in ("k_cache", "v_cache")
    )
    if "k" in t:
        new_k, new_v = (rows(t[name], t.get("cu_seqlens_k_new"), b) for name in ("k", "v"))
        if case.rotary_dim:
            base = case.rotary_seqlens[b] if case.rotary_seqlens else length
            tables = (t["rotary_cos"], t["rotary_sin"], case.interleaved)
            new_k = apply_rotary_emb(new_k, *tables, seqlen_offsets=base)
            if case.causal:
                q = apply_rotary_emb(q, *tables, seqlen_offsets=base)
            else:  # every row at the same position
                parts = [
                    apply_rotary_emb(row, *tables, seqlen_offsets=base) for row in q.split(1, 1)
                ]
                q = torch.cat(parts, 1)
        keys, values = torch.cat([keys, new_k], 1), torch.cat([values, new_v], 1)
    if case.qv:  # q . k + qv . v
        q, keys = (
            torch.cat(both, -1)
            for both in ((q, rows(t["qv"], t.get("cu_seqlens_q"), b)), (keys, values))
        )
    options = case.options
    del options["rotary_interleaved"]
    function: Callable[..., Any] = flash_attn_func
    if case.alibi:
        function = flash_attn.flash_attn_func
        options["alibi_slopes"] = t["alibi_slopes"][b : b + 1]
    out, lse = function(q, keys, values, **options, return_attn_probs=True)[:2]
    return out, lse


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_reference_is_attention_over_the_gathered_keys(case: CacheCase):
    tensors = make_cache(case, "cpu")
    wanted = [recompute(case, tensors, b) for b in range(len(case.seqlens))]
    before = copy(tensors)
    _, k_want, v_want = cache_cases.expect(case, tensors)
    out, lse = call(case, tensors)
    cu_seqlens = tensors.get("cu_seqlens_q")
    for b, (out_want, lse_want) in enumerate(wanted):
        torch.testing.assert_close(rows(out, cu_seqlens, b), out_want, rtol=0.02, atol=0.02)
        by_row = lse.transpose(-1, -2)
        torch.testing.assert_close(
            rows(by_row, cu_seqlens, b), lse_want.transpose(-1, -2), rtol=1e-3, atol=1e-3
        )
    if cu_seqlens is not None:
        end = int(cu_seqlens[-1])
        assert not out[end:].any() and (lse[:, end:] == float("-inf")).all()
    check_caches(case, before, tensors, k_want, v_want)


def test_qv_is_a_second_product():
    case = CacheCase(seqlen_q=3, causal=True)
    tensors = make_cache(case, "cpu")
    qv = torch.randn(*tensors["q"].shape[:-1], case.head_dim_v).to(BF16)
    out, lse = call(case, tensors | {"qv": qv})
    for b, length in enumerate(case.seqlens):
        k, v = (tensors[n][b : b + 1, :length].double() for n in ("k_cache", "v_cache"))
        k, v = (x.repeat_interleave(2, 2) for x in (k, v))
        q = tensors["q"][b : b + 1].double()
        scores = torch.einsum("bihd,bjhd->bhij", q, k)
        scores = (scores + torch.einsum("bihd,bjhd->bhij", qv[b : b + 1].double(), v)) * 96**-0.5
        i, j = torch.arange(3).unsqueeze(1), torch.arange(length)
        scores = scores.masked_fill(j > i + length - 3, float("-inf"))
        want = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).nan_to_num()
        torch.testing.assert_close(out[b : b + 1].double(), want, rtol=0.02, atol=0.02)
        torch.testing.assert_close(lse[b : b + 1].double(), scores.logsumexp(-1))


# ---- the kernels ---------------------------------------------------------------------------------


@on_both([*CASES, *LARGE])
def test_kernels(runner: Runner, case: CacheCase):
    check(case, make_cache(case, runner.device), runner)


def decode(t: CacheTensors, steps: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Appends `steps` tokens one by one; the outputs and caches."""
    q, k, v = t["q"], t["k"], t["v"]
    batch, device = q.shape[0], q.device
    pages = steps // 4
    k_cache = torch.full((batch * pages, 4, *k.shape[2:]), float("nan"), dtype=BF16, device=device)
    v_cache = torch.full((batch * pages, 4, *v.shape[2:]), float("nan"), dtype=BF16, device=device)
    order = torch.randperm(batch * pages, device=device).to(torch.int32)
    table = order.view(batch, pages)
    lengths = torch.zeros(batch, dtype=torch.int32, device=device)
    outs = []
    for step in range(steps):
        new = slice(step, step + 1)
        outs.append(
            flash_attn_with_kvcache(
                q[:, new], k_cache, v_cache, k[:, new], v[:, new], cache_seqlens=lengths,
                page_table=table, causal=True, **options,
            )
        )  # fmt: skip
        lengths += 1
    gathered = k_cache[table.long()].flatten(1, 2)
    return torch.cat(outs, 1), gathered


def test_a_decode_loop_is_one_forward(runner: Runner):
    steps = 64
    t = {
        name: torch.randn(2, steps, heads, dim, device=runner.device).to(BF16)
        for name, heads, dim in (("q", 4, 32), ("k", 2, 32), ("v", 1, 64))
    }
    out, k_cache = runner.call(decode, t, steps)
    want = runner.call(flash_attn_func, t["q"], t["k"], t["v"], causal=True)
    assert torch.equal(k_cache, t["k"])
    torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("page_size", [0, 16], ids=["contiguous", "paged"])
@pytest.mark.parametrize("seqlen_q", [1, 9])
@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"window_size": (20, 3)}, {"leftpad": (30, 1, 17), "softcap": 3.0}],
    ids=["causal", "window", "leftpad-softcap"],
)
def test_one_split_is_bitwise_the_forward(
    runner: Runner, ampere_tree: None, page_size: int, seqlen_q: int, options: dict[str, Any]
):
    case = CacheCase(
        seqlens=(70, 24, 33), capacity=96, page_size=page_size, seqlen_q=seqlen_q, num_splits=1,
        **options,
    )  # fmt: skip
    kept = {name: case.options[name] for name in ("causal", "window_size", "softcap")}
    tensors = make_cache(case, runner.device)
    out, lse = runner.call(call, case, tensors)
    for b, length in enumerate(case.seqlens):
        caches = (tensors["k_cache"], tensors["v_cache"])
        if page_size:
            pages = tensors["page_table"][b, : -(-length // page_size)].long()
            caches = tuple(x[pages].flatten(0, 1)[:length].unsqueeze(0) for x in caches)
        else:
            caches = tuple(x[b : b + 1, :length] for x in caches)
        if case.leftpad:
            caches = tuple(x[:, case.leftpad[b] :] for x in caches)
        q = tensors["q"][b : b + 1]
        want, lse_want = runner.call(flash_attn_func, q, *caches, **kept, return_attn_probs=True)
        assert torch.equal(out[b : b + 1], want)
        assert torch.equal(lse[b : b + 1], lse_want)


def test_one_split_does_not_depend_on_the_batch(runner: Runner):
    case = CacheCase(seqlens=(70, 3, 33, 64), page_size=16, num_splits=1)
    tensors = make_cache(case, runner.device)
    out, lse = runner.call(call, case, tensors)
    for b in range(4):
        alone = {
            name: x[b : b + 1] if name in ("q", "cache_seqlens", "page_table") else x
            for name, x in tensors.items()
        }
        out_alone, lse_alone = runner.call(call, case, alone)
        assert torch.equal(out_alone, out[b : b + 1])
        assert torch.equal(lse_alone, lse[b : b + 1])


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(
    "case",
    [
        CacheCase(seqlens=(33, 33), seqlen_new=2, rotary_dim=16, seqlen_q=2, causal=True),
        CacheCase(seqlens=(33, 33), seqlen_q=2, page_size=16, leftpad=(0, 4)),
    ],
    ids=["append", "read"],
)
def test_lengths_as_one_int(runner: Runner, case: CacheCase, num_splits: int):
    """In turn with tensors and other ints, which share what can be shared."""
    tensors = make_cache(case, runner.device)
    other = copy(tensors) | {"cache_seqlens": 33}
    if case.seqlen_new == 0:
        short = copy(tensors) | {"cache_seqlens": torch.full_like(tensors["cache_seqlens"], 20)}
        want, _ = runner.call(call, case, short, num_splits=num_splits)
        short_out, _ = runner.call(call, case, other, cache_seqlens=20, num_splits=num_splits)
        assert torch.equal(short_out, want)
    out, lse = runner.call(call, case, tensors, num_splits=num_splits)
    out_int, lse_int = runner.call(call, case, other, num_splits=num_splits)
    assert torch.equal(out, out_int) and torch.equal(lse, lse_int)
    check_caches(CacheCase(), tensors, other, tensors["k_cache"], tensors["v_cache"])


def test_caches_of_any_strides(runner: Runner):
    """One buffer for both caches, heads before rows."""
    case = CacheCase(seqlen_new=1).with_dims(64, 64)
    tensors = make_cache(case, runner.device)
    expected, k_want, v_want = cache_cases.expect(case, tensors)
    before = copy(tensors)
    both = torch.stack([tensors["k_cache"], tensors["v_cache"]]).transpose(2, 3).contiguous()
    tensors["k_cache"], tensors["v_cache"] = both.transpose(2, 3)
    out, lse = runner.call(call, case, tensors)
    oracle.check(expected, out, lse)
    check_caches(case, before, tensors, k_want, v_want)


@pytest.mark.parametrize(
    "case",
    [
        CacheCase(seqlens=(0, 5, 33, 61), seqlen_q=0, seqlen_new=3, rotary_dim=32, page_size=16),
        CacheCase(seqlens=(0, 5, 33, 61), lengths_q=(0,), lengths_new=(2, 0, 7, 1)),
    ],
    ids=["dense", "ragged"],
)
@pytest.mark.parametrize("device", ["runner", "reference"])
def test_keys_are_appended_without_a_query(runner: Runner, case: CacheCase, device: str):
    tensors = make_cache(case.but(lengths_q=()), runner.device)
    if case.lengths_q:
        tensors["q"] = tensors["q"][:, 0][:0]
        tensors |= {"cu_seqlens_q": torch.zeros_like(tensors["cu_seqlens_k_new"])}
        tensors |= {"max_seqlen_q": 0}
    before = copy(tensors)
    k_want, v_want = cache_cases.expect_caches(case, tensors)
    if device == "runner":
        out, lse = runner.call(call, case, tensors)
    elif runner.name == "sim":  # CPU tensors
        out, lse = call(case, tensors)
    else:
        pytest.skip("the reference runs on CPU tensors")
    check_caches(case, before, tensors, k_want, v_want)
    assert not torch.equal(tensors["v_cache"].nan_to_num(7), before["v_cache"].nan_to_num(7))
    assert out.shape == ((0, 4, 64) if case.lengths_q else (4, 0, 4, 64))
    assert lse.shape == ((4, 0) if case.lengths_q else (4, 4, 0))


def test_no_queries_and_empty_caches(runner: Runner):
    tensors = make_cache(CacheCase(seqlen_q=0), runner.device)
    out, lse = runner.call(call, CacheCase(seqlen_q=0), tensors)
    assert out.shape == (4, 0, 4, 64) and lse.shape == (4, 4, 0)
    empty = CacheCase(capacity=0, seqlens=(0, 0))
    out, lse = runner.call(call, empty, make_cache(empty, runner.device))
    assert not out.any() and (lse == float("-inf")).all()


# ---- GPU only: graphs, compiled programs ---------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [0, 1, 5])
def test_cuda_graph_with_other_lengths_and_pages(gpu: Runner, num_splits: int):
    case = CacheCase(
        seqlens=(1000, 3, 517), capacity=2048, page_size=64, seqlen_new=1, rotary_dim=32,
        causal=True, num_splits=num_splits,
    ).with_heads(16, 2, 2)  # fmt: skip
    tensors = make_cache(case, gpu.device)
    call(case, copy(tensors))  # compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call(case, tensors)
    for seqlens in ((1000, 3, 517), (0, 2047, 64), (1, 1, 1999)):
        other_case = case.but(seqlens=seqlens)
        other = make_cache(other_case, gpu.device)
        for name, tensor in tensors.items():
            tensor.copy_(other[name])
        expected, k_want, v_want = cache_cases.expect(other_case, other)
        out.fill_(float("nan"))
        graph.replay()
        oracle.check(expected, out, lse)
        check_caches(other_case, other, tensors, k_want, v_want)


@pytest.mark.gpu
def test_lengths_beyond_the_cache_are_clamped_or_reported(
    gpu: Runner, monkeypatch: pytest.MonkeyPatch
):
    case = CacheCase(seqlens=(64, 64), capacity=64, page_size=16)
    tensors = make_cache(case, gpu.device)
    want, _ = call(case, tensors)
    wild = tensors | {"cache_seqlens": torch.tensor([2**30, 64], dtype=torch.int32).cuda()}
    out, _ = call(case, wild)
    assert torch.equal(out, want)
    monkeypatch.setenv("FLASH_ATTN_INTERFACE_CHECK_CACHE", "1")
    dispatch.forget_plans()
    with pytest.raises(ValueError, match="cache_seqlens is"):
        call(case, wild)
    dispatch.forget_plans()


# ---- the example ---------------------------------------------------------------------------------

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "generate.py"


@pytest.mark.parametrize("arguments", [[], pytest.param(["--simulate"], marks=pytest.mark.sim)])
def test_the_example_generates_the_same_with_and_without_a_cache(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    main = runpy.run_path(str(EXAMPLE))["main"]
    assert main([*arguments, "--prompt", "5", "--tokens", "4", "--layers", "1"]) == 0
    assert "tokens/s while decoding" in capsys.readouterr().out
