"""Bad arguments of flash_attn_with_kvcache: each is refused before anything is written, in words
that name the argument, what was given and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from asked import cache_call
from fakes import FakeBackend, pretend_cuda
from torch import Tensor

import flash_attn
from flash_attn_interface import explain_with_kvcache, flash_attn_with_kvcache
from flash_attn_interface._common.ask.check import check
from flash_attn_interface._common.ask.problem import Problem
from flash_attn_interface.call import backends, dispatch, selection

BF16 = torch.bfloat16


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def good() -> dict[str, Any]:
    """Two sequences with 3 and 7 keys in a cache of 12, one new; heads 4/2/1, head dims 32/48."""
    return {
        "q": torch.randn(2, 3, 4, 32, dtype=BF16),
        "k_cache": torch.randn(2, 12, 2, 32, dtype=BF16),
        "v_cache": torch.randn(2, 12, 1, 48, dtype=BF16),
        "k": torch.randn(2, 1, 2, 32, dtype=BF16),
        "v": torch.randn(2, 1, 1, 48, dtype=BF16),
        "cache_seqlens": ints(3, 7),
    }


def rotary(rows: int = 12, columns: int = 16, dtype: torch.dtype = BF16) -> dict[str, Tensor]:
    table = torch.rand(rows, columns, dtype=torch.float32).to(dtype)
    return {"rotary_cos": table, "rotary_sin": table}


def paged(**changes: Any) -> dict[str, Any]:
    return {
        "k_cache": torch.randn(6, 4, 2, 32, dtype=BF16),
        "v_cache": torch.randn(6, 4, 1, 48, dtype=BF16),
        "page_table": ints(0, 1, 2, 3, 4, 5).view(2, 3),
        **changes,
    }


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    # tensors
    ({"q": [1.0]}, TypeError, "q is list: expected a torch.Tensor"),
    ({"k_cache": None}, TypeError, "k_cache is NoneType"),
    ({"k": [1]}, TypeError, "k is list"),
    ({"q": torch.randn(2, 3, 4, 32)}, TypeError, "q has dtype torch.float32"),
    ({"v_cache": torch.randn(2, 12, 1, 48).half()}, TypeError, "v_cache has dtype torch.float16"),
    ({"k": torch.randn(2, 1, 2, 32).half()}, TypeError, "k has dtype torch.float16"),
    (
        {"k_cache": torch.zeros(2, 12, 2, 32).to(torch.float8_e4m3fn)},
        NotImplementedError,
        "k_cache has dtype torch.float8_e4m3fn",
    ),
    (
        {"v_cache": torch.empty(2, 12, 1, 48, dtype=BF16, device="meta")},
        ValueError,
        "v_cache is on",
    ),
    ({"q": torch.randn(2, 4, 32).to(BF16)}, ValueError, "q has shape (2, 4, 32)"),
    ({"k_cache": torch.randn(12, 2, 32).to(BF16)}, ValueError, "k_cache has shape (12, 2, 32)"),
    (
        {"k_cache": torch.randn(2, 12, 32, 2).to(BF16).transpose(2, 3)},
        ValueError,
        "k_cache has stride (768, 64, 1, 2): the last must be 1",
    ),
    ({"v_cache": torch.randn(2, 11, 1, 48).to(BF16)}, ValueError, "v_cache has shape (2, 11"),
    ({"q": torch.randn(2, 3, 4, 40).to(BF16)}, ValueError, "k_cache has head_dim 32 but q has 40"),
    ({"q": torch.randn(2, 3, 3, 32).to(BF16)}, ValueError, "k_cache has 2 heads and q has 3"),
    (
        {"v_cache": torch.randn(2, 12, 1, 600).to(BF16), "v": torch.randn(2, 1, 1, 600).to(BF16)},
        NotImplementedError,
        "v_cache: head_dim is 600, at most",
    ),
    ({"q": torch.randn(3, 3, 4, 32).to(BF16)}, ValueError, "k_cache holds 2 sequences but q has 3"),
    ({"q": torch.randn(0, 3, 4, 32).to(BF16)}, ValueError, "q has 0 sequences"),
    ({"qv": torch.randn(2, 3, 4, 32).to(BF16)}, ValueError, "qv has shape (2, 3, 4, 32)"),
    # new keys and values
    ({"v": None}, ValueError, "k is given without v"),
    ({"k": None}, ValueError, "v is given without k"),
    ({"cache_seqlens": None}, ValueError, "k and v are given without cache_seqlens"),
    ({"k": torch.randn(2, 1, 1, 32).to(BF16)}, ValueError, "k has shape (2, 1, 1, 32)"),
    ({"v": torch.randn(2, 2, 1, 48).to(BF16)}, ValueError, "v (2, 2, 1, 48)"),
    (
        {"k": torch.randn(2, 13, 2, 32).to(BF16), "v": torch.randn(2, 13, 1, 48).to(BF16)},
        ValueError,
        "k has 13 new rows for each sequence but the cache has room for 12",
    ),
    ({"cu_seqlens_k_new": ints(0, 1, 2)}, ValueError, "because cu_seqlens_k_new is given"),
    (
        {"k": None, "v": None, "cu_seqlens_k_new": ints(0, 1, 2)},
        ValueError,
        "cu_seqlens_k_new is given without k and v",
    ),
    # lengths and indices
    ({"cache_seqlens": torch.tensor([3, 7])}, TypeError, "cache_seqlens has dtype torch.int64"),
    ({"cache_seqlens": ints(3)}, ValueError, "cache_seqlens has shape (1,): expected (2,)"),
    ({"cache_seqlens": ints(1, 2, 3, 4)[::2]}, ValueError, "cache_seqlens has stride"),
    ({"cache_seqlens": 12}, ValueError, "cache_seqlens is 12: at most 11 rows fit the cache"),
    ({"cache_seqlens": -1}, ValueError, "cache_seqlens is -1"),
    ({"cache_seqlens": 1.5}, TypeError, "cache_seqlens is 1.5"),
    ({"cache_seqlens": ints(3, 12)}, ValueError, "cache_seqlens is [3, 12]: expected 0 to 12"),
    ({"cache_seqlens": ints(-1, 2)}, ValueError, "cache_seqlens is [-1, 2]"),
    ({"cache_leftpad": ints(3)}, ValueError, "cache_leftpad has shape (1,)"),
    ({"cache_leftpad": ints(5, 0)}, ValueError, "cache_leftpad is [5, 0]: expected 0 to"),
    ({"cache_batch_idx": ints(0, 2)}, ValueError, "cache_batch_idx is [0, 2]: expected 0 to 1"),
    ({"cache_batch_idx": torch.tensor([0, 1])}, TypeError, "cache_batch_idx has dtype"),
    # ragged
    ({"cu_seqlens_q": ints(0, 1, 2), "max_seqlen_q": 1}, ValueError, "because cu_seqlens_q is"),
    (
        {"q": torch.randn(4, 4, 32).to(BF16), "cu_seqlens_q": ints(0, 1, 4)},
        ValueError,
        "max_seqlen_q is None",
    ),
    (
        {"q": torch.randn(4, 4, 32).to(BF16), "cu_seqlens_q": ints(0, 1, 5), "max_seqlen_q": 4},
        ValueError,
        "cu_seqlens_q is [0, 1, 5]",
    ),
    (
        {"q": torch.randn(4, 4, 32).to(BF16), "cu_seqlens_q": ints(0, 1, 4), "max_seqlen_q": 2},
        ValueError,
        "its longest sequence has 3 rows, at most 2",
    ),
    # pages
    (paged(page_table=torch.zeros(2, 3, dtype=torch.int64)), TypeError, "has dtype torch.int64"),
    (paged(page_table=ints(0, 1)), ValueError, "page_table (block_table) has shape (2,)"),
    (paged(page_table=ints(0, 1, 2).view(1, 3)), ValueError, "has 1 rows but q has 2 sequences"),
    (paged(page_table=ints(*range(12)).view(2, 6)[:, ::2]), ValueError, "has stride (6, 2)"),
    (paged(page_table=ints(0, 1, 2, 3, 6, 5).view(2, 3)), ValueError, "expected 0 to 5, the pages"),
    (paged(page_table=ints(-1, 1, 2, 3, 4, 5).view(2, 3)), ValueError, "of its row 0: expected"),
    (paged(cache_batch_idx=ints(0, 2)), ValueError, "rows of page_table"),
    # rotary
    ({"rotary_cos": torch.rand(12, 16).to(BF16)}, ValueError, "rotary_cos is given alone"),
    ({**rotary(), "k": None, "v": None}, ValueError, "are given without k and v"),
    (rotary(dtype=torch.float16), TypeError, "rotary_cos has dtype torch.float16"),
    (rotary(rows=11), ValueError, "rotary_cos and rotary_sin have 11 positions"),
    (rotary(columns=24), ValueError, "so rotary_dim is 48"),
    (rotary(columns=12), ValueError, "so rotary_dim is 24: expected a multiple of 16"),
    (
        {"rotary_cos": torch.rand(12, 16).to(BF16), "rotary_sin": torch.rand(13, 16).to(BF16)},
        ValueError,
        "rotary_sin (13, 16)",
    ),
    (
        {name: table.t() for name, table in rotary(16, 16).items()},
        ValueError,
        "rotary_cos has stride (1, 16): must be contiguous",
    ),
    ({**rotary(), "rotary_seqlens": ints(-1, 0)}, ValueError, "rotary_seqlens is [-1, 0]"),
    # numbers
    ({"num_splits": 257}, ValueError, "num_splits is 257: at most 256"),
    ({"num_splits": -1}, ValueError, "num_splits is -1"),
    ({"num_splits": 1.5}, TypeError, "num_splits is 1.5"),
    ({"sm_margin": -1}, ValueError, "sm_margin is -1"),
    ({"attention_chunk": -1}, ValueError, "attention_chunk is -1"),
    ({"softcap": "no"}, TypeError, "softcap is 'no'"),
    ({"window_size": (1,)}, ValueError, "window_size has 1 items"),
    ({"causal": torch.tensor(True)}, TypeError, "causal is a tensor"),
    ({"k_descale": torch.ones(2, 2)}, NotImplementedError, "k_descale is not supported"),
    ({"scheduler_metadata": 1}, TypeError, "scheduler_metadata is int"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG, ids=[m for _, _, m in WRONG])
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str):
    arguments = good() | changes
    caches = [x for name, x in arguments.items() if "_cache" in name and isinstance(x, Tensor)]
    before = [x.clone() for x in caches if not x.is_meta]
    with pytest.raises(error, match=re.escape(message)):
        flash_attn_with_kvcache(**arguments)
    assert all(
        torch.equal(x.float(), y.float())
        for x, y in zip((x for x in caches if not x.is_meta), before, strict=True)
    )


def test_the_good_arguments_are_good():
    flash_attn_with_kvcache(**good(), **rotary())
    flash_attn_with_kvcache(**good() | paged())


@pytest.mark.parametrize(
    ("slopes", "error", "message"),
    [
        (torch.ones(4, dtype=BF16), TypeError, "alibi_slopes has dtype"),
        (torch.ones(3), ValueError, "alibi_slopes has shape (3,)"),
    ],
)
def test_bad_alibi_slopes(slopes: Tensor, error: type[Exception], message: str):
    with pytest.raises(error, match=re.escape(message)):
        flash_attn.flash_attn_with_kvcache(**good(), alibi_slopes=slopes)


# ---- what passes becomes a problem ---------------------------------------------------------------


def problem(**changes: Any) -> Problem:
    return check(cache_call(**good() | changes))


def test_the_problem_of_a_call():
    p = problem(**rotary(), num_splits=3, sm_margin=2)
    new = p.append
    assert (p.batch, p.seqlen_q, p.seqlen_k, p.cache_slots, p.page_size) == (2, 3, 12, 2, 0)
    assert (p.num_heads_q, p.num_heads_k, p.num_heads_v) == (4, 2, 1)
    assert p.has_seqused_k and not p.varlen and not p.causal and not p.return_lse
    assert not new.one_length and problem(cache_seqlens=3).append.one_length
    assert not problem(cache_seqlens=None, k=None, v=None).append.one_length
    assert (new.seqlen_new, new.total_new, new.varlen_new, new.rotary_dim) == (1, 2, False, 32)
    assert (p.num_splits, p.sm_margin, new.has_cache_seqlens, new.rotary_rows) == (3, 2, True, 12)
    assert new.k_new_strides == (64, 0, 32) and new.new_vector_bytes == 16
    assert "append 1, rotary 32, num_splits=3, sm_margin=2" in p.describe()


def test_capacity_of_pages_is_all_that_the_table_names():
    f = problem(**paged(cache_leftpad=ints(0, 0), cache_batch_idx=ints(1, 0)))
    assert (f.seqlen_k, f.page_size, f.cache_slots, f.total_k) == (12, 4, 6, 24)
    assert f.cache_batch_idx and f.leftpad_k and f.k_strides == (256, 64, 32)


def test_page_tables_that_32_bits_cannot_index():
    arguments = {
        name: x.to("meta") if isinstance(x, Tensor) else x for name, x in (good() | paged()).items()
    }
    for stride in (2**30 - 1, 2**30):
        arguments["page_table"] = torch.empty_strided(
            (2, 3), (stride, 1), dtype=torch.int32, device="meta"
        )
        with nullcontext() if stride < 2**30 else pytest.raises(ValueError, match="must span less"):
            check(cache_call(**arguments))


@pytest.mark.parametrize(
    ("changes", "per_row"),
    [
        ({}, False),
        ({"causal": True}, True),
        ({"window_size": (5, -1)}, True),
        ({"window_size": (11, 2)}, False),  # hides nothing: as wide as the cache on both sides
        ({"attention_chunk": 4}, True),
    ],
)
def test_queries_turn_one_by_one_only_under_a_mask(changes: dict[str, Any], per_row: bool):
    assert problem(**rotary(), **changes).append.rotary_per_row is per_row


def test_no_new_rows_is_no_append():
    nothing = {name: good()[name][:, :0] for name in ("k", "v")}
    assert not problem(**nothing).append.appends
    assert problem(k=None, v=None) == problem(**nothing)


def test_alignment_counts_new_rows_apart():
    shifted = torch.randn(2 * 64 + 1).to(BF16)[1:].view(2, 1, 2, 32)
    p = problem(k=shifted)
    assert (p.append.new_vector_bytes, p.vector_bytes) == (2, 16)


# ---- capacity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("kind", ["int", "tensor", "compiled"])
def test_lengths_on_the_host_beyond_the_capacity_are_refused(kind: str, pages: bool):
    """Also those of a page table, 12 rows here; nothing is clamped that can be read."""
    arguments = good() | (paged() if pages else {})
    before = arguments["k_cache"].clone()
    lengths: Any = ints(3, 12) if kind == "tensor" else 12
    call: Any = flash_attn_with_kvcache
    if kind == "compiled":
        call = torch.compile(call, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="cache_seqlens is .*12") as caught:
        call(**arguments | {"cache_seqlens": lengths})
    assert kind == "compiled" or type(caught.value) is ValueError
    assert torch.equal(arguments["k_cache"], before)
    call(**arguments | {"cache_seqlens": ints(3, 11) if kind == "tensor" else 11})


def test_rotary_seqlens_without_tables_are_ignored():
    """As in FlashAttention-3, whatever they are."""
    want_arguments, arguments = good(), good()
    for name in ("q", "k_cache", "v_cache", "k", "v"):
        arguments[name] = want_arguments[name].clone()
    want = flash_attn_with_kvcache(**want_arguments)
    for ignored in (ints(-1, 5), ints(1), torch.ones(3), "text"):
        got = flash_attn_with_kvcache(**arguments, rotary_seqlens=ignored)  # type: ignore[arg-type]
        assert torch.equal(got, want)


# ---- choice and memory of plans ------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBackend]:
    """Calls of pretended CUDA tensors go to this backend."""
    backend = FakeBackend()
    monkeypatch.setattr(backends, "flash2", lambda: backend)
    device = selection.Device((8, 0), 0)
    monkeypatch.setattr(dispatch, "device_of", lambda tensor: device)
    dispatch.forget_plans()
    yield backend
    dispatch.forget_plans()


def pretended(**changes: Any) -> dict[str, Any]:
    arguments = good() | changes
    return {
        name: pretend_cuda(x)[0] if isinstance(x, Tensor) else x for name, x in arguments.items()
    }


def test_a_plan_is_made_once_for_each_kind_of_call(cuda: FakeBackend):
    for _ in range(3):
        flash_attn_with_kvcache(**pretended())
    assert [len(plan.runs) for plan in cuda.cache_plans] == [3]
    for count, changes in enumerate(
        ({"causal": True}, {"num_splits": 2}, {"sm_margin": 1}, {"cache_leftpad": ints(0, 0)},
         {"cache_batch_idx": ints(0, 1)}, paged(), rotary(),
         {"q": torch.randn(2, 2, 4, 32).to(BF16)},
         {"return_softmax_lse": True}, {**rotary(), "rotary_interleaved": False},
         {"cu_seqlens_q": ints(0, 1, 3), "q": torch.randn(3, 4, 32).to(BF16), "max_seqlen_q": 2}),
        start=2,
    ):  # fmt: skip
        flash_attn_with_kvcache(**pretended(**changes))
        flash_attn_with_kvcache(**pretended(**changes))
        assert len(cuda.cache_plans) == count, changes


def test_warm_calls_are_still_checked(cuda: FakeBackend):
    flash_attn_with_kvcache(**pretended(cache_seqlens=3))
    with pytest.raises(ValueError, match="cache_seqlens is 12"):
        flash_attn_with_kvcache(**pretended(cache_seqlens=12))
    with pytest.raises(TypeError, match="cache_seqlens has dtype"):
        flash_attn_with_kvcache(**pretended(cache_seqlens=torch.tensor([3, 7])))
    with pytest.raises(TypeError, match="softmax_scale"):
        flash_attn_with_kvcache(**pretended(softmax_scale=[1]))


def test_a_warm_call_with_overlapping_caches_is_refused(cuda: FakeBackend):
    """The plan is known by then, and with it the layouts; addresses are looked at every time."""
    arguments = pretended() | {"v_cache": pretend_cuda(torch.zeros(2, 12, 2, 32, dtype=BF16))[0]}
    arguments |= {"v": arguments["k"].clone()}
    for _ in range(3):
        flash_attn_with_kvcache(**arguments)
    with pytest.raises(ValueError, match="v_cache overlaps k_cache"):
        flash_attn_with_kvcache(**arguments | {"v_cache": arguments["k_cache"]})
    with pytest.raises(ValueError, match="k_cache overlaps k in memory"):
        flash_attn_with_kvcache(**arguments | {"k": arguments["k_cache"][:, 4:5].view(2, 1, 2, 32)})
    with pytest.raises(TypeError, match="causal is 0.0"):
        flash_attn_with_kvcache(**arguments, causal=0.0)  # type: ignore[arg-type]
    flash_attn_with_kvcache(**arguments)
    assert len(cuda.cache_plans) <= 2


def test_values_on_a_gpu_are_read_only_when_asked_to(
    cuda: FakeBackend, monkeypatch: pytest.MonkeyPatch
):
    wild = pretended(cache_leftpad=ints(5, 0))
    flash_attn_with_kvcache(**wild)
    monkeypatch.setenv("FLASH_ATTN_INTERFACE_CHECK_CACHE", "1")
    dispatch.forget_plans()
    flash_attn_with_kvcache(**pretended(cache_leftpad=ints(3, 0)))
    with pytest.raises(ValueError, match="cache_leftpad is"):
        flash_attn_with_kvcache(**wild)


def test_a_tree_that_refuses_says_why(cuda: FakeBackend):
    cuda.refusal = "it is Monday"
    with pytest.raises(NotImplementedError, match="over a cache, append 1.*flash2: it is Monday"):
        flash_attn_with_kvcache(**pretended())


# ---- explain_with_kvcache ------------------------------------------------------------------------


def test_explain_names_the_kernels_and_the_splits():
    shapes = {"q": (16, 1, 32, 64), "k_cache": (900, 16, 8, 64), "v_cache": (900, 16, 4, 128)}
    others = {"cache_seqlens": (16,), "page_table": (16, 50), "arch": "sm_80"}
    new = {"k": (16, 1, 8, 64), "v": (16, 1, 4, 128)}
    answer = explain_with_kvcache(**shapes, **others, **new, num_splits=3, causal=True)
    assert answer.backend == "flash2" and "append 1" in str(answer)
    for part in ("flash2_append", "flash2_decode", "3 splits", "merged by the last"):
        assert part in answer.plan
    assert "flash2_fwd" in explain_with_kvcache(**shapes, **others, num_splits=1).plan
    assert explain_with_kvcache(**shapes, cache_seqlens=5, page_table=(16, 50)).backend
    with_qv = explain_with_kvcache(**shapes, **others, qv=(16, 1, 32, 128))
    assert with_qv.backend == "flash2" and ", qv" in str(with_qv)
    with pytest.raises(ValueError, match="num_splits is 999"):
        explain_with_kvcache(**shapes, **others, num_splits=999)
