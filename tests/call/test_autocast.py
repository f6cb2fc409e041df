"""float32 inputs under torch.autocast, which the error for float32 recommends, and without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn
import flash_attn_interface
from flash_attn_interface.call import fa2_ops

HALF = [torch.float16, torch.bfloat16]


def qkv() -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 5, 4, 16, requires_grad=True) for _ in range(3))


def ragged(function: Callable[..., Any]) -> Callable[..., Any]:
    ends = torch.tensor([0, 5, 10], dtype=torch.int32)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(*(x.flatten(0, 1) for x in (q, k, v)), ends, ends, 5, 5).view(q.shape)

    return call


CALLS: dict[str, Callable[..., Any]] = {
    "fa2": flash_attn.flash_attn_func,
    "fa3": flash_attn_interface.flash_attn_func,
    "f3b2": flash_attn_interface.flash_attn_f3b2_func,
    "fa2-varlen": ragged(flash_attn.flash_attn_varlen_func),
    "fa3-varlen": ragged(flash_attn_interface.flash_attn_varlen_func),
    "kvpacked": lambda q, k, v: flash_attn.flash_attn_kvpacked_func(q, torch.stack((k, v), 2)),
    "qkvpacked": lambda *qkv: flash_attn.flash_attn_qkvpacked_func(torch.stack(qkv, 2)),
    "fa3-qkvpacked": lambda *qkv: flash_attn_interface.flash_attn_qkvpacked_func(
        torch.cat(qkv, 2), num_heads_q=4
    ),
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_float32_is_cast_as_torchs_own_attention_does(name: str, dtype: torch.dtype):
    inputs = qkv()
    with torch.autocast("cpu", dtype):
        out = CALLS[name](*inputs)
        attention = torch.nn.functional.scaled_dot_product_attention
        theirs = attention(*(x.transpose(1, 2) for x in inputs)).transpose(1, 2)
    assert out.dtype is theirs.dtype is dtype
    assert torch.equal(out, CALLS[name](*(x.to(dtype) for x in inputs)))
    torch.testing.assert_close(out, theirs, rtol=0.02, atol=0.02)
    out.float().square().sum().backward()
    for x in inputs:
        assert x.grad is not None and x.grad.dtype is torch.float32 and x.grad.isfinite().all()


def test_one_float32_among_halves_follows_them():
    """Say k after a norm in float32: the dtype that the others have wins over autocast's."""
    q, k, v = (x.detach() for x in qkv())
    with torch.autocast("cpu", torch.bfloat16):
        out = flash_attn.flash_attn_func(q.half(), k, v.half())
    assert torch.equal(out, flash_attn.flash_attn_func(q.half(), k.half(), v.half()))


@pytest.mark.parametrize("module", [flash_attn, flash_attn_interface], ids=lambda m: m.__name__)
def test_a_cache_is_never_cast(module: Any):
    """New rows, queries and tables become what the cache is; a float32 cache is an error."""
    caches = [torch.randn(2, 8, 4, 16).half() for _ in range(2)]
    q, k, v = (torch.randn(2, 1, 4, 16) for _ in range(3))
    table = torch.rand(8, 8)
    lengths = torch.tensor([3, 5], dtype=torch.int32)
    want_caches = [x.clone() for x in caches]
    want = module.flash_attn_with_kvcache(
        q.half(), *want_caches, k.half(), v.half(), rotary_cos=table.half(),
        rotary_sin=table.half(), cache_seqlens=lengths,
    )  # fmt: skip
    arguments = {"rotary_cos": table, "rotary_sin": table, "cache_seqlens": lengths}
    with torch.autocast("cpu", torch.bfloat16):
        out = module.flash_attn_with_kvcache(q, *caches, k, v, **arguments)
        with pytest.raises(TypeError, match="k_cache has dtype torch.float32: .* never casts a"):
            module.flash_attn_with_kvcache(q, *(x.float() for x in caches), k, v, **arguments)
    assert torch.equal(out, want)
    for mine, theirs in zip(caches, want_caches, strict=True):
        assert torch.equal(mine, theirs)


def test_the_errors_fit():
    q, k, v = (x.detach() for x in qkv())
    with pytest.raises(TypeError, match="q has dtype torch.float32: .* run under torch.autocast$"):
        flash_attn.flash_attn_func(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match="q has dtype torch.float64: .*bfloat16.$"):
            flash_attn.flash_attn_func(q.double(), k.double(), v.double())
        with pytest.raises(
            TypeError, match="torch.autocast, which is on here, casts for the public"
        ):
            fa2_ops._flash_attn_forward(q, k, v, 0.0, 0.25, False, -1, -1, 0.0, None, False)


@pytest.mark.filterwarnings("ignore")
def test_compiled_calls_cast_too():
    q, k, v = qkv()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return flash_attn.flash_attn_func(q, k, v, causal=True) * 2

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    out = compiled(q, k, v)
    assert torch.equal(out, function(q, k, v))
    out.float().sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


@pytest.mark.parametrize("enabled", HALF, ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_does_not_reach_into_the_reference(dtype: torch.dtype, enabled: torch.dtype):
    """Its float32 arithmetic would be done in 16 bits, and a mixture of both refused."""
    q, k, v = (x.detach().to(dtype) for x in qkv())
    arguments = (0.0, 0.25, True, -1, -1, 0.0, None)
    partials = torch.randn(3, 2, 5, 4, 16), torch.randn(3, 2, 5, 4)

    def everything() -> list[Tensor]:
        out, lse, *_ = fa2_ops._flash_attn_forward(q, k, v, *arguments, False)
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        fa2_ops._flash_attn_backward(out, q, k, v, out, lse, *gradients, *arguments, False)
        decoded = flash_attn_interface.flash_attn_with_kvcache(q, k, v, cache_seqlens=4)
        return [out, lse, *gradients, decoded, *flash_attn_interface.flash_attn_combine(*partials)]

    want = everything()
    with torch.autocast("cpu", enabled):
        got = everything()
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ["fa2", "fa3", "kvpacked", "qkvpacked"])
def test_float32_is_cast_on_a_gpu(name: str, dtype: torch.dtype):
    inputs = [x.detach().cuda().requires_grad_() for x in qkv()]
    for _ in range(2):
        with torch.autocast("cuda", dtype):
            out = CALLS[name](*inputs)
        assert out.dtype is dtype
        assert torch.equal(out, CALLS[name](*(x.to(dtype) for x in inputs)))
    out.float().square().sum().backward()
    assert all(x.grad is not None and x.grad.dtype is torch.float32 for x in inputs)


@pytest.mark.gpu
def test_new_rows_are_cast_to_a_cache_on_a_gpu():
    caches = [torch.zeros(2, 8, 4, 32, device="cuda", dtype=torch.float16) for _ in range(2)]
    q, k, v = (torch.randn(2, 1, 4, 32, device="cuda") for _ in range(3))
    with torch.autocast("cuda", torch.bfloat16):
        out = flash_attn.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=3)
    assert out.dtype is torch.float16 and torch.equal(caches[0][:, 3], k[:, 0].half())
