"""What flash_attn_with_kvcache returns and ignores, and flash_attn_combine."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cache_cases import CacheCase, call, make_cache
from conftest import Runner
from torch import Tensor

import flash_attn
from flash_attn_interface import (
    flash_attn_combine,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
    simulate,
)

BF16 = torch.bfloat16

# ---- results, hints, gradients -------------------------------------------------------------------


def test_what_the_two_signatures_return():
    case = CacheCase()
    t = make_cache(case, "cpu")
    options = {"cache_seqlens": t["cache_seqlens"]}
    args = (t["q"], t["k_cache"], t["v_cache"])
    fa2, fa3 = flash_attn.flash_attn_with_kvcache, flash_attn_with_kvcache
    out = fa2(*args, **options)
    assert isinstance(out, Tensor) and torch.equal(out, fa3(*args, **options))
    two = fa2(*args, **options, return_softmax_lse=True)
    four = fa3(*args, **options, return_softmax_lse=True)
    assert len(two) == 2 and len(four) == 4
    assert two[1].dtype == torch.float32 and two[1].shape == (4, 4, 1)
    assert torch.equal(two[1], four[1]) and four[2].numel() == four[3].numel() == 0


def test_scheduler_metadata_is_accepted_and_changes_nothing():
    case = CacheCase()
    t = make_cache(case, "cpu")
    metadata = get_scheduler_metadata(
        4, 1, case.capacity, 4, 2, 32, t["cache_seqlens"], headdim_v=64, page_size=16
    )
    assert metadata.dtype == torch.int32 and metadata.ndim == 1
    out, _ = call(case, t, scheduler_metadata=metadata)
    assert torch.equal(out, call(case, t)[0])
    assert torch.equal(out, call(case, t, pack_gqa=True, sm_margin=4)[0])
    with pytest.raises(ValueError, match="scheduler_metadata has shape"):
        call(case, t, scheduler_metadata=metadata[:3])
    with pytest.raises(TypeError, match="scheduler_metadata has dtype"):
        call(case, t, scheduler_metadata=metadata.float())


def test_gradients_are_refused_where_they_are_asked_for():
    t = make_cache(CacheCase(), "cpu")
    q = t["q"].requires_grad_()
    out = flash_attn_with_kvcache(q, t["k_cache"], t["v_cache"], cache_seqlens=t["cache_seqlens"])
    with pytest.raises(NotImplementedError, match="no backward"):
        out.sum().backward()
    with torch.no_grad():
        again, _ = call(CacheCase(), t)
    assert torch.equal(out, again) and not again.requires_grad


# ---- flash_attn_combine --------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [None, pytest.param("sm_80", marks=pytest.mark.sim)])
def test_combine_merges_and_ignores_empty_parts(arch: str | None):
    with nullcontext() if arch is None else simulate(arch):
        check_combine(torch.device("cpu"))


@pytest.mark.gpu
def test_combine_on_a_gpu(gpu: Runner):
    check_combine(gpu.device)


def check_combine(device: torch.device) -> None:
    out = torch.randn(5, 2, 7, 3, 24, device=device)
    lse = torch.randn(5, 2, 3, 7, device=device).transpose(2, 3)
    lse[1] = float("-inf")
    lse[:, 0, 2] = float("-inf")
    out[1] = float("nan")
    merged, total = flash_attn_combine(out, lse)
    kept = [0, 2, 3, 4]
    want = (torch.softmax(lse[kept], 0).nan_to_num().unsqueeze(-1) * out[kept]).sum(0)
    torch.testing.assert_close(merged, want)
    torch.testing.assert_close(total, torch.logsumexp(lse[kept], 0))
    assert total.stride() == (21, 1, 7) and not merged[0, 2].any()
    again, _ = flash_attn_combine(out, lse.contiguous())
    torch.testing.assert_close(again, want)
    target = torch.empty(2, 7, 3, 24, dtype=BF16, device=device)
    assert flash_attn_combine(out, lse, target)[0] is target
    assert torch.equal(target, flash_attn_combine(out, lse, out_dtype=BF16)[0])
    columns = torch.empty(2, 7, 24, 3, device=device).transpose(2, 3)
    assert flash_attn_combine(out, lse, columns)[0] is columns and torch.equal(columns, merged)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"out_partial": torch.zeros(5, 2, 7, 3, 24).half()}, TypeError, "out_partial has dtype"),
        ({"out_partial": torch.zeros(5, 2, 7, 24)}, ValueError, "out_partial has shape"),
        ({"lse_partial": torch.zeros(5, 2, 3, 7)}, ValueError, "lse_partial has shape"),
        ({"out": torch.zeros(2, 7, 3, 25)}, ValueError, "out has shape (2, 7, 3, 25)"),
        ({"out_dtype": torch.float64}, TypeError, "out_dtype is torch.float64"),
        (
            {"out": torch.zeros(2, 7, 3, 24), "out_dtype": BF16},
            TypeError,
            "out_dtype is torch.bfloat16 but out has torch.float32",
        ),
    ],
)
def test_bad_arguments_of_combine(changes: dict[str, Any], error: type[Exception], message: str):
    arguments = {"out_partial": torch.zeros(5, 2, 7, 3, 24), "lse_partial": torch.zeros(5, 2, 7, 3)}
    with pytest.raises(error, match=re.escape(message)):
        flash_attn_combine(**arguments | changes)
