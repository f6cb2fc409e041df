"""`python -m flash_attn_interface kernels`, and what the package `kernels` loads from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from flash_attn_interface.integrations import kernels
from flash_attn_interface.integrations import vllm_flash_attn3 as with_sinks
from flash_attn_interface.reference.forward import attention_reference

REPOSITORIES = [
    f"kernels-community/{x}" for x in ("flash-attn2", "flash-attn3", "vllm-flash-attn3")
]
needs_kernels = pytest.mark.skipif(
    find_spec("kernels") is None, reason="the package kernels is not installed"
)


def load(program: str, value: str) -> None:
    """Runs it offline with LOCAL_KERNELS=value."""
    variables = {**os.environ, "LOCAL_KERNELS": value, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", program], env=variables, check=True)


def test_writes_folders_and_prints_their_names(tmp_path: Path, capsys):
    for _ in range(2):
        assert kernels.main(["--out", str(tmp_path / "a" / "b")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    entries = dict(entry.split("=") for entry in first.split(":"))
    assert list(entries) == REPOSITORIES
    identities = set()
    for path in map(Path, entries.values()):
        assert path.is_absolute() and path.is_relative_to(tmp_path)
        identities.add(json.loads((path / "metadata.json").read_text())["id"])
    assert len(identities) == 3


def test_default_folder(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert kernels.main([]) == 0
    assert (tmp_path / kernels.DEFAULT_FOLDER / "flash-attn2" / "__init__.py").is_file()
    assert capsys.readouterr().out.count(kernels.DEFAULT_FOLDER) == 3


def test_a_colon_in_the_path_is_refused(tmp_path: Path, capsys):
    assert kernels.main(["--out", str(tmp_path / "a:b")]) == 2
    assert "separates the entries" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@needs_kernels
def test_the_package_kernels_loads_them(tmp_path: Path):
    program = f"""
import inspect, kernels
import flash_attn, flash_attn.flash_attn_interface, flash_attn_interface
fa2, fa3, sinks = (kernels.get_kernel(name, version=1) for name in {REPOSITORIES!r})
assert fa2.flash_attn_varlen_func is flash_attn.flash_attn_varlen_func
assert fa2.flash_attn_interface is flash_attn.flash_attn_interface
assert fa3.flash_attn_with_kvcache is flash_attn_interface.flash_attn_with_kvcache
assert fa3.flash_attn_interface is flash_attn_interface and fa3._flash_attn_forward
for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
    assert "s_aux" in inspect.signature(getattr(sinks, name)).parameters
"""
    load(program, kernels.write(tmp_path))


@needs_kernels
def test_transformers_runs_gpt_oss_with_sinks_through_them(tmp_path: Path):
    """The implementation that gpt_oss itself names, and no function of ours by name."""
    transformers = pytest.importorskip("transformers", minversion="5.24")
    if not transformers.utils.is_kernels_available():
        pytest.skip("transformers wants another version of the package kernels")
    program = """
import torch, transformers
config = transformers.GptOssConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
    num_key_value_heads=2, vocab_size=50, sliding_window=4, num_local_experts=2,
    num_experts_per_tok=2, initializer_range=0.2,
)
torch.manual_seed(0)
model = transformers.GptOssForCausalLM(config).half().eval()
ids = torch.randint(1, 50, (2, 9))
results = []
for name in ("kernels-community/vllm-flash-attn3", "eager"):
    model.set_attn_implementation(name)
    assert model.config._attn_implementation == name
    model.zero_grad()
    logits = model(input_ids=ids).logits
    logits.float().square().sum().backward()
    results.append((logits, model.model.layers[0].self_attn.sinks.grad.clone()))
for found, right in zip(*results):
    error = (found - right).float().norm() / right.float().norm()
    assert error < 0.02, error
"""
    load(program, kernels.write(tmp_path))


def test_sinks_of_all_three_functions():
    """The same values dense, packed and from a cache; lse only where it is asked for."""
    q, k, v = (torch.randn(2, n, h, d).half() for n, h, d in ((3, 4, 16), (7, 2, 16), (7, 2, 8)))
    s_aux = torch.randn(4)
    plain, lse, *_ = attention_reference(q, k, v, causal=True, return_lse=True)
    share = torch.sigmoid(lse - s_aux[:, None]).transpose(1, 2)[..., None]
    right, right_lse = plain.float() * share, torch.logaddexp(lse, s_aux[:, None])
    cu_q, cu_k = (torch.tensor((0, n, 2 * n), dtype=torch.int32) for n in (3, 7))
    packed = (*(x.flatten(0, 1) for x in (q, k, v)), cu_q, cu_k, 3, 7)
    calls = [
        (with_sinks.flash_attn_func, (q, k, v), "return_attn_probs"),
        (with_sinks.flash_attn_varlen_func, packed, "return_attn_probs"),
        (with_sinks.flash_attn_with_kvcache, (q, k, v), "return_softmax_lse"),
    ]
    for function, arguments, lse_argument in calls:
        out = function(*arguments, causal=True, s_aux=s_aux)
        again, found, *_ = function(*arguments, causal=True, s_aux=s_aux, **{lse_argument: True})
        assert torch.equal(out, again)
        torch.testing.assert_close(out.float().reshape_as(right), right, rtol=0.01, atol=0.005)
        if found.ndim == 2:
            found = found.unflatten(1, (2, 3)).transpose(0, 1)
        torch.testing.assert_close(found, right_lse, rtol=0.001, atol=0.001)
        without = function(*arguments, causal=True)
        torch.testing.assert_close(without.reshape_as(plain), plain, rtol=0.01, atol=0.005)
