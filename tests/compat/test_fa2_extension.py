"""flash_attn_2_cuda: FlashAttention-2's raw functions, called by position as xformers does."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import gradients
import pytest
import torch
from conftest import Runner, _runner
from test_private_ops import call, draw, ragged
from torch import Tensor

import flash_attn.flash_attn_interface as fa2
import flash_attn_2_cuda
from flash_attn_interface.call import dispatch
from flash_attn_interface.reference.forward import attention_reference

BF16 = torch.bfloat16
PARAMETERS = {"fwd": 13, "varlen_fwd": 22, "bwd": 19, "varlen_bwd": 24, "fwd_kvcache": 20}


@pytest.fixture(params=["cpu", pytest.param("sim", marks=pytest.mark.sim),
                        pytest.param("gpu", marks=pytest.mark.gpu)])  # fmt: skip
def machine(request: pytest.FixtureRequest) -> Iterator[Runner | None]:
    dispatch.forget_plans()
    yield _runner(request.param) if request.param != "cpu" else None
    dispatch.forget_plans()


def poison(like: Tensor) -> Tensor:
    """Every other head of a larger tensor, full of NaN."""
    *rows, heads, head_dim = like.shape
    return like.new_full((*rows, 2 * heads, head_dim), float("nan"))[..., ::2, :]


@pytest.mark.parametrize("name", PARAMETERS)
def test_functions_take_their_arguments_by_position(name: str):
    parameters = inspect.signature(getattr(flash_attn_2_cuda, name)).parameters.values()
    assert len(parameters) == PARAMETERS[name]
    assert all(parameter.kind is parameter.POSITIONAL_ONLY for parameter in parameters)
    defaults = [p.name for p in parameters if p.default is not p.empty]
    assert defaults == (["num_splits"] if name == "varlen_fwd" else [])


def test_the_names_by_which_clients_find_the_module():
    assert fa2.flash_attn_gpu is flash_attn_2_cuda
    assert fa2.flash_attn_cuda is flash_attn_2_cuda


def test_fwd_and_bwd(machine):
    q, k, v = draw(machine, 2, 19, 4, 24), draw(machine, 2, 23, 2, 24), draw(machine, 2, 23, 1, 40)
    out = poison(draw(machine, 2, 19, 4, 40))
    options = (0.0, 0.3, True, -1, -1, 0.0)
    results = call(machine, flash_attn_2_cuda.fwd, q, k, v, out, None, *options, False, None)
    assert results[0] is out
    _, lse, s_dmask, rng_state = results
    want, want_lse, _ = attention_reference(q, k, v, softmax_scale=0.3, causal=True)
    torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)
    assert s_dmask.shape == (0,) and rng_state.shape == (2,)

    dout = draw(machine, *out.shape)
    given = [poison(x) for x in (q, k, v)]
    arguments = (dout, q, k, v, out, lse)
    *grads, softmax_d = call(
        machine, flash_attn_2_cuda.bwd, *arguments, *given, None, *options, False, None, rng_state
    )
    assert all(mine is theirs for mine, theirs in zip(grads, given, strict=True))
    gradients.check(grads, (q, k, v), (dout,), softmax_scale=0.3, causal=True)
    assert softmax_d.shape == (2, 4, 128)
    allocated = call(
        machine, flash_attn_2_cuda.bwd, *arguments, None, None, None, None, *options, True, None,
        None,
    )  # fmt: skip
    gradients.check(allocated[:3], (q, k, v), (dout,), softmax_scale=0.3, causal=True)


def test_dropout(machine):
    q, k, v = (draw(machine, 1, 37, 2, 16) for _ in range(3))
    options = (0.4, 0.3, False, -1, -1, 0.0)
    out, lse, s_dmask, rng_state = call(
        machine, flash_attn_2_cuda.fwd, q, k, v, None, None, *options, True, None
    )
    assert s_dmask.shape == (1, 2, 128, 128) and rng_state.any()
    dout = draw(machine, *out.shape)
    *grads, _ = call(
        machine, flash_attn_2_cuda.bwd, dout, q, k, v, out, lse, None, None, None, None, *options,
        False, None, rng_state,
    )  # fmt: skip
    gradients.check(
        grads, (q, k, v), (dout,), softmax_scale=0.3, dropout_p=0.4, rng_state=rng_state
    )


def test_varlen(machine):
    inputs = ragged(machine)
    q, k, v, cu_q, cu_k, *longest = inputs.values()
    out = poison(draw(machine, 44, 4, 40))
    options = (0.3, False, True, -1, -1, 0.0)
    seqused_k = torch.tensor([9, 5, 19], dtype=torch.int32, device=q.device)
    results = call(
        machine, flash_attn_2_cuda.varlen_fwd, q, k, v, out, cu_q, cu_k, seqused_k, None, None,
        None, *longest, 0.0, *options, False, None,
    )  # fmt: skip
    assert results[0] is out
    reference = {
        "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "softmax_scale": 0.3, "causal": True
    }  # fmt: skip
    want, want_lse, _ = attention_reference(q, k, v, seqused_k=seqused_k, **reference)
    torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)
    torch.testing.assert_close(results[1], want_lse, rtol=1e-4, atol=1e-4)

    newest = call(
        machine, flash_attn_2_cuda.varlen_fwd, q, k, v, None, cu_q, cu_k, None, None, None, None,
        *longest, 0.0, *options, False, None, 1,
    )  # fmt: skip
    dout = draw(machine, *out.shape)
    given = [poison(x) for x in (q, k, v)]
    *grads, _ = call(
        machine, flash_attn_2_cuda.varlen_bwd, dout, q, k, v, *newest[:2], *given, cu_q, cu_k,
        None, *longest, 0.0, *options, True, None, None,
    )  # fmt: skip
    assert all(mine is theirs for mine, theirs in zip(grads, given, strict=True))
    gradients.check(grads, (q, k, v), (dout,), **reference)


def test_varlen_with_pages(machine):
    """cu_seqlens_k still gives the lengths; keys lie where block_table says."""
    q, k_pages, v_pages = (draw(machine, *shape, 2, 16) for shape in ((9,), (8, 16), (8, 16)))
    table = torch.tensor([[5, 2], [1, -1]], dtype=torch.int32, device=q.device)
    ends_q, ends_k = ((0, 4, 9), (0, 20, 31))
    cu_q, cu_k = (
        torch.tensor(ends, dtype=torch.int32, device=q.device) for ends in (ends_q, ends_k)
    )
    out, lse, *_ = call(
        machine, flash_attn_2_cuda.varlen_fwd, q, k_pages, v_pages, None, cu_q, cu_k, None, None,
        table, None, 5, 20, 0.0, 0.3, False, True, -1, -1, 0.0, False, None,
    )  # fmt: skip
    pages = [[5, 2], [1]]
    for sequence, (rows, keys) in enumerate(zip((slice(0, 4), slice(4, 9)), (20, 11), strict=True)):
        k, v = (x[pages[sequence]].flatten(0, 1)[None, :keys] for x in (k_pages, v_pages))
        want, want_lse, _ = attention_reference(q[None, rows], k, v, softmax_scale=0.3, causal=True)
        torch.testing.assert_close(out[rows], want[0], rtol=0.02, atol=0.02)
        torch.testing.assert_close(lse[:, rows], want_lse[0], rtol=1e-4, atol=1e-4)


def test_they_know_no_autograd():
    q = draw(None, 1, 9, 2, 16).requires_grad_()
    out, *_ = flash_attn_2_cuda.fwd(q, q, q, None, None, 0.0, 0.3, False, -1, -1, 0.0, False, None)
    assert not out.requires_grad


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": (1, 9, 2, 12), "k": (1, 9, 2, 12)}, ValueError, r"q has shape \(1, 9, 2, 12\)"),
        ({"v": (1, 9, 2, 20)}, ValueError, r"v has shape \(1, 9, 2, 20\)"),
        ({"return_softmax": True}, ValueError, "return_softmax needs dropout"),
        ({"generator": torch.Generator()}, NotImplementedError, "generator must be None"),
        ({"out": torch.zeros(1, 9, 2, 8).to(BF16)}, ValueError, r"out has shape \(1, 9, 2, 8\)"),
        ({"out": torch.zeros(1, 9, 2, 16)}, TypeError, "out has dtype torch.float32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_rules_of_the_raw_functions(changes: dict[str, Any], error: type, message: str):
    shapes: dict[str, Any] = dict.fromkeys("qkv", (1, 9, 2, 16))
    shapes |= {name: shape for name, shape in changes.items() if name in shapes}
    q, k, v = (draw(None, *shape) for shape in shapes.values())
    with pytest.raises(error, match=message):
        flash_attn_2_cuda.fwd(
            q, k, v, changes.get("out"), None, 0.0, 0.3, False, -1, -1, 0.0,
            changes.get("return_softmax", False), changes.get("generator"),
        )  # fmt: skip


def test_fwd_kvcache(machine):
    """Appends in place, then attends; out is written."""
    q = draw(machine, 2, 1, 4, 16)
    k_cache, v_cache = draw(machine, 2, 48, 2, 16), draw(machine, 2, 48, 2, 24)
    k, v = draw(machine, 2, 1, 2, 16), draw(machine, 2, 1, 2, 24)
    lengths = torch.tensor([7, 40], dtype=torch.int32, device=q.device)
    out = poison(draw(machine, 2, 1, 4, 24))
    results = call(
        machine, flash_attn_2_cuda.fwd_kvcache, q, k_cache, v_cache, k, v, lengths, None, None,
        None, None, None, None, out, 0.3, True, -1, -1, 0.0, True, 0,
    )  # fmt: skip
    assert results[0] is out and len(results) == 2 and results[1].shape == (2, 4, 1)
    for sequence, length in enumerate([7, 40]):
        assert torch.equal(k_cache[sequence, length], k[sequence, 0])
        assert torch.equal(v_cache[sequence, length], v[sequence, 0])
        one = slice(sequence, sequence + 1)
        want, want_lse, _ = attention_reference(
            q[one], k_cache[one, : length + 1], v_cache[one, : length + 1], softmax_scale=0.3
        )
        torch.testing.assert_close(out[one], want, rtol=0.02, atol=0.02)
        torch.testing.assert_close(results[1][one], want_lse, rtol=1e-4, atol=1e-4)
