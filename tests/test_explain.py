"""explain(): what it says about a call, on machines with and without a GPU."""

from __future__ import annotations

import pytest
import torch
from fakes import FakeBackend, qkv

from flash_attn_interface import backends, dispatch, explain, simulate
from flash_attn_interface._common import env

SHAPES = ((2, 512, 8, 64), (2, 512, 8, 64), (2, 512, 8, 128))


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
    text = str(explain(*SHAPES, causal=True, arch="sm_80"))
    titles = [line.split()[1] for line in text.splitlines() if line[0] != " "]
    assert titles == ["problem", "backend", "plan", "cubin", "kernel", "backward"]
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
