"""Packing and unpacking of padded batches: hand-worked cases, gradients, what clients unpack."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import fresh_memory_is_nan
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import flash_attn.bert_padding
from flash_attn.bert_padding import (
    IndexFirstAxis,
    IndexFirstAxisResidual,
    IndexPutFirstAxis,
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    rearrange,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)
from flash_attn_interface.layers import bert_padding as padding

SIGNATURES = {
    "unpad_input": "hidden_states, attention_mask, unused_mask=None",
    "unpad_input_for_concatenated_sequences": "hidden_states, attention_mask_in_length",
    "pad_input": "hidden_states, indices, batch, seqlen",
    "index_first_axis": "input, indices",
    "index_put_first_axis": "values, indices, first_axis_dim",
    "index_first_axis_residual": "input, indices",
}
CLASSES = ("IndexFirstAxis", "IndexPutFirstAxis", "IndexFirstAxisResidual")

# Row 0 has tokens 0 and 2, row 1 none, row 2 all; as flattened positions 0, 2, 8, 9, 10, 11.
MASK = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
INDICES = [0, 2, 8, 9, 10, 11]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def hidden_states(*tail: int, **options: Any) -> Tensor:
    return torch.randn(3, 4, *tail, **options)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def equal(actual: Tensor, expected: Tensor) -> None:
    """Values, shape and dtype; on any device."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, check_device=False)


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_upstreams(name: str):
    function = getattr(flash_attn.bert_padding, name)
    parameters = inspect.signature(function).parameters.values()
    assert ", ".join(str(p.replace(annotation=p.empty)) for p in parameters) == SIGNATURES[name]
    assert "Raises:" in (inspect.getdoc(function) or "")


def test_module_re_exports_the_package():
    assert set(flash_attn.bert_padding.__all__) == {*SIGNATURES, *CLASSES, "rearrange"}
    for name in (*SIGNATURES, *CLASSES):
        assert getattr(flash_attn.bert_padding, name) is getattr(padding, name)


# ---- unpad and pad ------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int32, torch.int64, torch.float32])
def test_unpad_input_returns_upstreams_five(mask_dtype: torch.dtype, device: str):
    x = hidden_states(5, device=device)
    result = unpad_input(x, MASK.to(device, mask_dtype))
    tokens, indices, cu_seqlens, max_seqlen, seqused = result
    assert isinstance(result, tuple) and len(result) == 5
    equal(tokens, torch.stack([x[i // 4, i % 4] for i in INDICES]))
    equal(indices, torch.tensor(INDICES))
    equal(cu_seqlens, int32(0, 2, 2, 6))
    assert max_seqlen == 4 and type(max_seqlen) is int
    equal(seqused, int32(2, 0, 4))
    assert {t.device for t in (tokens, indices, cu_seqlens, seqused)} == {x.device}


def test_unused_tokens_are_packed_but_not_counted():
    unused = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]])  # (0, 2) is in both masks
    _, indices, cu_seqlens, max_seqlen, seqused = unpad_input(hidden_states(2), MASK, unused)
    equal(indices, torch.tensor([0, 1, 2, 7, 8, 9, 10, 11]))
    equal(cu_seqlens, int32(0, 3, 4, 8))
    assert max_seqlen == 4
    equal(seqused, int32(2, 0, 4))


@pytest.mark.parametrize("tail", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64]
)
def test_pad_input_undoes_unpad_input(tail: tuple[int, ...], dtype: torch.dtype, device: str):
    x = hidden_states(*tail).mul(10).to(device, dtype)
    with fresh_memory_is_nan():
        tokens, indices, *_ = unpad_input(x, MASK.to(device))
        padded = pad_input(tokens, indices, 3, 4)
    kept = MASK.to(device).view(3, 4, *[1] * len(tail))
    equal(padded, torch.where(kept.bool(), x, torch.zeros_like(x)))


def test_unpadding_a_view_reads_its_strides():
    x = torch.randn(4, 3, 6).transpose(0, 1)[..., ::2]
    equal(unpad_input(x, MASK)[0], unpad_input(x.contiguous(), MASK)[0])


@pytest.mark.parametrize("batch, seqlen", [(3, 4), (0, 4), (3, 0)])
def test_nothing_selected(batch: int, seqlen: int):
    mask = torch.zeros(batch, seqlen, dtype=torch.bool)
    x = torch.randn(batch, seqlen, 5)
    tokens, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, mask)
    assert tokens.shape == (0, 5) and indices.shape == (0,) and max_seqlen == 0
    equal(cu_seqlens, torch.zeros(batch + 1, dtype=torch.int32))
    equal(seqused, torch.zeros(batch, dtype=torch.int32))
    equal(pad_input(tokens, indices, batch, seqlen), torch.zeros_like(x))


def test_large_batch_agrees_with_nonzero(device: str):
    mask = torch.rand(7, 501, device=device) < 0.6
    tokens, indices, *_ = unpad_input(torch.arange(7 * 501, device=device).view(7, 501), mask)
    equal(indices, mask.flatten().nonzero().flatten())
    equal(tokens, indices)


def test_concatenated_sequences(device: str):
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = torch.randn(3, 6, 2, device=device)
    result = unpad_input_for_concatenated_sequences(x, lengths.to(device))
    tokens, indices, cu_seqlens, max_seqlen = result
    assert isinstance(result, tuple) and len(result) == 4
    expected = torch.tensor([0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17])
    equal(indices, expected)
    equal(tokens, x.view(18, 2)[expected])
    equal(cu_seqlens, int32(0, 2, 5, 8, 10, 16))
    assert max_seqlen == 6 and type(max_seqlen) is int
    padded = pad_input(tokens, indices, 3, 6)
    equal(padded[2], x[2])
    assert not padded[:2, 5].any()


def test_concatenated_sequences_may_be_empty_and_lengths_narrow():
    x = torch.randn(2, 6, 3)
    _, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(
        x, torch.tensor([[0, 0], [2, 1]])
    )
    equal(indices, torch.tensor([6, 7, 8]))
    equal(cu_seqlens, int32(0, 2, 3))
    assert max_seqlen == 2
    nothing = unpad_input_for_concatenated_sequences(x, torch.zeros(2, 6, dtype=torch.int32))
    assert nothing[0].shape == (0, 3) and nothing[3] == 0
    equal(nothing[2], int32(0))


# ---- row functions ------------------------------------------------------------------------------


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_row_functions_by_hand(index_dtype: torch.dtype):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    indices = torch.tensor([2, 0], dtype=index_dtype)
    taken = torch.tensor([[5.0, 6.0], [1.0, 2.0]])
    equal(index_first_axis(x, indices), taken)
    equal(IndexFirstAxis.apply(x, indices), taken)
    placed = torch.tensor([[1.0, 2.0], [0.0, 0.0], [5.0, 6.0], [0.0, 0.0]])
    equal(index_put_first_axis(taken, indices, 4), placed)
    equal(IndexPutFirstAxis.apply(taken, indices.long(), 4), placed)
    for function in (index_first_axis_residual, IndexFirstAxisResidual.apply):
        gathered, residual = function(x, indices)
        equal(gathered, taken)
        equal(residual, x)
        assert residual.data_ptr() == x.data_ptr()


def test_gradients_by_hand():
    indices = torch.tensor([2, 0])
    grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    x = torch.zeros(3, 2, requires_grad=True)
    (dx,) = torch.autograd.grad(index_first_axis(x, indices), x, grad)
    equal(dx, torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 2.0]]))

    values = torch.zeros(2, 2, requires_grad=True)
    rows = torch.arange(6.0).view(3, 2)
    (dvalues,) = torch.autograd.grad(index_put_first_axis(values, indices, 3), values, rows)
    equal(dvalues, torch.tensor([[4.0, 5.0], [0.0, 1.0]]))

    gathered, residual = index_first_axis_residual(x, indices)
    before = rows.clone()
    (dx,) = torch.autograd.grad((gathered, residual), x, (grad, rows))
    equal(dx, torch.tensor([[3.0, 5.0], [2.0, 3.0], [5.0, 7.0]]))
    equal(rows, before)  # the caller's gradient is not changed


def test_gradient_of_a_repeated_row_adds_up():
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([1, 1, 0, 1])
    assert gradcheck(lambda t: index_first_axis(t, indices), x)
    assert gradcheck(lambda t: index_first_axis_residual(t, indices), x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: index_first_axis(x.flatten(0, 1), torch.tensor([5, 0, 7])),
        lambda x: index_first_axis_residual(x.flatten(0, 1), torch.tensor([5, 0, 7])),
        lambda x: index_put_first_axis(x[0], torch.tensor([5, 0, 7, 2]), 9),
        lambda x: unpad_input(x, MASK)[0],
        lambda x: unpad_input_for_concatenated_sequences(x, torch.tensor([[2, 1], [0, 0], [4, 0]]))[
            0
        ],
        lambda x: pad_input(x.flatten(0, 1)[:6], torch.tensor(INDICES), 3, 4),
    ],
    ids=["gather", "residual", "put", "unpad", "unpad_concatenated", "pad"],
)
def test_derivatives(function: Callable[[Tensor], Any]):
    x = hidden_states(2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(function, x)
    assert gradgradcheck(function, x)


def test_row_functions_compile_without_graph_breaks():
    def rows(x: Tensor, indices: Tensor) -> Tensor:
        gathered, residual = index_first_axis_residual(x, indices)
        padded = pad_input(gathered.sin(), indices, 3, 4)
        return index_first_axis(padded.flatten(0, 1), indices).sum() + residual.cos().sum()

    x = torch.randn(12, 2, requires_grad=True)
    indices = torch.tensor(INDICES)
    compiled = torch.compile(rows, backend="aot_eager", fullgraph=True)
    expected = rows(x, indices)
    torch.testing.assert_close(compiled(x, indices), expected)
    (actual_grad,) = torch.autograd.grad(compiled(x, indices), x)
    torch.testing.assert_close(actual_grad, torch.autograd.grad(expected, x)[0])


@pytest.mark.parametrize("whole_graph", [False, True])
def test_unpad_input_compiles(whole_graph: bool):
    """Reading sizes breaks the graph, unless the compiler is told to take them in."""
    x = hidden_states(2)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=whole_graph):
        compiled = torch.compile(unpad_input, backend="aot_eager", fullgraph=whole_graph)
        for actual, expected in zip(compiled(x, MASK), unpad_input(x, MASK), strict=True):
            assert torch.equal(torch.as_tensor(actual), torch.as_tensor(expected))


@pytest.mark.gpu
def test_unpad_waits_for_the_device_once():
    x, mask = hidden_states(2, device="cuda"), MASK.cuda()
    lengths = torch.tensor([[2, 1], [0, 0], [4, 0]], device="cuda")
    for function, argument in (
        (unpad_input, mask),
        (unpad_input_for_concatenated_sequences, lengths),
    ):
        with warnings.catch_warnings(record=True) as caught, sync_debug_mode("warn"):
            warnings.simplefilter("always")
            function(x, argument)
        assert len([w for w in caught if "called a synchronizing" in str(w.message)]) == 1


@pytest.mark.gpu
def test_the_other_functions_do_not_wait_for_the_device():
    x = hidden_states(2, device="cuda", requires_grad=True)
    tokens, indices, *_ = unpad_input(x, MASK.cuda())
    with sync_debug_mode("error"):
        gathered, residual = index_first_axis_residual(tokens, indices[:2])
        (pad_input(tokens, indices, 3, 4).sum() + gathered.sum() + residual.sum()).backward()


@contextmanager
def sync_debug_mode(mode: str) -> Iterator[None]:
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- errors -------------------------------------------------------------------------------------

X, I = torch.zeros(3, 4, 2), torch.tensor([1, 0])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: unpad_input([1], MASK), TypeError, "hidden_states is list"),
        (lambda: unpad_input(X, None), TypeError, "attention_mask is NoneType"),
        (lambda: unpad_input(X[0, 0], MASK), ValueError, r"expected \(batch, seqlen, ...\)"),
        (lambda: unpad_input(X, MASK[:2]), ValueError, r"attention_mask has shape \(2, 4\)"),
        (lambda: unpad_input(X, MASK[:, :3]), ValueError, r"attention_mask has shape \(3, 3\)"),
        (lambda: unpad_input(X, MASK, MASK[:, :3]), ValueError, r"unused_mask has shape \(3, 3\)"),
        (
            lambda: unpad_input(X, MASK.to("meta")),
            ValueError,
            "on meta but hidden_states is on cpu",
        ),
        (
            lambda: unpad_input_for_concatenated_sequences(X, MASK.bool()),
            TypeError,
            "for a mask of tokens use unpad_input",
        ),
        (
            lambda: unpad_input_for_concatenated_sequences(X, MASK * 3),
            ValueError,
            "add up to 12, but hidden_states has 4",
        ),
        (lambda: index_first_axis(X, [0]), TypeError, "indices is list"),
        (lambda: index_first_axis(X, I.bool()), TypeError, "indices has dtype torch.bool"),
        (lambda: index_first_axis(X, I.view(1, 2)), ValueError, "expected one dim"),
        (lambda: index_first_axis(X, I.to("meta")), ValueError, "indices is on meta"),
        (lambda: index_first_axis(X.sum(), I), ValueError, "input is a scalar"),
        (lambda: index_put_first_axis(X, I, 9), ValueError, "3 rows, but indices has 2"),
        (lambda: pad_input(None, I, 1, 2), TypeError, "hidden_states is NoneType"),
    ],
)
def test_errors_name_the_argument(call: Callable[[], Any], error: type, message: str):
    with pytest.raises(error, match=message):
        call()


# ---- rearrange, which clients import from here ---------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "expected", "lengths"),
    [
        ("b s ... -> (b s) ...", lambda x: x.flatten(0, 1), {}),
        ("b s h d -> b h s d", lambda x: x.transpose(1, 2), {}),
        ("b s h d -> b s (h d)", lambda x: x.flatten(2), {}),
        ("b s (two h) d -> two b s h d", lambda x: torch.stack(x.chunk(2, 2)), {"two": 2}),
        ("... d -> (...) d", lambda x: x.flatten(0, 2), {}),
        ("b s h d -> (d h) () (b s)", lambda x: x.permute(3, 2, 0, 1).reshape(20, 1, 6), {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rearrange(pattern: str, expected: Callable[[Tensor], Tensor], lengths: dict[str, int]):
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(rearrange(x, pattern, **lengths), expected(x))


MATRIX = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rearrange([1], "a -> a"), TypeError, "tensor is list"),
        (lambda: rearrange(MATRIX, 3), TypeError, "pattern is 3"),
        (lambda: rearrange(MATRIX, "a b"), ValueError, "pattern is 'a b': expected left -> right"),
        (lambda: rearrange(MATRIX, "a b -> a"), ValueError, "the same axes on both sides"),
        (lambda: rearrange(MATRIX, "a b -> a b b"), ValueError, "the same axes on both sides"),
        (
            lambda: rearrange(MATRIX, "a -> a"),
            ValueError,
            "left side of pattern 'a -> a' has 1 axes",
        ),
        (lambda: rearrange(MATRIX, "a ((b)) -> a b"), ValueError, "parentheses that do not nest"),
        (
            lambda: rearrange(MATRIX, "(a c) b -> a c b", c=7),
            ValueError,
            r"an axis of 3 is not \(a c\)",
        ),
        (lambda: rearrange(MATRIX, "(a c) b -> a c b"), ValueError, r"an axis of 3 is not \(a c\)"),
        (lambda: rearrange(MATRIX, "a b -> b a", z=1), ValueError, r"not all of \['z'\] are axes"),
        (lambda: rearrange(MATRIX, "(a c) b -> a c b", c=1.5), TypeError, "c is 1.5"),
    ],
)
def test_rearrange_names_what_is_wrong(call: Callable[[], Any], error: type, message: str):
    with pytest.raises(error, match=message):
        call()
