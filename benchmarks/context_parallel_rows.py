"""What bench_context_parallel.py times: rows, and each implementation's step on them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flash_attn_interface import flash_attn_func, flash_attn_varlen_func
from flash_attn_interface.context_parallel import Layout, attention

PEER = "ring-flash-attn"


@dataclass(frozen=True)
class Row:
    """lengths: of packed documents; one length is a dense sequence."""

    name: str
    lengths: tuple[int, ...]
    heads: tuple[int, int]  # of q; of k and v
    head_dims: tuple[int, int]  # of q and k; of v

    @property
    def packed(self) -> bool:
        return len(self.lengths) > 1

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def flops(self) -> float:
        """Forward and backward, of visible scores."""
        d, d_v = self.head_dims
        scores = sum(n * n for n in self.lengths) / 2 * self.heads[0]
        return 2.0 * scores * ((d + d_v) + (3 * d + 2 * d_v))


SHAPES = {
    "(128,128) 16 heads": ((16, 16), (128, 128)),
    "(192,128) 16 heads": ((16, 16), (192, 128)),
    "(128,128) 32 over 4": ((32, 4), (128, 128)),
}


def long_tailed(tokens: int, shortest: int = 128, longest: int = 32768) -> tuple[int, ...]:
    """Documents of 128 to 32k tokens, as many between 128 and 256 as between 16k and 32k, in an
    order that has nothing to do with their lengths; multiples of 128, which ring-flash-attn needs.
    """
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        u = float(torch.rand((), generator=generator))
        length = round(shortest * (longest / shortest) ** u / 128) * 128
        lengths.append(min(left, length))
    return tuple(lengths)


def rows_for(world: int) -> list[Row]:
    """Two GPUs: 16k to 128k tokens; more: 64k to 256k."""
    sizes = (16, 64, 128) if world <= 2 else (64, 256)
    rows = [
        Row(f"{shape} {k}k", (k * 1024,), heads, dims)
        for shape, (heads, dims) in SHAPES.items()
        for k in sizes
    ]
    heads, dims = SHAPES["(128,128) 16 heads"]
    tokens = sizes[-1] * 1024
    return [*rows, Row(f"(128,128) 16 heads packed {sizes[-1]}k", long_tailed(tokens), heads, dims)]


Step = Callable[[], tuple[Tensor, ...]]
"""Forward and backward once; (out, dq, dk, dv)."""


def draw(row: Row) -> tuple[Tensor, ...]:
    """q, k, v and dout, the same on every rank; dense ones have batch 1."""
    torch.manual_seed(1)
    (h, h_kv), (d, d_v) = row.heads, row.head_dims
    rows = (row.tokens,) if row.packed else (1, row.tokens)
    shapes = ((h, d), (h_kv, d), (h_kv, d_v), (h, d_v))
    return tuple(
        torch.randn(*rows, *shape, device="cuda", dtype=torch.bfloat16) for shape in shapes
    )


def step_of(call: Callable[..., Any], tensors: Iterable[Tensor]) -> Step:
    *inputs, dout = tensors
    inputs = [x.detach().requires_grad_() for x in inputs]

    def step() -> tuple[Tensor, ...]:
        out = call(*inputs)
        return (out.detach(), *torch.autograd.grad(out, inputs, dout))

    return step


def one_gpu(row: Row, tensors: tuple[Tensor, ...]) -> Step:
    if not row.packed:
        return step_of(lambda q, k, v: flash_attn_func(q, k, v, causal=True), tensors)
    starts = torch.tensor([0, *accumulate(row.lengths)], dtype=torch.int32, device="cuda")
    longest = max(row.lengths)
    return step_of(
        lambda q, k, v: flash_attn_varlen_func(
            q, k, v, starts, starts, longest, longest, causal=True
        ),
        tensors,
    )


def layout_of(row: Row, group: dist.ProcessGroup) -> Layout:
    if row.packed:
        return Layout(group, cu_seqlens=[0, *accumulate(row.lengths)])
    return Layout(group, seqlen=row.tokens)


def ours(layout: Layout, tensors: tuple[Tensor, ...], method: str) -> Step:
    local = [layout.shard(x) for x in tensors]
    return step_of(lambda q, k, v: attention(q, k, v, layout, causal=True, method=method), local)


def peer(row: Row, group: dist.ProcessGroup, tensors: tuple[Tensor, ...]) -> Step | None:
    """ring-flash-attn, on any tokens: its own way of dividing them does not matter for time."""
    spec = importlib.util.find_spec("ring_flash_attn")
    if spec is None or not spec.submodule_search_locations:
        return None
    if "ring_flash_attn" not in sys.modules:  # its __init__ wants a certain transformers
        parent = types.ModuleType("ring_flash_attn")
        parent.__path__ = list(spec.submodule_search_locations)
        sys.modules["ring_flash_attn"] = parent
    world = dist.get_world_size(group)
    if not row.packed:
        module = importlib.import_module("ring_flash_attn.zigzag_ring_flash_attn")
        local = [x.chunk(world, 1)[dist.get_rank(group)].contiguous() for x in tensors]
        return step_of(
            lambda q, k, v: module.zigzag_ring_flash_attn_func(q, k, v, causal=True, group=group),
            local,
        )
    if any(n % (2 * world) for n in row.lengths):
        return None
    module = importlib.import_module("ring_flash_attn.zigzag_ring_flash_attn_varlen")
    starts = torch.tensor([0, *accumulate(row.lengths)], dtype=torch.int32, device="cuda") // world
    longest = max(row.lengths) // world
    local = [x.chunk(world, 0)[dist.get_rank(group)].contiguous() for x in tensors]
    return step_of(
        lambda q, k, v: module.zigzag_ring_flash_attn_varlen_func(
            q, k, v, starts, longest, causal=True, group=group
        ),
        local,
    )
