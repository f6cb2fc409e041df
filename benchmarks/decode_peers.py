"""The implementations that bench_decode.py compares: one query a sequence over a cache.

Caches that only take equal head dims are stored padded, as their users would store them; the
padding is outside of the timing, but the memory that it makes a kernel read is inside.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import peers
import torch
import torch.nn.functional as F
from harness import Contestant
from peers import Unavailable, pad_to
from torch import Tensor


@dataclass(frozen=True)
class Decode:
    """Tensors of one row. caches: (k, v) pairs to use in turn, so that L2 never holds the next."""

    q: Tensor  # (batch, 1, num_heads_q, head_dim_qk)
    caches: Sequence[tuple[Tensor, Tensor]]
    page_table: Tensor | None
    cache_seqlens: Tensor
    qv: Tensor | None = None  # (batch, 1, num_heads_q, head_dim_v)

    @property
    def softmax_scale(self) -> float:
        return float(self.q.shape[-1] + (0 if self.qv is None else self.qv.shape[-1])) ** -0.5

    def contestant(self, name: str, call: Callable[[Tensor, Tensor], Tensor]) -> Contestant:
        turns = itertools.cycle(self.caches)
        return Contestant(name, lambda: call(*next(turns)))


@dataclass(frozen=True)
class Implementation:
    """As in peers.py."""

    key: str
    label: str
    make: Callable[[Decode], Contestant]


def make_ours(problem: Decode) -> Contestant:
    from flash_attn_interface import flash_attn_with_kvcache

    def call(k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_with_kvcache(
            problem.q, k, v, cache_seqlens=problem.cache_seqlens, page_table=problem.page_table,
            causal=True, qv=problem.qv,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    return problem.contestant("ours", call)


def make_fa3(problem: Decode) -> Contestant:
    """FlashAttention-3's binary, which chooses its number of splits."""
    peers.load_fa3()
    if torch.cuda.get_device_capability() != (9, 0):
        raise Unavailable("FA3 needs compute capability 9.0")
    forward = torch.ops.flash_attn_3.fwd
    head_dim_v = problem.caches[0][1].shape[-1]

    def contestant(width: int | None) -> Contestant:
        def wide(x: Tensor) -> Tensor:
            return x if width is None else pad_to(width, x)

        q = wide(problem.q)
        stored = [(wide(k), wide(v)) for k, v in problem.caches]

        def call(k: Tensor, v: Tensor) -> Tensor:
            out = forward(
                q, k, v, seqused_k=problem.cache_seqlens, page_table=problem.page_table,
                softmax_scale=problem.softmax_scale, is_causal=True, num_splits=0, q_v=problem.qv,
            )[0]  # fmt: skip
            return out[..., :head_dim_v]

        return Decode(q, stored, None, problem.cache_seqlens).contestant("fa3", call)

    # Never the caches as they are where head dims differ: builds without kernels for that do not
    # refuse, and may read past the end of the values. With qv there is no other way: such builds
    # give wrong results, which are not timed.
    head_dim_qk = problem.q.shape[-1]
    as_they_are = head_dim_qk == head_dim_v or problem.qv is not None
    return contestant(None if as_they_are else max(head_dim_qk, head_dim_v))


def make_sdpa(problem: Decode) -> Contestant:
    """torch's scaled_dot_product_attention, whichever of its kernels takes the call."""
    if problem.page_table is not None:
        raise Unavailable("SDPA reads no pages")
    if problem.qv is not None:
        raise Unavailable("SDPA has no second query")
    q = problem.q.transpose(1, 2)

    def call(k: Tensor, v: Tensor) -> Tensor:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

    return problem.contestant("sdpa", call)


OURS = Implementation("ours", "ours", make_ours)
PEERS = {
    "fa3": Implementation("fa3", "FA3", make_fa3),
    "sdpa": Implementation("sdpa", "SDPA (enable_gqa)", make_sdpa),
}
