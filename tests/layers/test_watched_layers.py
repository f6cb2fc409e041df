"""Rotary embeddings, norms, losses, sinks and merging with tensors that somebody watches
(test_watchers.py): they are made of PyTorch operations, so their checks must not stand in the way
of tensors that have no memory, or no values yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.fx.experimental.proxy_tensor import make_fx

import flash_attn_interface as fa3
from flash_attn import bert_padding
from flash_attn.layers import rotary
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn.ops.triton.layer_norm import layer_norm_fn
from flash_attn_interface.reference.sinks import apply_sinks

BF16 = torch.bfloat16
Made = tuple[Callable[..., Tensor], list[Tensor]]


def tables() -> list[Tensor]:
    return [torch.rand(6, 4), torch.rand(6, 4)]


def qkv(parts: int = 3) -> Tensor:
    return torch.randn(2, 5, parts, 4, 16, dtype=BF16)


def layer_norm(x: Tensor, weight: Tensor, out: Tensor, residual_out: Tensor) -> Tensor:
    return layer_norm_fn(
        x, weight, None, residual=x, prenorm=True, out=out, residual_out=residual_out
    )[0]


CASES: dict[str, Callable[[], Made]] = {
    "rotary": lambda: (
        lambda x, cos, sin: rotary.apply_rotary_emb(x, cos, sin),
        [qkv()[:, :, 0].clone(), *tables()],
    ),
    "rotary-inplace": lambda: (
        lambda x, cos, sin: rotary.apply_rotary_emb(x, cos, sin, inplace=True),
        [qkv()[:, :, 0].clone(), *tables()],
    ),
    "rotary-qkv": lambda: (
        lambda x, cos, sin: rotary.apply_rotary_emb_qkv_(x, cos, sin),
        [qkv(), *tables()],
    ),
    "rotary-kv": lambda: (
        lambda x, cos, sin: rotary.apply_rotary_emb_kv_(x, cos, sin),
        [qkv(2), *tables()],
    ),
    "rotary-module": lambda: (lambda x: rotary.RotaryEmbedding(8, device=x.device)(x), [qkv()]),
    "layer-norm-out": lambda: (
        layer_norm,
        [torch.randn(2, 3, 8), torch.ones(8), torch.empty(2, 3, 8), torch.empty(2, 3, 8)],
    ),
    "combine-out": lambda: (
        lambda parts, lse, out: fa3.flash_attn_combine(parts, lse, out=out)[0],
        [torch.randn(3, 2, 4, 2, 8), torch.randn(3, 2, 4, 2), torch.empty(2, 4, 2, 8)],
    ),
    "cross-entropy": lambda: (
        lambda logits, labels: cross_entropy_loss(logits, labels)[0],
        [torch.randn(4, 7), torch.tensor([0, 3, 6, -100])],
    ),
    "sinks": lambda: (
        lambda *tensors: apply_sinks(*tensors)[0],
        [torch.randn(2, 3, 4, 8), torch.randn(2, 4, 3), torch.zeros(4)],
    ),
    "index": lambda: (
        lambda rows, indices: bert_padding.index_first_axis(rows, indices),
        [torch.randn(6, 5), torch.tensor([0, 2, 5])],
    ),
    "index-residual": lambda: (
        lambda rows, indices: sum(
            part.sum(0) for part in bert_padding.index_first_axis_residual(rows, indices)
        ),
        [torch.randn(6, 5), torch.tensor([0, 2, 5])],
    ),
    "index-put": lambda: (
        lambda rows, indices: bert_padding.index_put_first_axis(rows, indices, 6),
        [torch.randn(3, 5), torch.tensor([0, 2, 5])],
    ),
}
every_case = pytest.mark.parametrize("make", CASES.values(), ids=CASES)


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


@every_case
def test_meta_and_fake_tensors_have_the_shape_of_the_result(make: Callable[[], Made]) -> None:
    function, tensors = make()
    want = function(*copies(tensors))
    with FakeTensorMode() as mode:
        fake = function(*(mode.from_tensor(tensor) for tensor in tensors))
    meta = function(*(tensor.to("meta") for tensor in tensors))
    assert want.shape == fake.shape == meta.shape and want.dtype == fake.dtype == meta.dtype


@every_case
@pytest.mark.parametrize("way", ["collective", "negated", "make_fx"])
def test_the_same_result(make: Callable[[], Made], way: str) -> None:
    function, tensors = make()
    want = function(*copies(tensors))
    run, given = function, copies(tensors)
    if way == "collective":
        given = [AsyncCollectiveTensor(tensor) for tensor in given]
    elif way == "negated":
        given = [torch._neg_view(tensor.neg()) for tensor in given]
    else:
        run = make_fx(function)(*copies(tensors))
    torch.testing.assert_close(run(*given) + 0, want)


@every_case
def test_torch_func_grad_is_autograds(make: Callable[[], Made]) -> None:
    function, (first, *others) = make()
    if make is CASES["combine-out"]:
        pytest.skip("out= has no gradient")
    weights = torch.randn(function(first.clone(), *copies(others)).shape)

    def loss(x: Tensor) -> Any:
        return (function(x * 1, *copies(others)) * weights).sum()

    leaf = first.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(first), want, rtol=2e-2, atol=2e-2)
