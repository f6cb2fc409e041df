"""The forward over keys in a cache: pages, slots by index, left padding.

The order of all sums is that of contiguous keys, so results equal those of `flash_attn_func` on the
gathered keys bit by bit. Slots without a key are NaN and unneeded page numbers are out of range.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from asked import cache_call
from cache_cases import CacheCase, CacheTensors, make_cache
from cases import on_both
from conftest import Runner
from paged_cases import HUGE, Paged, PagedCase, make_paged
from torch import Tensor

import flash_attn
import flash_attn_interface
from flash_attn_interface._common.ask.check import check
from flash_attn_interface._common.ask.problem import Problem
from flash_attn_interface._common.features.kv import page_division
from flash_attn_interface._flash2.fwd import ForwardPlan
from flash_attn_interface.call.selection import device_of, target_for

# ---- flash_attn_varlen_func(block_table=...) ----------------------------------------------------


CASES = [
    *[PagedCase(size, causal=True) for size in (1, 3, 16, 64, 256)],
    PagedCase(),
    PagedCase(16, dtype="fp16", head_dim_qk=64, head_dim_v=128, causal=True, heads=(4, 1, 2)),
    PagedCase(5, window_size=(20, 6)),
    PagedCase(8, softcap=2.0, alibi=True, causal=True),
    PagedCase(16, dropout_p=0.2),
    PagedCase(16, lengths_k=(0, 150, 0, 31), causal=True),
    PagedCase(16, head_dim_qk=192, head_dim_v=128, lengths_q=(9, 40), lengths_k=(70, 33)),
    PagedCase(4, head_dim_qk=59, head_dim_v=40, step=1),
]
LARGE = [
    PagedCase(
        size, (900, 1, 2000), (4000, 900, 3001), head_dim_qk=dims[0], head_dim_v=dims[1],
        heads=(8, 2, 2), causal=True, only_gpu=True,
    )
    for dims in ((64, 128), (128, 128), (96, 192), (128, 256), (192, 128), (256, 256))
    for size in (16, 256)
]  # fmt: skip


@on_both([*CASES, *LARGE])
def test_pages_equal_packed_keys_bit_by_bit(runner: Runner, ampere_tree: None, case: PagedCase):
    x = make_paged(case, runner.device)
    results = []
    for k, v, more in ((x.k_pages, x.v_pages, {"block_table": x.table}), (x.k, x.v, {})):
        torch.manual_seed(9)
        results.append(
            runner.call(
                flash_attn.flash_attn_varlen_func, x.q, k, v, **x.lengths(case), **case.options,
                **more, return_attn_probs=case.dropout_p == 0.0,
            )
        )  # fmt: skip
    if case.dropout_p > 0.0:
        assert torch.equal(*results)
        return
    (out, lse, _), (out_packed, lse_packed, _) = results
    assert not out.isnan().any()
    assert torch.equal(out, out_packed)
    assert torch.equal(lse, lse_packed)
    assert out.abs().sum() > 0


@pytest.mark.parametrize("case", [CASES[1], CASES[7], CASES[8], CASES[10]], ids=lambda c: c.id)
def test_the_reference_gathers_pages(case: PagedCase):
    x = make_paged(case, "cpu")
    lengths = x.lengths(case) | case.options
    function = flash_attn.flash_attn_varlen_func
    paged = function(
        x.q, x.k_pages, x.v_pages, **lengths, block_table=x.table, return_attn_probs=True
    )
    packed = function(x.q, x.k, x.v, **lengths, return_attn_probs=True)
    assert torch.equal(paged[0], packed[0])
    assert torch.equal(paged[1], packed[1])


@on_both([CASES[1]])
def test_the_private_operation_takes_tables_padding_and_lengths(
    runner: Runner, ampere_tree: None, case: PagedCase
):
    """leftpad_k hides the first keys, seqused_k the last; masks count from the first visible."""
    x = make_paged(case, runner.device)
    leftpad, used = [3, 17, 0, 33], [70, 101, 2, 33]
    integers = {
        "leftpad_k": torch.tensor(leftpad, dtype=torch.int32, device=runner.device),
        "seqused_k": torch.tensor(used, dtype=torch.int32, device=runner.device),
    }
    starts = [0, *accumulate(case.lengths_k)]
    rows = [
        torch.arange(starts[b] + leftpad[b], starts[b] + used[b], device=runner.device)
        for b in range(4)
    ]
    visible = [len(r) for r in rows]
    ends = torch.tensor([0, *accumulate(visible)], dtype=torch.int32, device=runner.device)
    operation = flash_attn.flash_attn_interface._flash_attn_varlen_forward
    lengths = (max(case.lengths_q), max(case.lengths_k), 0.0, 0.2, True)
    chosen = torch.cat(rows)
    want = runner.call(operation, x.q, x.k[chosen], x.v[chosen], x.cu_seqlens_q, ends, *lengths)
    for k, v, table in ((x.k_pages, x.v_pages, x.table), (x.k, x.v, None)):
        got = runner.call(
            operation, x.q, k, v, x.cu_seqlens_q, x.cu_seqlens_k, *lengths, block_table=table,
            num_splits=1, **integers,
        )  # fmt: skip
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


# ---- the kernel over caches of every kind -------------------------------------------------------


def run_forward(
    runner: Runner, problem: Problem, t: CacheTensors, **changes: Any
) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse) of the kernel."""
    call = cache_call(**(t | changes))
    tensors = call.tensors._replace(seqused_k=call.cache.seqlens)
    with runner.active():
        target = target_for("flash2", device_of(tensors.q))
        out, lse, _ = ForwardPlan(problem, target).run(tensors)
    return out, lse


def problem_of(case: CacheCase, tensors: CacheTensors) -> Problem:
    return check(cache_call(**tensors, **case.options, return_lse=True))


def gathered(case: CacheCase, t: CacheTensors, b: int) -> tuple[Tensor, Tensor]:
    """The visible keys and values of one sequence, (1, keys, heads, dim)."""
    row = int(t["cache_batch_idx"][b]) if case.batch_idx else b
    first = case.leftpad[b] if case.leftpad else 0
    at = torch.arange(first, case.seqlens[b])
    index: tuple[Any, ...] = (row, at)
    if case.page_size:
        pages = t["page_table"][row].cpu()[at // case.page_size].long()
        index = (pages, at % case.page_size)
    return t["k_cache"][index].unsqueeze(0), t["v_cache"][index].unsqueeze(0)


_CACHE = CacheCase(seqlens=(0, 5, 233, 64), seqlen_q=3, capacity=240, causal=True)
CACHES = [
    _CACHE,
    _CACHE.but(batch_idx=True),
    _CACHE.but(leftpad=(0, 2, 18, 64)),
    _CACHE.but(batch_idx=True, leftpad=(0, 5, 101, 33)).with_heads(4, 1, 2),
    *[
        _CACHE.but(batch_idx=True, leftpad=(0, 5, 101, 33), page_size=size)
        for size in (1, 3, 16, 64, 256)
    ],
    _CACHE.but(leftpad=(0, 5, 101, 33), page_size=16, causal=False, window_size=(30, 2)),
    _CACHE.but(leftpad=(0, 5, 101, 33), page_size=16, causal=False, attention_chunk=16),
    _CACHE.but(page_size=16, causal=False, softcap=2.0, seqlen_q=130),
    _CACHE.but(page_size=16, alibi=True, leftpad=(0, 2, 18, 33)),
    _CACHE.but(page_size=5, lengths_q=(1, 0, 4, 2), leftpad=(0, 2, 18, 33)),
]


@on_both(CACHES)
def test_caches_equal_gathered_keys_bit_by_bit(runner: Runner, ampere_tree: None, case: CacheCase):
    t = make_cache(case, runner.device)
    out, lse = run_forward(runner, problem_of(case, t), t)
    for b in range(len(case.seqlens)):
        keys, values = gathered(case, t, b)
        options = {"causal": case.causal, "window_size": case.window_size, "softcap": case.softcap}
        if case.lengths_q:
            rows = slice(sum(case.lengths_q[:b]), sum(case.lengths_q[: b + 1]))
            q, out_b, lse_b = t["q"][rows], out[rows], lse[:, rows]
        else:
            q, out_b, lse_b = t["q"][b], out[b], lse[b]
        if case.alibi:
            slopes = t["alibi_slopes"][b]
            function: Any = flash_attn.flash_attn_func
            options |= {"alibi_slopes": slopes}
        else:
            function = flash_attn_interface.flash_attn_func
            options |= {"attention_chunk": case.attention_chunk}
        want, want_lse, *_ = runner.call(
            function, q.unsqueeze(0), keys, values, **options, return_attn_probs=True
        )
        assert torch.equal(out_b, want[0])
        assert torch.equal(lse_b, want_lse[0])


@on_both([_CACHE.but(page_size=16, leftpad=(0, 5, 101, 33)), _CACHE])
def test_a_sequence_does_not_depend_on_its_batch_or_capacity(runner: Runner, case: CacheCase):
    t = make_cache(case, runner.device)
    problem = problem_of(case, t)
    out, lse = run_forward(runner, problem, t)
    pages = {}
    if case.page_size:
        pages["page_table"] = t["page_table"][2:3, :15].contiguous()
    else:
        pages |= {"k_cache": t["k_cache"][2:3, :233], "v_cache": t["v_cache"][2:3, :233]}
    one = {
        name: t[name][2:3] for name in ("q", "cache_seqlens", "cache_leftpad") if name in t
    } | pages
    alone = {**t, **one}
    out_alone, lse_alone = run_forward(runner, problem_of(case, alone), alone)
    assert torch.equal(out[2:3], out_alone)
    assert torch.equal(lse[2:3], lse_alone)


# Data out of range is clamped: the simulator would report an access outside of the tensors.


@on_both([_CACHE.but(page_size=16, batch_idx=True, leftpad=(0, 5, 101, 33))])
@pytest.mark.parametrize("value", [HUGE, -HUGE, -1])
@pytest.mark.parametrize(
    "name", ["page_table", "cache_batch_idx", "cache_seqlens", "cache_leftpad"]
)
def test_wild_data_reads_nothing_outside(runner: Runner, case: CacheCase, name: str, value: int):
    t = make_cache(case, runner.device)
    problem = problem_of(case, t)
    out, lse = run_forward(runner, problem, t, **{name: torch.full_like(t[name], value)})
    if name == "cache_seqlens" and value < 0:
        assert torch.count_nonzero(out) == 0
        assert (lse == float("-inf")).all()
    if name == "cache_leftpad":  # clamped to the length, or to 0
        clamped = torch.full_like(t[name], 0) if value < 0 else t["cache_seqlens"]
        want, _ = run_forward(runner, problem, t, cache_leftpad=clamped)
        assert torch.equal(out.nan_to_num(7.0), want.nan_to_num(7.0))


@on_both([_CACHE.but(batch_idx=True)])
def test_wild_slots_are_clamped(runner: Runner, case: CacheCase):
    t = make_cache(case, runner.device)
    wild = torch.tensor([HUGE, -1, 8, 3], dtype=torch.int32, device=runner.device)
    t["k_cache"].nan_to_num_(0.5)
    t["v_cache"].nan_to_num_(0.5)
    problem = problem_of(case, t)
    out, _ = run_forward(runner, problem, t, cache_batch_idx=wild)
    want, _ = run_forward(runner, problem, t, cache_batch_idx=wild.clamp(0, 7))
    assert torch.equal(out, want)


# ---- planning and refusals ----------------------------------------------------------------------

PLAIN = {"page_size": 0, "cache_batch_idx": False, "leftpad_k": False}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 48, 255, 256, 257, 2**20, 2**29 - 1])
def test_pages_are_found_by_multiplication(size: int):
    magic, shift = page_division(size)
    assert magic < 2**32
    last = HUGE // size * size
    for n in (0, 1, size - 1, size, size + 1, last - 1, last, HUGE):
        assert (2 * n * magic >> 32) >> shift == n // size


def test_no_tile_depends_on_the_batch_or_on_lengths():
    """So that a sequence gives the same bits whatever it is batched with."""
    case = _CACHE.but(page_size=16, leftpad=(0, 5, 101, 33))
    problem = problem_of(case, make_cache(case, "cpu"))
    with Runner("sim", torch.device("cpu")).active():
        target = target_for("flash2", device_of(torch.empty(0)))
    spec = ForwardPlan(problem, target).spec
    larger = replace(
        problem, batch=500, seqlen_q=1, seqlen_k=2**20, total_q=500, cache_slots=9, total_k=144
    )
    assert ForwardPlan(larger, target).spec == spec
    plain = ForwardPlan(replace(problem, **PLAIN), target).spec
    for name in ("block_m", "block_n", "num_warps", "num_stages", "q_in_registers"):
        assert spec[name] == plain[name]


def paged_call(x: Paged | None = None, **changes: Any) -> Any:
    x = x or make_paged(PagedCase(), "cpu")
    arguments = {"q": x.q, "k": x.k_pages, "v": x.v_pages, "block_table": x.table}
    return flash_attn.flash_attn_varlen_func(**arguments | x.lengths(PagedCase()) | changes)


BAD_TABLES = {
    "int64": (TypeError, torch.int32, lambda t: t.long()),
    "list": (TypeError, "list", lambda t: t.tolist()),
    "one row": (ValueError, r"expected \(batch, max_pages\)", lambda t: t[:1]),
    "one dim": (ValueError, r"expected \(batch, max_pages\)", lambda t: t[0]),
    "transposed": (ValueError, "the last must be 1", lambda t: t.T.contiguous().T),
    "too narrow": (ValueError, "has room for", lambda t: t[:, :4].contiguous()),
    "beyond the pages": (ValueError, "uses pages", lambda t: t + 2**20),
    "negative": (ValueError, "uses pages", lambda t: torch.full_like(t, -1)),
}


@pytest.mark.parametrize("bad", BAD_TABLES)
def test_bad_tables_are_named(bad: str):
    kind, text, change = BAD_TABLES[bad]
    table = make_paged(PagedCase(), "cpu").table
    with pytest.raises(kind, match=f"block_table.*{text}" if isinstance(text, str) else "int32"):
        paged_call(block_table=change(table))


def test_bad_pages_are_named():
    x = make_paged(PagedCase(), "cpu")
    with pytest.raises(ValueError, match=r"expected \(num_pages, page_size, num_heads, head_dim\)"):
        paged_call(x, k=x.k, v=x.v)
    with pytest.raises(ValueError, match="v has shape"):
        paged_call(x, v=x.v_pages[1:])
    with pytest.raises(ValueError, match="page size"):
        paged_call(x, k=x.k_pages[:, :0], v=x.v_pages[:, :0])
    with pytest.raises(TypeError, match="cu_seqlens_k"):
        paged_call(cu_seqlens_k=None)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_only_a_backward_through_pages_or_padding_is_refused(name: str):
    """A model runs with gradients on, as upstream's; what it cannot do is learn through this."""
    x = make_paged(PagedCase(), "cpu")
    given = {"q": x.q, "k": x.k_pages, "v": x.v_pages}[name].clone().requires_grad_()
    out = paged_call(x, **{name: given})
    assert torch.equal(out, paged_call(x)) and out.requires_grad
    with pytest.raises(NotImplementedError, match=r"block_table.*index_select"):
        out.sum().backward()
    with torch.no_grad():
        assert not paged_call(x, **{name: given}).requires_grad
    out, lse, s_dmask = paged_call(x, **{name: given}, return_attn_probs=True)
    assert lse.requires_grad and s_dmask.shape == (0,)

    operation = flash_attn.flash_attn_interface._flash_attn_varlen_forward
    tensors = {"q": x.q, "k": x.k, "v": x.v} | ({name: given} if name == "q" else {})
    tensors = {n: t.detach().requires_grad_() for n, t in tensors.items()}
    out, *_ = operation(
        *tensors.values(), x.cu_seqlens_q, x.cu_seqlens_k, 130, 150, 0.0, 0.2, False,
        leftpad_k=torch.zeros(4, dtype=torch.int32),
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="leftpad_k"):
        out.sum().backward()


def test_the_private_operation_refuses_splits_of_pages():
    """As FlashAttention-2's, rather than ignoring num_splits."""
    x = make_paged(PagedCase(), "cpu")
    operation = flash_attn.flash_attn_interface._flash_attn_varlen_forward
    arguments = (
        x.q, x.k_pages, x.v_pages, x.cu_seqlens_q, x.cu_seqlens_k, 130, 150, 0.0, 0.2, False,
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="num_splits is 2.* block_table"):
        operation(*arguments, block_table=x.table, num_splits=2)
    with pytest.raises(ValueError, match="num_splits is 257"):
        operation(*arguments, block_table=x.table, num_splits=257)
    assert operation(*arguments, block_table=x.table, num_splits=1)[0].isfinite().all()


@pytest.mark.filterwarnings("ignore")
def test_paged_keys_compile_without_a_graph_break():
    x = make_paged(PagedCase(), "cpu")

    def function(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        lengths = x.lengths(PagedCase())
        return flash_attn.flash_attn_varlen_func(q, k, v, **lengths, block_table=table) * 2

    arguments = (x.q, x.k_pages, x.v_pages, x.table)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), function(*arguments))
    wants = x.q.clone().requires_grad_()
    with pytest.raises(Exception, match="index_select"):
        compiled(wants, *arguments[1:])


def test_s_dmask_is_refused():
    with (
        pytest.raises(NotImplementedError, match="S_dmask"),
        flash_attn_interface.simulate("sm_80"),
    ):
        paged_call(dropout_p=0.1, return_attn_probs=True)


def test_no_keys_at_all():
    x = make_paged(PagedCase(), "cpu")
    none = torch.zeros_like(x.cu_seqlens_k)
    for changes in (
        {"block_table": x.table[:, :0]},
        {"k": x.k_pages[:0], "v": x.v_pages[:0]},
        {},
    ):
        for arch in (None, "sm_80"):
            if arch is None:
                out = paged_call(x, cu_seqlens_k=none, **changes)
            else:
                with flash_attn_interface.simulate(arch):
                    out = paged_call(x, cu_seqlens_k=none, **changes)
            assert torch.count_nonzero(out) == 0


def test_explain_shows_pages_and_that_there_is_no_backward():
    shape = (20, 16, 2, 64)
    found = flash_attn_interface.explain(
        (50, 4, 64), shape, shape, cu_seqlens_q=(3,), cu_seqlens_k=(3,), max_seqlen_q=40,
        max_seqlen_k=100, block_table=(2, 9), arch="sm_90", verbose=True,
    )  # fmt: skip
    assert found.backend == "flash2"
    assert found.constants["paged"] is True
    assert "page_size=16" in str(found)
    assert found.backward is not None
    assert "contiguous keys" in found.backward.error
    assert found.problem.seqlen_k == 144
