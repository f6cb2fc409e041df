"""The public surface: signatures that clients inspect, return values, views, imports."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import qkv, ragged_qkv

import flash_attn
import flash_attn.flash_attn_interface
import flash_attn_interface
from flash_attn_interface import explain, simulate
from flash_attn_interface.api import fa2, fa2_kvcache
from flash_attn_interface.call.packing import unpacked
from flash_attn_interface.reference.forward import attention_reference

FA2_DENSE = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False"
)
FA2_CU = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
FA3_DESCALE = "q_descale=None, k_descale=None, v_descale=None"
FA3_TAIL = (
    f"softmax_scale=None, causal=False, qv=None, {FA3_DESCALE}, window_size=(-1, -1), "
    "attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, "
    "sm_margin=0, return_attn_probs=False"
)
FA2_SIGNATURES = {
    "flash_attn_func": f"q, k, v, {FA2_DENSE}",
    "flash_attn_kvpacked_func": f"q, kv, {FA2_DENSE}",
    "flash_attn_qkvpacked_func": f"qkv, {FA2_DENSE}",
    "flash_attn_varlen_func": f"q, k, v, {FA2_CU}, {FA2_DENSE}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {FA2_CU}, {FA2_DENSE}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {FA2_DENSE}",
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, "
        "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False"
    ),
}
FA3_SIGNATURES = {
    "flash_attn_func": f"q, k, v, {FA3_TAIL}",
    "flash_attn_varlen_func": f"q, k, v, {FA2_CU}, seqused_q=None, seqused_k=None, {FA3_TAIL}",
    "flash_attn_qkvpacked_func": (
        f"qkv, softmax_scale=None, causal=False, {FA3_DESCALE}, window_size=(-1, -1), "
        "attention_chunk=0, softcap=0.0, deterministic=False, num_heads_q=None, sm_margin=0, "
        "return_attn_probs=False"
    ),
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None, "
        "cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None, "
        f"{FA3_DESCALE}, softmax_scale=None, causal=False, window_size=(-1, -1), "
        "attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, "
        "num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False"
    ),
    "flash_attn_combine": "out_partial, lse_partial, out=None, out_dtype=None",
    "get_scheduler_metadata": (
        "batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, "
        "cache_seqlens, qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, "
        "cu_seqlens_k_new=None, cache_leftpad=None, page_size=None, max_seqlen_k_new=0, "
        "causal=False, window_size=(-1, -1), attention_chunk=0, has_softcap=False, num_splits=0, "
        "pack_gqa=None, sm_margin=0"
    ),
}


SINKS = ", s_aux=None"  # ours, by keyword alone: upstream has none


def untyped_signature(function: Callable[..., Any]) -> str:
    parameters = inspect.signature(function).parameters.values()
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters if p.name == "s_aux")
    return ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters)


@pytest.mark.parametrize("name", FA2_SIGNATURES)
def test_flash_attention_2_signatures_are_upstreams(name: str):
    ours = fa2_kvcache if name == "flash_attn_with_kvcache" else fa2
    for module in (flash_attn, flash_attn.flash_attn_interface, ours):
        assert untyped_signature(getattr(module, name)) == f"{FA2_SIGNATURES[name]}{SINKS}"


@pytest.mark.parametrize("name", FA3_SIGNATURES)
def test_flash_attention_3_signatures_are_upstreams(name: str):
    ours = SINKS if name.endswith(("_func", "_with_kvcache")) else ""
    found = untyped_signature(getattr(flash_attn_interface, name))
    assert found == f"{FA3_SIGNATURES[name]}{ours}"


def test_flash_attn_exports_upstreams_names_and_version():
    assert set(flash_attn.__all__) == set(FA2_SIGNATURES)
    assert flash_attn.__version__ == flash_attn_interface.__version__ == "2.8.3"


def test_transformers_finds_what_it_may_pass():
    """It decides by these names in the signatures of the varlen functions, for dense calls too."""
    wanted = {"window_size", "deterministic", "softcap", "max_seqlen_q", "max_seqlen_k"}
    for function in (
        flash_attn.flash_attn_varlen_func,
        flash_attn_interface.flash_attn_varlen_func,
    ):
        parameters = inspect.signature(function).parameters
        assert wanted <= set(parameters)
        assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    assert "dropout_p" in inspect.signature(flash_attn.flash_attn_varlen_func).parameters


def test_public_functions_have_docstrings():
    functions = [getattr(flash_attn, name) for name in FA2_SIGNATURES]
    functions += [getattr(flash_attn_interface, name) for name in FA3_SIGNATURES]
    for function in [*functions, explain, simulate]:
        assert "Raises:" in (inspect.getdoc(function) or ""), function


def test_another_distribution_may_add_subpackages(tmp_path):
    """flash-attn-4 installs flash_attn/cute into a folder of its own or into ours."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("name = 'cute'\n")
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r}); "
        "import flash_attn.cute as c; print(c.name)"
    )
    assert run_outside_checkout(code, tmp_path) == "cute\n"


def run_outside_checkout(code: str, folder: Path) -> str:
    """Inside the checkout, the current folder would hide the installed packages."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_cheap(tmp_path):
    """No CUDA context, no compiler, no kernel tree, no simulator; little beside torch's time."""
    code = (
        "import sys, time, torch\n"
        "before = set(sys.modules); start = time.process_time()\n"
        "import flash_attn, flash_attn_interface\n"
        "seconds = time.process_time() - start\n"
        "new = sorted(set(sys.modules) - before)\n"
        "assert seconds < 0.5, seconds\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = ('cuda', 'filelock', 'flash_attn_interface._flash2', "
        "'flash_attn_interface._common.runtime.compiler', 'flash_attn_interface._common.sim', "
        "'flash_attn_interface.reference.forward')\n"
        "assert not [name for name in new if name.startswith(heavy)], new\n"
    )
    run_outside_checkout(code, tmp_path)


# ---- return values -----------------------------------------------------------------------------


def test_fa2_returns_out_or_the_triple():
    q, k, v = qkv()
    assert flash_attn.flash_attn_func(q, k, v).shape == (2, 5, 4, 24)
    out, lse, s_dmask = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    assert (out.shape, lse.shape, s_dmask.shape) == ((2, 5, 4, 24), (2, 4, 5), (0,))
    assert (out.dtype, lse.dtype, s_dmask.dtype) == (q.dtype, torch.float32, q.dtype)


def test_fa2_returns_the_softmax_with_dropout():
    q, k, v = qkv(seqlen_k=130)
    _, _, s_dmask = flash_attn.flash_attn_func(q, k, v, 0.5, return_attn_probs=True)
    assert s_dmask.shape == (2, 4, 128, 256) and s_dmask.dtype == q.dtype
    assert s_dmask.lt(0).any() and s_dmask.gt(0).any()


def test_fa3_returns_out_or_the_pair():
    q, k, v = qkv()
    assert flash_attn_interface.flash_attn_func(q, k, v).shape == (2, 5, 4, 24)
    out, lse = flash_attn_interface.flash_attn_func(q, k, v, return_attn_probs=True)
    assert (out.shape, lse.shape, lse.dtype) == ((2, 5, 4, 24), (2, 4, 5), torch.float32)


@pytest.mark.parametrize("module", [flash_attn, flash_attn_interface], ids=lambda m: m.__name__)
def test_varlen_results_are_packed(module):
    arguments = ragged_qkv()
    assert module.flash_attn_varlen_func(**arguments).shape == (7, 4, 24)
    out, lse, *_ = module.flash_attn_varlen_func(**arguments, return_attn_probs=True)
    assert (out.shape, lse.shape) == ((7, 4, 24), (4, 7))


def test_fa3_varlen_takes_dense_keys_beside_ragged_queries():
    ragged = ragged_qkv()
    _, k, v = qkv()
    ends = ragged["cu_seqlens_q"]
    out = flash_attn_interface.flash_attn_varlen_func(ragged["q"], k, v, ends, None, 4, None)
    assert out.shape == (7, 4, 24)


def test_fourth_positional_parameter_differs():
    """dropout_p in FlashAttention-2, softmax_scale in FlashAttention-3."""
    q, k, v = qkv()
    plain = flash_attn.flash_attn_func(q, k, v, 0.0)
    assert torch.equal(plain, flash_attn_interface.flash_attn_func(q, k, v, 16**-0.5))
    with pytest.warns(UserWarning, match="dropout_p"):
        uniform = flash_attn_interface.flash_attn_func(q, k, v, 0.0)
    assert not torch.equal(plain, uniform)


def test_options_reach_the_computation():
    q, k, v = qkv()
    slopes = torch.rand(4)
    out = flash_attn.flash_attn_func(
        q,
        k,
        v,
        softmax_scale=0.3,
        causal=True,
        window_size=[2, 9],
        softcap=5.0,
        alibi_slopes=slopes,
    )
    expected, _, _ = attention_reference(
        q, k, v, softmax_scale=0.3, window_size=(2, 0), softcap=5.0, alibi_slopes=slopes
    )
    assert torch.equal(out, expected)
    out = flash_attn_interface.flash_attn_func(q, k, v, attention_chunk=3)
    assert torch.equal(out, attention_reference(q, k, v, attention_chunk=3)[0])


def test_dropout_follows_the_seed():
    q, k, v = qkv(seqlen_k=64)
    torch.manual_seed(5)
    first = flash_attn.flash_attn_func(q, k, v, 0.5)
    second = flash_attn.flash_attn_func(q, k, v, 0.5)
    torch.manual_seed(5)
    assert torch.equal(first, flash_attn.flash_attn_func(q, k, v, 0.5))
    assert not torch.equal(first, second)


# ---- packed inputs -----------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch) -> list[tuple[Any, ...]]:
    """(q, k, v) of every `attention` call, which is not run."""
    calls: list[tuple[Any, ...]] = []

    def record(call):
        calls.append(unpacked(call).tensors[:3])
        return call.tensors.q, None, None

    monkeypatch.setattr(fa2, "attention", record)
    monkeypatch.setattr("flash_attn_interface.api.fa3.attention", record)
    return calls


def test_packed_inputs_become_views(seen):
    dense = torch.randn(2, 5, 3, 4, 16, dtype=torch.bfloat16)
    ragged = torch.randn(7, 3, 4, 16, dtype=torch.bfloat16)
    ends = torch.tensor([0, 3, 7], dtype=torch.int32)
    flash_attn.flash_attn_qkvpacked_func(dense)
    flash_attn.flash_attn_kvpacked_func(dense[:, :, 0], dense[:, :, 1:])
    flash_attn_interface.flash_attn_qkvpacked_func(dense)
    flash_attn.flash_attn_varlen_qkvpacked_func(ragged, ends, 4)
    flash_attn.flash_attn_varlen_kvpacked_func(ragged[:, 0], ragged[:, 1:], ends, ends, 4, 4)
    assert len(seen) == 5
    for call, packed in zip(seen, [dense] * 3 + [ragged] * 2, strict=True):
        expected = packed.unbind(-3)
        for tensor, part in zip(call, expected, strict=True):
            assert (tensor.data_ptr(), tensor.shape) == (part.data_ptr(), part.shape)
            assert tensor.stride() == part.stride()


def test_fa3_splits_heads_of_four_dimensional_qkv(seen):
    packed = torch.randn(2, 5, 8, 16, dtype=torch.bfloat16)
    flash_attn_interface.flash_attn_qkvpacked_func(packed, num_heads_q=4)
    for tensor, part in zip(seen[0], packed.split((4, 2, 2), dim=2), strict=True):
        assert (tensor.data_ptr(), tensor.shape) == (part.data_ptr(), part.shape)


@pytest.mark.parametrize("num_heads_q", [None, 3, 8, 9, -2])
def test_fa3_rejects_heads_that_do_not_split(num_heads_q):
    packed = torch.randn(2, 5, 8, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="num_heads_q"):
        flash_attn_interface.flash_attn_qkvpacked_func(packed, num_heads_q=num_heads_q)


def test_packed_inputs_of_a_wrong_shape_are_rejected():
    wrong = torch.randn(2, 5, 4, 16, dtype=torch.bfloat16)
    ends = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="qkv has shape"):
        flash_attn.flash_attn_qkvpacked_func(wrong)
    with pytest.raises(ValueError, match="kv has shape"):
        flash_attn.flash_attn_kvpacked_func(wrong, wrong)
    with pytest.raises(ValueError, match="qkv has shape"):
        flash_attn.flash_attn_varlen_qkvpacked_func(wrong, ends, 2)
    with pytest.raises(ValueError, match="qkv has shape"):
        flash_attn_interface.flash_attn_qkvpacked_func(wrong[0])
    with pytest.raises(TypeError, match="kv is list"):
        flash_attn.flash_attn_kvpacked_func(wrong, [wrong, wrong])


# ---- features that are not served --------------------------------------------------------------


@pytest.mark.parametrize("name", ["qv", "q_descale", "k_descale", "v_descale"])
def test_fa3_only_arguments_are_refused_by_name(name):
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match=f"^{name} is not supported"):
        flash_attn_interface.flash_attn_func(q, k, v, **{name: torch.ones(2, 2)})
    with pytest.raises(NotImplementedError, match=f"^{name} is not supported"):
        flash_attn_interface.flash_attn_varlen_func(**ragged_qkv(), **{name: torch.ones(2, 2)})


def test_several_descales_are_named_together():
    q, k, v = qkv()
    one = torch.ones(2, 2)
    with pytest.raises(NotImplementedError, match="q_descale and v_descale"):
        flash_attn_interface.flash_attn_func(q, k, v, q_descale=one, v_descale=one)


def test_scheduling_hints_do_not_change_the_result():
    q, k, v = qkv()
    plain = flash_attn_interface.flash_attn_func(q, k, v)
    for hints in ({"num_splits": 0}, {"num_splits": 3}, {"pack_gqa": True}, {"sm_margin": 8}):
        assert torch.equal(plain, flash_attn_interface.flash_attn_func(q, k, v, **hints))
    for hints in ({"num_splits": -1}, {"sm_margin": -1}):
        with pytest.raises(ValueError, match=next(iter(hints))):
            flash_attn_interface.flash_attn_func(q, k, v, **hints)
