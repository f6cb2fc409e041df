"""A small causal transformer, trained with our attention and with the reference, loses alike.

Heads have (64, 128) dims and unequal counts: 8 query heads, 4 key heads, 2 value heads. In the
simulator one layer has a few tokens, on a GPU the size is real.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from conftest import Runner
from torch import Tensor, nn

import flash_attn_interface
from flash_attn_interface.reference.forward import attention_reference

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """Of the model and its training."""

    layers: int
    heads: tuple[int, int, int]  # of q, k, v
    head_dims: tuple[int, int]  # of q and k, of v
    width: int
    tokens: int  # vocabulary
    batch: int
    seqlen: int
    steps: int
    learning_rate: float
    tolerance: float  # of losses


TOY = Size(2, (4, 2, 1), (64, 128), 32, 16, 2, 40, 8, 2e-3, 2e-3)
REAL = Size(2, (8, 4, 2), (64, 128), 512, 256, 8, 1024, 40, 1e-3, 1e-2)


class Layer(nn.Module):
    def __init__(self, size: Size, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        self.shapes = [
            (heads, head_dim)
            for heads, head_dim in zip(
                size.heads, (size.head_dims[0], *size.head_dims), strict=True
            )
        ]
        self.norm = nn.LayerNorm(size.width)
        self.inputs = nn.Linear(size.width, sum(math.prod(shape) for shape in self.shapes))
        self.output = nn.Linear(size.heads[0] * size.head_dims[1], size.width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(size.width),
            nn.Linear(size.width, 4 * size.width),
            nn.GELU(),
            nn.Linear(4 * size.width, size.width),
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.inputs(self.norm(x)).split([math.prod(s) for s in self.shapes], -1)
        q, k, v = (
            part.unflatten(-1, shape).to(torch.bfloat16)  # views of one tensor until here
            for part, shape in zip(parts, self.shapes, strict=True)
        )
        x = x + self.output(self.attention(q, k, v).float().flatten(-2))
        return x + self.mlp(x)


class Transformer(nn.Module):
    def __init__(self, size: Size, attention: Attention) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.tokens, size.width)
        self.positions = nn.Parameter(torch.randn(size.seqlen, size.width) * 0.1)
        self.layers = nn.Sequential(*(Layer(size, attention) for _ in range(size.layers)))
        self.head = nn.Linear(size.width, size.tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(tokens) + self.positions))


def text(size: Size, device: torch.device) -> Tensor:
    """Random beginnings, repeated: what follows can be learnt by looking back, or by heart."""
    period = size.seqlen // 4
    start = torch.randint(size.tokens, (size.batch, period), device=device)
    return start.repeat(1, size.seqlen // period + 1)[:, : size.seqlen + 1]


def losses(size: Size, attention: Attention, device: torch.device, seed: int) -> list[float]:
    torch.manual_seed(seed)
    model = Transformer(size, attention).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=size.learning_rate)
    curve = []
    tokens = text(size, device)
    for _ in range(size.steps):
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = flash_attn_interface.flash_attn_func(q, k, v, causal=True)
    assert isinstance(out, Tensor)
    return out


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention_reference(q, k, v, causal=True)[0]


def check(size: Size, runner: Runner) -> None:
    seed = int(torch.randint(1 << 30, ()))
    with runner.active():
        got = losses(size, ours, runner.device, seed)
    want = losses(size, reference, runner.device, seed)
    assert want[-1] < 0.9 * want[0], f"the reference did not learn: {want}"
    bound = size.tolerance
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=bound, atol=bound)


@pytest.mark.parametrize("runner", [pytest.param("sim", marks=pytest.mark.sim)], indirect=True)
def test_the_loss_curve_in_the_simulator(runner: Runner):
    check(TOY, runner)


@pytest.mark.gpu
def test_the_loss_curve_on_a_gpu(gpu: Runner):
    check(REAL, gpu)
