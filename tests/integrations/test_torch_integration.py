"""PyTorch's scaled_dot_product_attention and varlen_attn through our implementation.

On CPU tensors the overrides are registered for the CPU's dispatch keys, which torch's registry
does for CUDA only; the operators are the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attend

import flash_attn_interface.integrations.torch as ours

attention = torch.nn.attention
pytestmark = pytest.mark.skipif(
    not hasattr(attention, "restore_flash_attention_impl"),
    reason="this PyTorch has no registry of flash attention implementations",
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    ours._warned.clear()
    if request.param == "cuda":
        ours.register()
        attention.activate_flash_attention_impl(ours.NAME)
        yield "cuda"
        attention.restore_flash_attention_impl()
        return
    handle = ours.Overrides("CPU")
    yield "cpu"
    handle.remove()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Head dims of each call that reaches our function."""
    seen: list[tuple[int, int]] = []
    plain = ours.flash_attn_func

    def watched(q: Any, k: Any, v: Any, **options: Any) -> Any:
        seen.append((q.shape[-1], v.shape[-1]))
        return plain(q, k, v, **options)

    monkeypatch.setattr(ours, "flash_attn_func", watched)
    return seen


def tensors(device: str, heads: int, heads_k: int, sq: int, sk: int, d: int, dv: int) -> list[Any]:
    shapes = ((2, heads, sq, d), (2, heads_k, sk, d), (2, heads_k, sk, dv))
    return [torch.randn(s, device=device, dtype=torch.float16, requires_grad=True) for s in shapes]


def by_math(q: Any, k: Any, v: Any, **options: Any) -> torch.Tensor:
    """float32, torch's own: sdpa_kernel(MATH) excludes flash, and ours with it."""
    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        return attend(q.float(), k.float(), v.float(), **options)


def compare(found: Any, right: Any, inputs: list[Any]) -> None:
    dout = torch.randn_like(right)
    got = (found, *torch.autograd.grad(found, inputs, dout.to(found.dtype)))
    want = (right, *torch.autograd.grad(right, inputs, dout))
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert (a.float() - b.float()).abs().max() < 0.01 * b.float().abs().max() + 1e-3


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("sq", "sk"), [(9, 9), (5, 11), (11, 5)])
@pytest.mark.parametrize(("heads", "heads_k", "d", "dv"), [(2, 2, 16, 16), (4, 2, 24, 8)])
def test_attention(device, calls, heads, heads_k, d, dv, sq, sk, causal):
    """Unequal head dims, grouped heads, and is_causal aligned at the start, as torch defines it."""
    inputs = tensors(device, heads, heads_k, sq, sk, d, dv)
    options = {"is_causal": causal, "enable_gqa": heads != heads_k, "scale": 0.3}
    found = attend(*inputs, **options)
    assert calls == [(d, dv)]
    compare(found, by_math(*inputs, **options), inputs)
    with torch.inference_mode():
        again = attend(*(x.detach().clone() for x in inputs), **options)
    assert torch.equal(again, found) and len(calls) == 2


def test_dropout(device, calls):
    """The mean over many seeds; the gradient belongs to the same mask."""
    q, k, v = tensors(device, 2, 2, 8, 8, 16, 8)
    mean = torch.stack([attend(q, k, v, dropout_p=0.3) for _ in range(300)]).float().mean(0)
    assert len(calls) == 300
    assert (mean - by_math(q, k, v)).abs().mean() < 0.05
    out = attend(q, k, v, dropout_p=0.3)
    (dv,) = torch.autograd.grad(out.float().square().sum() / 2, v)
    # out is linear in v: its inner product with d(out^2/2)/dv is out^2.
    assert torch.isclose((dv.float() * v.float()).sum(), out.float().square().sum(), rtol=0.02)


def test_compiled(device):
    inputs = tensors(device, 4, 2, 9, 9, 24, 8)
    options = {"is_causal": True, "enable_gqa": True}
    compiled = torch.compile(lambda *x: attend(*x, **options), fullgraph=True, backend="aot_eager")
    compare(compiled(*inputs), by_math(*inputs, **options), inputs)


def test_autocast(device, calls):
    """float32 tensors arrive in the dtype of autocast, and their gradients are float32."""
    inputs = [x.detach().float().requires_grad_() for x in tensors(device, 4, 2, 9, 9, 24, 8)]
    options = {"is_causal": True, "enable_gqa": True}
    with torch.autocast(device, dtype=torch.bfloat16):
        out = attend(*inputs, **options)
    assert out.dtype is torch.bfloat16 and calls == [(24, 8)]
    gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
    rounded = [x.detach().bfloat16().float().requires_grad_() for x in inputs]
    right = by_math(*rounded, **options)
    wanted = torch.autograd.grad(right, rounded, torch.ones_like(right))
    for got, want in zip((out, *gradients), (right, *wanted), strict=True):
        assert (got.float() - want).abs().max() < 0.02 * want.abs().max() + 1e-2
    assert {x.dtype for x in gradients} == {torch.float32}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_nested_jagged_tensors(device, causal):
    """torch takes CUDA's through its flash operator, which is ours then, and others by itself."""
    if causal and device == "cpu":
        pytest.skip("PyTorch has no causal attention of jagged tensors on the CPU")
    lengths = (5, 9, 1)
    parts = [[torch.randn(n, 4, d, device=device) for n in lengths] for d in (16, 16, 16)]
    nested = [
        torch.nested.nested_tensor(
            part, layout=torch.jagged, dtype=torch.float16, requires_grad=True
        )
        for part in parts
    ]
    out = attend(*(x.transpose(1, 2) for x in nested), is_causal=causal)
    out.values().float().sum().backward()
    for i in range(len(lengths)):
        rows = [part[i].half().float().requires_grad_() for part in parts]
        right = by_math(*(x[None].transpose(1, 2) for x in rows), is_causal=causal)
        assert (out[i].float() - right[0]).abs().max() < 0.01
        right.sum().backward()
        for x, row in zip(nested, rows, strict=True):
            assert (x.grad[i].float() - row.grad).abs().max() < 0.02


UNSERVED = {
    "an attn_mask": lambda q, k, v: attend(q, k, v, attn_mask=q.new_zeros(9, 9)),
    "dtypes": lambda q, k, v: attend(q.float(), k.float(), v.float()),
    "4 dimensions": lambda q, k, v: attend(q[0], k[0], v[0]),
    "batches or heads": lambda q, k, v: attend(q, k[:1], v[:1]),
}


@pytest.mark.parametrize("reason", UNSERVED)
def test_what_is_not_served_falls_back_with_one_warning(device, calls, reason):
    inputs = tensors(device, 2, 2, 9, 9, 16, 16)
    with pytest.warns(UserWarning, match=f"does not serve .*{reason}"):
        found = UNSERVED[reason](*inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        UNSERVED[reason](*inputs)
    assert not calls
    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        torch.testing.assert_close(found, UNSERVED[reason](*inputs), rtol=0.01, atol=0.01)


def test_sdpa_kernel_excludes_us(device, calls):
    inputs = tensors(device, 2, 2, 9, 9, 16, 16)
    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        attend(*inputs)
    assert not calls


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 1)])
def test_varlen_attention(device, window):
    """torch.nn.attention.varlen.varlen_attn, which calls aten::_flash_attention_forward."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    lengths = (5, 1, 8)
    cu = torch.tensor((0, 5, 6, 14), dtype=torch.int32, device=device)
    inputs = [
        torch.randn(14, heads, d, device=device, dtype=torch.float16, requires_grad=True)
        for heads, d in ((4, 16), (2, 16), (2, 16))
    ]
    found = varlen.varlen_attn(
        *inputs, cu, cu, 8, 8, window_size=window, enable_gqa=True, scale=0.2
    )
    parts = []
    for q, k, v in zip(*(x.split(lengths) for x in inputs), strict=True):
        i = torch.arange(len(q), device=device)
        distance = i[None] - i[:, None]
        left, right = (w if w >= 0 else 99 for w in window)
        mask = (distance >= -left) & (distance <= right)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = by_math(q, k, v, attn_mask=mask, enable_gqa=True, scale=0.2)
        parts.append(out[0].transpose(0, 1))
    compare(found, torch.cat(parts), inputs)


def test_operators_with_unequal_head_dims_and_dropout(device):
    """Those that torch's own context parallelism calls; gradients by the same mask."""
    q, k, v = (x.detach() for x in tensors(device, 2, 2, 9, 9, 24, 8))
    aten = torch.ops.aten
    results = aten._scaled_dot_product_flash_attention(q, k, v, 0.4, True, False, scale=0.2)
    out, lse, cu_q, cu_k, max_q, max_k, seed, offset, _ = results
    assert out.shape == (2, 2, 9, 8) and lse.shape == (2, 2, 9) and (max_q, max_k) == (9, 9)
    scores = (q.float() @ k.float().transpose(-1, -2)) * 0.2
    hidden = torch.ones(9, 9, dtype=torch.bool, device=device).triu(1)
    right = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse, right, rtol=1e-3, atol=1e-3)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
        out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.4, True, seed, offset, scale=0.2
    )
    assert dq.shape == q.shape and dk.shape == k.shape
    square = out.float().square().sum()
    assert torch.isclose((dv.float() * v.float()).sum(), square, rtol=0.02)


def test_written_into_the_callers_tensor(device):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    if not hasattr(varlen, "varlen_attn_out"):
        pytest.skip("this PyTorch has no varlen_attn_out")
    q, k, v = (torch.randn(14, 2, 16, device=device, dtype=torch.float16) for _ in range(3))
    cu = torch.tensor((0, 6, 14), dtype=torch.int32, device=device)
    out = torch.full_like(q, torch.nan)
    varlen.varlen_attn_out(out, q, k, v, cu, cu, 8, 8)
    assert torch.equal(out, varlen.varlen_attn(q, k, v, cu, cu, 8, 8))


def test_paged_keys(device):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    used = torch.tensor((5, 9), dtype=torch.int32, device=device)
    table = torch.tensor(((2, 0), (1, 3)), dtype=torch.int32, device=device)
    size = 256 if device == "cuda" else 8  # of a page
    k, v = (torch.randn(4, size, 2, 16, device=device, dtype=torch.float16) for _ in range(2))
    q = torch.randn(2, 2, 16, device=device, dtype=torch.float16)
    cu = torch.tensor((0, 1, 2), dtype=torch.int32, device=device)
    found = varlen.varlen_attn(q, k, v, cu, None, 1, 2 * size, seqused_k=used, block_table=table)
    for row in range(2):
        keys, values = (x[table[row].long()].flatten(0, 1)[: int(used[row])] for x in (k, v))
        parts = (x.transpose(0, 1)[None] for x in (q[row : row + 1], keys, values))
        right = by_math(*parts)[0, :, 0]
        assert (found[row].float() - right).abs().max() < 0.01


def test_remove_restores_torch(calls):
    """Also the second time, and the operators below; torch has no flash for CPU tensors."""
    x = torch.randn(1, 5, 2, 8, dtype=torch.float16)
    arguments = (x, x, x, None, None, 5, 5, 0.0, False, False)
    for count in (1, 2):
        handle = ours.Overrides("CPU")
        attend(x, x, x)
        torch.ops.aten._flash_attention_forward(*arguments)
        handle.remove()
        handle.remove()
        attend(x, x, x)
        with pytest.raises(NotImplementedError, match="Could not run"):
            torch.ops.aten._flash_attention_forward(*arguments)
        assert len(calls) == count


def test_operator_that_refuses_calls_torchs_own():
    """Positions and keywords reach it; here one that torch has for CPU tensors."""
    name = "_scaled_dot_product_flash_attention_for_cpu"
    if not hasattr(torch.library, "get_kernel"):
        pytest.skip("this PyTorch does not give access to its kernels")
    choice = ours._Choice(name, "CPU", lambda *x, **y: None, lambda *x, **y: "anything")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    q = torch.randn(1, 2, 5, 8)
    with pytest.warns(UserWarning, match="does not serve anything"):
        out, _ = choice(keys, q, q, q, 0.0, True, scale=0.5)
    torch.testing.assert_close(out, attend(q, q, q, is_causal=True, scale=0.5))
    ours._warned.clear()


@pytest.mark.parametrize("q_shape", [(1, 5, 2, 300), (1, 5, 2, 16)])
def test_operator_without_a_kernel_of_torch_says_so(q_shape):
    q = torch.randn(q_shape)
    handle = ours.Overrides("CPU")
    try:
        with pytest.raises(NotImplementedError, match=r"restore_flash_attention_impl\(\)"):
            torch.ops.aten._flash_attention_forward(q, q, q, None, None, 5, 5, 0.0, False, False)
    finally:
        handle.remove()


def test_registry_activates_and_restores():
    ours.register()
    ours.register()
    assert ours.NAME in attention.list_flash_attention_impls()
    attention.activate_flash_attention_impl(ours.NAME)
    try:
        assert attention.current_flash_attention_impl() == ours.NAME
    finally:
        attention.restore_flash_attention_impl()
    assert attention.current_flash_attention_impl() is None


def test_torch_without_a_registry(monkeypatch):
    monkeypatch.delattr(attention, "restore_flash_attention_impl")
    with pytest.raises(NotImplementedError, match=r"of PyTorch 2\.\d+ or newer"):
        ours.register()
