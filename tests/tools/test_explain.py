"""explain(): what it says about a call, on machines with and without a GPU."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from fakes import FakeBackend, qkv

import flash_attn
from flash_attn_interface import explain, explain_with_kvcache, flash_attn_with_kvcache, simulate
from flash_attn_interface._common import env
from flash_attn_interface.call import backends, dispatch

SHAPES = ((2, 512, 8, 64), (2, 512, 8, 64), (2, 512, 8, 128))
CACHES = ((16, 1, 32, 128), (16, 8192, 8, 128), (16, 8192, 8, 128))


@pytest.fixture(autouse=True)
def fake(monkeypatch, tmp_path) -> FakeBackend:
    backend = FakeBackend()
    monkeypatch.setattr(backends, "flash2", lambda: backend)
    monkeypatch.setattr(backends, "hopper", lambda: None)
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path / "cache"))
    dispatch.forget_plans()
    yield backend
    dispatch.forget_plans()


def test_shapes_and_an_arch_need_no_gpu(fake, tmp_path):
    explanation = explain(*SHAPES, causal=True, arch="sm_86")
    assert explanation.backend == "flash2"
    assert explanation.decision.target.arch == "sm_86"
    assert explanation.problem.head_dim_v == 128 and explanation.problem.causal
    assert (explanation.grid, explanation.smem_bytes) == (7, 1024)
    assert explanation.constants["head_dim_qk"] == 64
    assert explanation.cache_folder.parent == tmp_path / "cache"
    assert "not compiled yet" in explanation.cache_state
    assert not fake.plans[0].runs


def test_text_names_the_five_hops_and_the_backward(tmp_path):
    text = str(explain(*SHAPES, causal=True, arch="sm_80", verbose=True))
    titles = [line[:11].strip() for line in text.splitlines() if line[0] != " "]
    hops = ["1 problem", "2 backend", "3 plan", "4 cubin", "5 kernel"]
    assert titles == [*hops, "backward"]
    for part in (
        "bf16 qk64 v128, heads 8/8/8, batch 2, seqlen 512x512, causal",
        "flash2 for sm_80, cuda:0: first of the installed kernel trees",
        "7 CTAs",
        str(tmp_path / "cache"),
        "flash2_fwd in flash2/fwd.cu",
        "num_threads",
    ):
        assert part in text


def test_cpu_tensors_are_explained_as_they_would_run(fake):
    q, k, v = qkv()
    explanation = explain(q, k, v)
    assert explanation.backend == "reference" and explanation.spec is None
    assert "reference" in str(explanation) and not fake.plans
    with simulate("sm_80"):
        explanation = explain(q, k, v)
    assert explanation.backend == "flash2" and "simulator" in explanation.cache_state


def test_refusals_are_shown(monkeypatch):
    monkeypatch.setattr(backends, "hopper", lambda: FakeBackend("hopper", refusal="no dropout"))
    explanation = explain(*SHAPES, dropout_p=0.1, arch="sm_90")
    assert explanation.backend == "flash2"
    assert explanation.refused == {"hopper": "no dropout"}
    assert "not hopper: no dropout" in str(explanation)


def test_a_call_that_nobody_serves_is_explained_not_raised(fake):
    fake.refusal = "too wide"
    explanation = explain(*SHAPES, arch="sm_80")
    assert explanation.backend is None and explanation.refused == {}
    assert "flash2: too wide" in str(explanation)


def test_calls_that_launch_nothing():
    explanation = explain((2, 0, 8, 64), *SHAPES[1:], arch="sm_80")
    assert explanation.backend == "flash2" and explanation.spec is None
    assert "without a launch" in str(explanation)


def test_ragged_shapes_and_mixed_tensors():
    explanation = explain(
        (7, 4, 16), (7, 2, 16), torch.empty(7, 2, 24, device="meta", dtype=torch.float16),
        cu_seqlens_q=(3,), cu_seqlens_k=torch.tensor([0, 5, 7], dtype=torch.int32),
        max_seqlen_q=4, max_seqlen_k=torch.tensor(5), seqused_k=[2],
        alibi_slopes=(4,), dtype=torch.float16, arch="sm_80",
    )  # fmt: skip
    problem = explanation.problem
    assert problem.varlen_q and problem.varlen_k and problem.has_seqused_k and problem.alibi
    assert (problem.dtype, problem.seqlen_q, problem.seqlen_k) == ("fp16", 4, 5)


def test_errors_of_arguments_are_raised():
    with pytest.raises(ValueError, match="k has head_dim"):
        explain((2, 5, 4, 16), (2, 5, 4, 8), (2, 5, 4, 8), arch="sm_80")
    with pytest.raises(TypeError, match="q is NoneType"):
        explain(None, *SHAPES[1:], arch="sm_80")
    with pytest.raises(ValueError, match="sm_75"):
        explain(*SHAPES, arch="sm_75")


def test_five_lines_by_default(fake, monkeypatch):
    """Of a call with a kernel, of one without, of CPU tensors, of one that no backend serves."""
    monkeypatch.setattr(backends, "hopper", lambda: FakeBackend("hopper", refusal="one\ntwo"))
    explanations = [
        explain(*SHAPES, causal=True, arch="sm_90"),
        explain((2, 0, 8, 64), *SHAPES[1:], arch="sm_80"),
        explain(*qkv()),
    ]
    fake.refusal = "too wide"
    explanations.append(explain(*SHAPES, arch="sm_80"))
    for explanation in explanations:
        titles = [line[:11].strip() for line in str(explanation).splitlines()]
        assert titles == ["problem", "backend", "kernel", "compiled", "backward"]
    text = str(explanations[0])
    for part in ("causal", "not hopper: one two", "flash2_fwd in flash2/fwd.cu, 7 CTAs"):
        assert part in text
    assert str(explanations[0].cache_folder) in text
    assert "flash2: too wide" in str(explanations[3])


def test_verbose_is_a_flag():
    for function, shapes in ((explain, SHAPES), (explain_with_kvcache, CACHES)):
        with pytest.raises(TypeError, match="verbose"):
            function(*shapes, verbose="yes", arch="sm_80")


def test_everything_is_json_too(fake):
    for causal in (False, True):
        record = explain(*SHAPES, causal=causal, arch="sm_80").to_dict()
        assert json.loads(json.dumps(record, allow_nan=False))["backend"] == "flash2"
    assert record["problem"]["head_dim_v"] == 128 and "causal" in record["problem"]["text"]
    assert record["kernel"]["ctas"] == 7 and record["kernel"]["constants"]["head_dim_qk"] == 64
    assert record["backward"]["backend"] == "flash2"
    fake.refusal = "too wide"
    record = explain(*SHAPES, arch="sm_80").to_dict()
    json.dumps(record, allow_nan=False)
    assert record["backend"] is None and "too wide" in record["error"] and record["kernel"] is None


def test_a_call_over_a_cache_has_five_lines_and_json(monkeypatch):
    monkeypatch.undo()  # the real planner
    rows = ((16, 1, 8, 128), (16, 1, 8, 128))
    short = explain_with_kvcache(*CACHES, *rows, cache_seqlens=(16,), arch="sm_80")
    titles = [line[:11].strip() for line in str(short).splitlines()]
    assert titles[:3] == ["problem", "backend", "plan"] and len(titles) <= 5
    assert "flash2_append" in str(short) and "vector_bytes" not in str(short)
    full = explain_with_kvcache(*CACHES, *rows, cache_seqlens=(16,), arch="sm_80", verbose=True)
    assert "vector_bytes" in str(full) and full.plan == short.plan
    record = json.loads(json.dumps(short.to_dict(), allow_nan=False))
    assert record["plan"] == short.plan.splitlines() and record["backend"] == "flash2"


def test_calls_over_a_cache_are_explained_with_exactly_their_arguments():
    """Order, names and defaults are FlashAttention-3's; the names of FlashAttention-2 work, too."""
    explained = inspect.signature(explain_with_kvcache).parameters
    called = inspect.signature(flash_attn_with_kvcache).parameters
    positional = [p for p in explained.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in positional] == [
        (p.name, p.default) for p in called.values() if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert {p.name for p in called.values() if p.kind is p.KEYWORD_ONLY} <= set(explained)
    assert set(inspect.signature(flash_attn.flash_attn_with_kvcache).parameters) <= set(explained)
    pages = ((16, 1, 32, 128), (900, 16, 8, 128), (900, 16, 8, 128))
    one = explain_with_kvcache(*pages, block_table=(16, 50), cache_seqlens=(16,), arch="sm_80")
    other = explain_with_kvcache(*pages, page_table=(16, 50), cache_seqlens=(16,), arch="sm_80")
    assert one.problem == other.problem
    with pytest.raises(ValueError, match="two names"):
        explain_with_kvcache(*pages, page_table=(16, 50), block_table=(16, 50))


def test_arguments_that_the_call_refuses_are_refused_for_a_cache():
    with pytest.raises(NotImplementedError, match="k_descale"):
        explain_with_kvcache(*CACHES, k_descale=torch.ones(1))
    with pytest.raises(TypeError, match="pack_gqa"):
        explain_with_kvcache(*CACHES, pack_gqa="yes")
    with pytest.raises(ValueError, match="scheduler_metadata"):
        explain_with_kvcache(*CACHES, scheduler_metadata=(3,))
