"""Rotary embedding, against complex multiplication: out = x * (cos + i sin), pair by pair."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import fresh_memory_is_nan
from rotation import F64, TOLERANCE, by_complex, close, tables
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import flash_attn.layers.rotary
import flash_attn.ops.triton.rotary
from flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
)
from flash_attn.ops.triton.rotary import apply_rotary

WHERE = "seqlen_offsets=0, cu_seqlens=None, max_seqlen=None"
SIGNATURES = {
    "apply_rotary_emb": f"x, cos, sin, interleaved=False, inplace=False, {WHERE}",
    "apply_rotary_emb_func": f"x, cos, sin, interleaved=False, inplace=False, {WHERE}",
    "apply_rotary_emb_torch": "x, cos, sin, interleaved=False",
    "apply_rotary_emb_qkv_": (
        "qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, "
        "num_heads_q=None"
    ),
    "apply_rotary_emb_kv_": "kv, cos, sin, interleaved=False, seqlen_offsets=0",
    "apply_rotary": f"x, cos, sin, {WHERE}, interleaved=False, inplace=False, conjugate=False",
    "RotaryEmbedding": "dim, base=10000.0, interleaved=False, scale_base=None, device=None",
    "RotaryEmbedding.forward": (
        "self, qkv, kv=None, seqlen_offset=0, max_seqlen=None, num_heads_q=None"
    ),
}

both_pairings = pytest.mark.parametrize("interleaved", [False, True])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_upstreams(name: str):
    owner = flash_attn.ops.triton.rotary if name == "apply_rotary" else flash_attn.layers.rotary
    function: Any = owner
    for part in name.split("."):
        function = getattr(function, part)
    parameters = inspect.signature(function).parameters.values()
    assert ", ".join(str(p.replace(annotation=p.empty)) for p in parameters) == SIGNATURES[name]
    assert "Raises:" in (inspect.getdoc(function) or "")


def test_upstreams_second_name():
    assert apply_rotary_emb_func is apply_rotary_emb


# ---- the formula --------------------------------------------------------------------------------


def test_a_quarter_turn_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).view(1, 1, 1, 6)
    cos, sin = torch.zeros(1, 2), torch.ones(1, 2)  # (x0, x1) -> (-x1, x0)
    halves = apply_rotary_emb(x, cos, sin)
    assert halves.flatten().tolist() == [-3.0, -4.0, 1.0, 2.0, 5.0, 6.0]
    neighbours = apply_rotary_emb(x, cos, sin, True)
    assert neighbours.flatten().tolist() == [-2.0, 1.0, -4.0, 3.0, 5.0, 6.0]
    back = apply_rotary(x, cos, sin, conjugate=True)
    assert back.flatten().tolist() == [3.0, 4.0, -1.0, -2.0, 5.0, 6.0]


@both_pairings
@pytest.mark.parametrize("rotary_dim", [16, 10, 2, 0])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_matches_complex_multiplication(
    dtype: torch.dtype, rotary_dim: int, interleaved: bool, device: str
):
    x = torch.randn(2, 5, 3, 16, device=device).to(dtype)
    cos, sin = tables(9, rotary_dim // 2, torch.float64 if dtype == F64 else torch.float32, device)
    expected = by_complex(x, cos[:5], sin[:5], interleaved)
    before = x.clone()
    with fresh_memory_is_nan():
        for out in (
            apply_rotary_emb(x, cos, sin, interleaved),
            apply_rotary(x, cos, sin, interleaved=interleaved),
            apply_rotary_emb_torch(x, cos[:5], sin[:5], interleaved),
        ):
            assert out.dtype == dtype and out.shape == x.shape
            close(out, expected)
            assert torch.equal(out[..., rotary_dim:], x[..., rotary_dim:])
    assert torch.equal(x, before)


@pytest.mark.parametrize("table_dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_tables_may_have_another_dtype(table_dtype: torch.dtype):
    """And coarse tables do not make the maths coarse."""
    x = torch.randn(2, 5, 3, 16)
    cos, sin = tables(5, 8, table_dtype)
    out = apply_rotary_emb(x, cos, sin)
    assert out.dtype == torch.float32
    close(out, by_complex(x, cos, sin))
    out = apply_rotary_emb(x.half(), cos, sin)
    assert out.dtype == torch.float16
    close(out, by_complex(x.half(), cos, sin))


@both_pairings
def test_int_offset_moves_the_rows(interleaved: bool, device: str):
    x = torch.randn(2, 5, 3, 16, device=device)
    cos, sin = tables(9, 8, device=device)
    out = apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=4)
    close(out, by_complex(x, cos[4:], sin[4:], interleaved))


@pytest.mark.parametrize("offset_dtype", [torch.int32, torch.int64], ids=str)
def test_tensor_offsets_move_each_sequence_and_stop_at_the_table(
    offset_dtype: torch.dtype, device: str
):
    x = torch.randn(4, 5, 3, 16, device=device)
    cos, sin = tables(9, 8, device=device)
    offsets = torch.tensor([0, 3, 7, 100], device=device, dtype=offset_dtype)
    out = apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets)
    close(out[:1], by_complex(x[:1], cos[:5], sin[:5]))
    close(out[1:2], by_complex(x[1:2], cos[3:8], sin[3:8]))
    close(out[2:3, :2], by_complex(x[2:3, :2], cos[7:], sin[7:]))
    assert torch.equal(out[2, 2:], x[2, 2:])  # positions 9.. are beyond the table
    assert torch.equal(out[3], x[3])


LENGTHS = [3, 0, 1, 5]


@pytest.mark.parametrize("offset", [0, 2, [0, 5, 4, 8]], ids=str)
def test_packed_sequences_start_at_their_own_position(offset: int | list[int], device: str):
    cu_seqlens = torch.tensor([0, 3, 3, 4, 9], dtype=torch.int32, device=device)
    x = torch.randn(11, 2, 8, device=device)  # two rows belong to no sequence
    cos, sin = tables(9, 4, device=device)
    given = offset if isinstance(offset, int) else torch.tensor(offset, device=device)
    first = [offset] * 4 if isinstance(offset, int) else offset
    for max_seqlen in (5, torch.tensor(5, device=device)):
        out = apply_rotary_emb(
            x, cos, sin, seqlen_offsets=given, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
        )
        start = 0
        for length, position in zip(LENGTHS, first, strict=True):
            inside = min(length, 9 - position)
            rows = slice(position, position + inside)
            expected = by_complex(x[start : start + inside], cos[rows], sin[rows])
            close(out[start : start + inside], expected)
            assert torch.equal(
                out[start + inside : start + length], x[start + inside : start + length]
            )
            start += length
        assert torch.equal(out[9:], x[9:])


def test_packed_equals_dense_per_sequence_also_with_long_tables():
    x = torch.randn(3 * 4, 2, 8)
    cos, sin = tables(7, 4)
    cu_seqlens = torch.tensor([0, 4, 8, 12], dtype=torch.int32)
    packed = apply_rotary(x, cos, sin, cu_seqlens=cu_seqlens, max_seqlen=4)
    assert torch.equal(packed.view(3, 4, 2, 8), apply_rotary(x.view(3, 4, 2, 8), cos, sin))


def test_torch_formula_takes_a_table_for_each_sequence():
    x = torch.randn(2, 5, 3, 16)
    cos, sin = (t.view(2, 5, 6) for t in tables(10, 6))
    close(apply_rotary_emb_torch(x, cos, sin), by_complex(x, cos, sin))
    close(apply_rotary_emb_torch(x[0], cos[0], sin[0]), by_complex(x[0], cos[0], sin[0]))


def test_empty_inputs():
    cos, sin = tables(4, 4)
    assert apply_rotary_emb(torch.zeros(0, 4, 2, 8), cos, sin).shape == (0, 4, 2, 8)
    assert apply_rotary_emb(torch.zeros(2, 0, 2, 8), cos[:0], sin[:0]).shape == (2, 0, 2, 8)
    nothing = torch.zeros(1, dtype=torch.int32)
    packed = apply_rotary_emb(
        torch.ones(3, 2, 8), cos, sin, cu_seqlens=nothing, max_seqlen=0, seqlen_offsets=nothing[:0]
    )
    assert packed.eq(1).all()


# ---- in place -----------------------------------------------------------------------------------


@both_pairings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place_writes_and_returns_the_argument(
    dtype: torch.dtype, interleaved: bool, device: str
):
    x = torch.randn(2, 5, 3, 16, device=device).to(dtype)
    cos, sin = tables(5, 6, device=device)
    expected = apply_rotary_emb(x, cos, sin, interleaved)
    for function in (apply_rotary_emb, apply_rotary):
        buffer = torch.full((2, 5, 6, 20), math.nan, device=device).to(dtype)
        view = buffer[:, :, ::2, 2:18]
        view.copy_(x)
        assert function(view, cos, sin, interleaved=interleaved, inplace=True) is view
        assert torch.equal(view, expected)
        assert buffer.isnan().sum() == buffer.numel() - view.numel()


def test_in_place_result_requires_a_gradient_and_is_the_argument():
    x = torch.randn(1, 3, 2, 4, requires_grad=True) * 1
    assert apply_rotary_emb(x, *tables(3, 2), inplace=True) is x


@both_pairings
def test_in_place_on_a_leaf_that_requires_a_gradient_works(interleaved: bool):
    """As in FlashAttention-2: written in place, and the gradient is that of the rotation."""
    cos, sin = tables(3, 2)
    before = torch.randn(1, 3, 2, 4)
    weight = torch.randn(1, 3, 2, 4)
    outside = before.clone().requires_grad_()
    expected = apply_rotary_emb(outside, cos, sin, interleaved)
    (expected * weight).sum().backward()
    leaf = before.clone().requires_grad_()
    out = apply_rotary_emb(leaf, cos, sin, interleaved, inplace=True)
    assert out.data_ptr() == leaf.data_ptr() and leaf.is_leaf and out.requires_grad
    torch.testing.assert_close(leaf.detach(), expected.detach())
    (out * weight).sum().backward()
    assert leaf.grad is not None and outside.grad is not None
    torch.testing.assert_close(leaf.grad, outside.grad)

    qkv = torch.randn(1, 3, 3, 2, 4).requires_grad_()
    out = apply_rotary_emb_qkv_(qkv, cos, sin, interleaved=interleaved)
    out.sum().backward()
    kv = torch.randn(1, 3, 2, 2, 4).requires_grad_()
    apply_rotary_emb_kv_(kv, cos, sin, interleaved).sum().backward()
    assert kv.grad is not None and qkv.grad is not None
    torch.testing.assert_close(kv.grad[:, :, 0], qkv.grad[:, :, 1])


def test_in_place_on_memory_that_overlaps_is_an_error():
    """It would be rotated once for each element that shares it, or by what it has become."""
    cos, sin = tables(3, 2)
    expanded = torch.randn(1, 1, 2, 4).expand(1, 3, 2, 4)
    with pytest.raises(ValueError, match="x has stride .* share memory"):
        apply_rotary_emb(expanded, cos, sin, inplace=True)
    windows = torch.randn(40).as_strided((1, 3, 2, 4), (24, 4, 4, 1))
    with pytest.raises(ValueError, match="x has stride .* share memory"):
        apply_rotary_emb(windows, cos, sin, inplace=True)
    x = torch.randn(1, 3, 2, 4)
    with pytest.raises(ValueError, match="x overlaps sin in memory"):
        apply_rotary_emb(x, cos, x.view(6, 4)[:3, :2], inplace=True)


@both_pairings
@pytest.mark.parametrize("xpos", [False, True])
@pytest.mark.parametrize("offset", [0, 2, "tensor"])
def test_qkv_rotates_q_and_k_in_place(offset: Any, xpos: bool, interleaved: bool, device: str):
    cos, sin = tables(9, 6, device=device)
    cos_k, sin_k = tables(9, 6, device=device) if xpos else (cos, sin)
    first = [1, 3] if offset == "tensor" else [offset] * 2
    if offset == "tensor":
        offset = torch.tensor(first, device=device)
    rows = torch.tensor([[p + i for i in range(5)] for p in first])
    given = (cos_k, sin_k) if xpos else (None, None)

    qkv = torch.randn(2, 5, 3, 4, 16, device=device)
    q, k, v = (t.clone() for t in qkv.unbind(2))
    assert apply_rotary_emb_qkv_(qkv, cos, sin, *given, interleaved, offset) is qkv
    close(qkv[:, :, 0], by_complex(q, cos[rows], sin[rows], interleaved))
    close(qkv[:, :, 1], by_complex(k, cos_k[rows], sin_k[rows], interleaved))
    assert torch.equal(qkv[:, :, 2], v)

    heads = torch.randn(2, 5, 6 + 2 + 2, 16, device=device)
    q, k, v = (t.clone() for t in heads.split((6, 2, 2), 2))
    result = apply_rotary_emb_qkv_(heads, cos, sin, *given, interleaved, offset, num_heads_q=6)
    assert result is heads
    close(heads[:, :, :6], by_complex(q, cos[rows], sin[rows], interleaved))
    close(heads[:, :, 6:8], by_complex(k, cos_k[rows], sin_k[rows], interleaved))
    assert torch.equal(heads[:, :, 8:], v)


@both_pairings
def test_kv_rotates_k_in_place(interleaved: bool, device: str):
    cos, sin = tables(7, 8, device=device)
    kv = torch.randn(2, 5, 2, 3, 16, device=device)
    k, v = (t.clone() for t in kv.unbind(2))
    assert apply_rotary_emb_kv_(kv, cos, sin, interleaved, 2) is kv
    close(kv[:, :, 0], by_complex(k, cos[2:], sin[2:], interleaved))
    assert torch.equal(kv[:, :, 1], v)


# ---- gradients ----------------------------------------------------------------------------------

CU_SEQLENS = torch.tensor([0, 2, 3], dtype=torch.int32)
DIFFERENTIABLE: dict[str, tuple[tuple[int, ...], Callable[..., Tensor]]] = {
    "dense": ((2, 3, 2, 6), lambda x, c, s: apply_rotary_emb(x, c, s)),
    "interleaved": ((2, 3, 2, 6), lambda x, c, s: apply_rotary_emb(x, c, s, True)),
    "inplace": ((2, 3, 2, 6), lambda x, c, s: apply_rotary_emb(x * 1, c, s, False, True)),
    "conjugate": ((2, 3, 2, 6), lambda x, c, s: apply_rotary(x, c, s, conjugate=True)),
    "offsets": (
        (2, 3, 2, 6),
        lambda x, c, s: apply_rotary_emb(x, c, s, seqlen_offsets=torch.tensor([1, 3])),
    ),
    "packed": (
        (4, 2, 6),
        lambda x, c, s: apply_rotary_emb(x, c, s, cu_seqlens=CU_SEQLENS, max_seqlen=2),
    ),
    "qkv": ((1, 3, 3, 2, 4), lambda x, c, s: apply_rotary_emb_qkv_(x * 1, c, s)),
    "qkv_xpos": (
        (1, 3, 3, 2, 4),
        lambda x, c, s: apply_rotary_emb_qkv_(x * 1, c, s, 2 * s, 3 * c, True),
    ),
    "qkv_heads": (
        (1, 3, 5, 4),
        lambda x, c, s: apply_rotary_emb_qkv_(x * 1, c, s, num_heads_q=3),
    ),
    "kv": ((1, 3, 2, 2, 4), lambda x, c, s: apply_rotary_emb_kv_(x * 1, c, s)),
    "torch": ((2, 3, 2, 6), lambda x, c, s: apply_rotary_emb_torch(x, c[:3], s[:3])),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivatives(name: str):
    shape, function = DIFFERENTIABLE[name]
    x = torch.randn(shape, dtype=F64, requires_grad=True)
    cos, sin = tables(4, 2, F64)
    assert gradcheck(lambda x: function(x, cos, sin), x)
    assert gradgradcheck(lambda x: function(x, cos, sin), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradient_is_the_conjugate_rotation(dtype: torch.dtype, device: str):
    cos, sin = tables(5, 6, device=device)
    x = torch.randn(2, 5, 3, 16, device=device).to(dtype).requires_grad_()
    grad = torch.randn_like(x)
    before = grad.clone()
    for inplace in (False, True):
        out = apply_rotary_emb(x * 1, cos, sin, inplace=inplace)
        (dx,) = torch.autograd.grad(out, x, grad)
        assert dx.dtype == dtype
        close(dx, by_complex(grad, cos, -sin))
        assert torch.equal(grad, before)  # an in-place forward does not entitle to the gradient


def test_gradients_flow_through_an_in_place_view():
    """As a model does it: Q is a view of the projection's output."""
    cos, sin = tables(5, 4)
    x = torch.randn(2, 5, 3, 2, 8, requires_grad=True)
    grad = torch.randn(2, 5, 3, 2, 8)
    qkv = x * 1
    apply_rotary_emb(qkv[:, :, 0], cos, sin, inplace=True)
    (dx,) = torch.autograd.grad(qkv, x, grad)
    close(dx[:, :, 0], by_complex(grad[:, :, 0], cos, -sin))
    assert torch.equal(dx[:, :, 1:], grad[:, :, 1:])


def test_torch_formula_gives_the_tables_gradients():
    x = torch.randn(2, 3, 2, 4, dtype=F64, requires_grad=True)
    cos, sin = (t.requires_grad_() for t in tables(3, 2, F64))
    assert gradcheck(apply_rotary_emb_torch, (x, cos, sin))
    assert gradcheck(lambda *args: apply_rotary_emb_torch(*args, interleaved=True), (x, cos, sin))


def test_backward_keeps_no_tokens():
    x = torch.randn(2, 5, 3, 16, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        apply_rotary_emb(x, *tables(5, 8))
    assert saved and all(tensor.numel() == 5 * 8 for tensor in saved)


# ---- torch.compile, streams ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["inplace", "offsets", "packed", "qkv_xpos"])
def test_compiles_without_graph_breaks(name: str):
    shape, function = DIFFERENTIABLE[name]
    x = torch.randn(shape, dtype=F64, requires_grad=True)
    cos, sin = tables(4, 2, F64)
    expected = function(x, cos, sin)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    actual = compiled(x, cos, sin)
    close(actual, expected)
    grad = torch.randn_like(expected)
    close(torch.autograd.grad(actual, x, grad)[0], torch.autograd.grad(expected, x, grad)[0])


def test_compiled_function_writes_into_its_argument():
    cos, sin = tables(5, 8)
    qkv = torch.randn(2, 5, 3, 2, 16)
    expected = apply_rotary_emb_qkv_(qkv.clone(), cos, sin)
    torch.compile(apply_rotary_emb_qkv_, backend="aot_eager", fullgraph=True)(qkv, cos, sin)
    close(qkv, expected)


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    cos, sin = tables(8, 8, device="cuda")
    x = torch.randn(2, 5, 3, 16, device="cuda", requires_grad=True)
    offsets = torch.tensor([1, 2], device="cuda")
    cu_seqlens = torch.tensor([0, 4, 10], dtype=torch.int32, device="cuda")
    max_seqlen = torch.tensor(6, device="cuda")
    rotary = RotaryEmbedding(16, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets)
        packed = apply_rotary_emb(
            x.view(10, 3, 16), cos, sin, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
        )
        qkv = rotary(torch.stack((x, x, x), 2), seqlen_offset=offsets, max_seqlen=8)
        (out.sum() + packed.sum() + qkv.sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- errors -------------------------------------------------------------------------------------

X, C = torch.zeros(2, 5, 3, 16), torch.zeros(9, 8)
QKV, HEADS, CU = torch.zeros(2, 5, 3, 2, 16), torch.zeros(2, 5, 8, 16), torch.tensor([0, 2, 5])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: apply_rotary_emb(None, C, C), TypeError, "x is NoneType"),
        (lambda: apply_rotary_emb(X.int(), C, C), TypeError, "x has dtype torch.int32"),
        (lambda: apply_rotary_emb(X, C.int(), C), TypeError, "cos has dtype torch.int32"),
        (lambda: apply_rotary_emb(X, C, None), TypeError, "sin is NoneType"),
        (lambda: apply_rotary_emb(X, C, C.to("meta")), ValueError, "sin is on meta"),
        (lambda: apply_rotary_emb(X[0], C, C), ValueError, r"x has shape \(5, 3, 16\)"),
        (lambda: apply_rotary_emb(X, C, C[:8]), ValueError, "expected one shape"),
        (lambda: apply_rotary_emb(X, C[None], C[None]), ValueError, "apply_rotary_emb_torch"),
        (lambda: apply_rotary_emb(X[..., :14], C, C), ValueError, "rotary_dim is 16"),
        (lambda: apply_rotary_emb(X, C[:4], C[:4]), ValueError, "4 rows, too few for 5 tokens"),
        (lambda: apply_rotary_emb(X, C, C, seqlen_offsets=5), ValueError, "from position 5"),
        (lambda: apply_rotary_emb(X, C, C, seqlen_offsets=-1), ValueError, "seqlen_offsets is -1"),
        (lambda: apply_rotary_emb(X, C, C, seqlen_offsets=1.5), TypeError, "expected an integer"),
        (lambda: apply_rotary_emb(X, C, C, seqlen_offsets=CU), ValueError, r"expected \(batch,\)"),
        (
            lambda: apply_rotary_emb(X, C, C, seqlen_offsets=torch.ones(2)),
            TypeError,
            "seqlen_offsets has dtype torch.float32",
        ),
        (lambda: apply_rotary_emb(X, C, C, cu_seqlens=CU), ValueError, r"\(total, num_heads, he"),
        (lambda: apply_rotary_emb(X[0], C, C, cu_seqlens=CU), ValueError, "max_seqlen is None"),
        (
            lambda: apply_rotary_emb(X[0], C, C, cu_seqlens=CU, max_seqlen=10),
            ValueError,
            "too few for 10 tokens",
        ),
        (
            lambda: apply_rotary_emb(X[0], C, C, cu_seqlens=CU.float(), max_seqlen=3),
            TypeError,
            "cu_seqlens has dtype torch.float32",
        ),
        (
            lambda: apply_rotary_emb(X[0], C, C, cu_seqlens=CU[None], max_seqlen=3),
            ValueError,
            r"expected \(batch \+ 1,\)",
        ),
        (
            lambda: apply_rotary_emb(X, C.clone().requires_grad_(), C),
            NotImplementedError,
            "use apply_rotary_emb_torch",
        ),
        (lambda: apply_rotary_emb_torch(X, C, C), ValueError, "a row for each token"),
        (lambda: apply_rotary_emb_torch(X[0, 0, 0], C, C), ValueError, "num_heads, head_dim"),
        (lambda: apply_rotary_emb_qkv_(HEADS, C, C), ValueError, "num_heads_q is None"),
        (
            lambda: apply_rotary_emb_qkv_(HEADS, C, C, num_heads_q=3),
            ValueError,
            "qkv has 8 heads",
        ),
        (lambda: apply_rotary_emb_qkv_(QKV[:, :, :2], C, C), ValueError, r"\(batch, seqlen, 3, "),
        (lambda: apply_rotary_emb_qkv_(QKV, C, C, C), ValueError, "both or neither"),
        (lambda: apply_rotary_emb_qkv_(QKV, C, C, C[:3], C[:3]), ValueError, "cos_k and sin_k"),
        (lambda: apply_rotary_emb_kv_(QKV, C, C), ValueError, r"\(batch, seqlen, 2, "),
    ],
)
def test_errors_name_the_argument(call: Callable[[], Any], error: type, message: str):
    with pytest.raises(error, match=message):
        call()
