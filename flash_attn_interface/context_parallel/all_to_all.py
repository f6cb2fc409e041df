"""Attention by heads: tokens are exchanged for heads, each rank attends over whole documents.

A rank has the heads [rank * n / world, (rank + 1) * n / world) of q. Of k and v, which may have
fewer heads than there are ranks, it gets those that its query heads use; nothing is expanded.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from . import kernels
from .division import Division
from .exchange import Transfers
from .kernels import Options, Sequences
from .merge import add_sink, sink_gradient, wide
from .steps import Rows


@dataclass(frozen=True)
class Order:
    """How the ranks' tokens, one rank after another, make up the documents.

    to_documents: row among the ranks' tokens of each row of the documents; None if the same.
    """

    counts: tuple[int, ...]  # tokens of each rank
    to_documents: Tensor | None
    to_ranks: Tensor | None
    lengths: tuple[int, ...]
    starts: Tensor | None  # cu_seqlens; None for tensors with a batch dimension


def order(division: Division, device: torch.device, dense: bool) -> Order:
    counts = tuple(division.tokens(rank) for rank in range(division.world))
    to_ranks = np.concatenate([division.indices(rank) for rank in range(division.world)])
    starts = None
    if not dense:
        starts = torch.tensor([0, *accumulate(division.lengths)], dtype=torch.int32, device=device)
    if np.array_equal(to_ranks, np.arange(len(to_ranks))):
        return Order(counts, None, None, division.lengths, starts)
    to_documents = np.empty_like(to_ranks)
    to_documents[to_ranks] = np.arange(len(to_ranks))
    there, back = (torch.from_numpy(x).to(device) for x in (to_documents, to_ranks))
    return Order(counts, there, back, division.lengths, starts)


def heads_of(rank: int, world: int, heads: int) -> slice:
    """Of `heads`, those that `rank` works on."""
    if heads >= world:
        return slice(rank * heads // world, (rank + 1) * heads // world)
    head = rank * heads // world
    return slice(head, head + 1)


def refusal(world: int, num_heads_q: int, num_heads_k: int, num_heads_v: int) -> str | None:
    """Why these heads cannot be dealt out to so many ranks; None if they can."""
    if num_heads_q % world:
        return f"{num_heads_q} query heads cannot be dealt out evenly to {world} ranks"
    for name, heads in (("k", num_heads_k), ("v", num_heads_v)):
        if heads % world and world % heads:
            return (
                f"the {heads} heads of {name} are neither a multiple nor a divisor of the "
                f"{world} ranks"
            )
    return None


class Exchanged(NamedTuple):
    """What the backward needs: all tokens, the rank's heads."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    softmax_lse: Tensor


class AllToAll:
    """One call's exchanges. dim: that of tokens."""

    def __init__(
        self,
        placed: Order,
        group: dist.ProcessGroup,
        rank: int,
        dim: int,
        causal: bool,
        window: tuple[int, int],
        options: Options,
    ) -> None:
        self.order, self.group, self.rank, self.dim = placed, group, rank, dim
        self.world = len(placed.counts)
        longest = max(placed.lengths, default=0)
        self.sequences = Sequences(placed.starts, placed.starts, longest, longest, causal, window)
        self.options = options

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None
    ) -> tuple[Tensor, Tensor, Exchanged]:
        """(out, softmax_lse) of the rank's tokens, and what the backward needs."""
        transfers = Transfers(self.group, q.device)
        received = [self._to_heads(x, transfers) for x in (q, k, v)]
        whole_q, whole_k, whole_v = (self._documents(*parts) for parts in received)
        out, lse = kernels.forward(whole_q, whole_k, whole_v, self.sequences, self.options)
        if s_aux is not None:
            out, lse = add_sink(out, lse, s_aux[heads_of(self.rank, self.world, q.shape[-2])])
        exchanged = Exchanged(whole_q, whole_k, whole_v, out, lse)
        heads = q.shape[-2]
        local_out = self._to_tokens(out, heads, transfers)
        local_lse = self._to_tokens(lse.transpose(-1, -2).unsqueeze(-1), heads, transfers)
        return local_out, local_lse.squeeze(-1).transpose(-1, -2).contiguous(), exchanged

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        saved: Exchanged,
        heads: tuple[int, int, int],
        s_aux: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(dq, dk, dv) of the rank's tokens, and the part of s_aux's from the rank's heads.

        heads: of q, k and v before the exchange.
        """
        transfers = Transfers(self.group, dout.device)
        whole_dout = self._documents(*self._to_heads(dout, transfers))
        whole_dlse = None
        if dlse is not None:
            columns = dlse.transpose(-1, -2).unsqueeze(-1)
            whole = self._documents(*self._to_heads(columns, transfers))
            whole_dlse = whole.squeeze(-1).transpose(-1, -2)
        q, k, v, out, lse = saved
        found = kernels.backward(
            whole_dout, whole_dlse, q, k, v, out, lse, self.sequences, self.options
        )
        dq, dk, dv = (self._to_tokens(x, n, transfers) for x, n in zip(found, heads, strict=True))
        if s_aux is None:
            return dq, dk, dv, None
        mine = heads_of(self.rank, self.world, heads[0])
        ds_aux = s_aux.new_zeros(s_aux.shape, dtype=lse.dtype)
        ds_aux[mine] = sink_gradient(whole_dout, whole_dlse, out, lse, s_aux[mine])
        return dq, dk, dv, ds_aux

    def _to_heads(self, x: Tensor, transfers: Transfers) -> tuple[list[Tensor], object]:
        """The rank's heads of every rank's tokens, and the transfers that bring them."""
        heads, local = x.shape[-2], x.shape[self.dim]
        mine = heads_of(self.rank, self.world, heads)
        parts, sends, receives = [], [], []
        for peer, count in enumerate(self.order.counts):
            shape = [*x.shape]
            shape[self.dim], shape[-2] = count, mine.stop - mine.start
            if peer == self.rank:
                parts.append(x[..., mine, :])
                continue
            parts.append(x.new_empty(shape))
            if count:
                receives.append((peer, parts[-1]))
            if local:
                theirs = x[..., heads_of(peer, self.world, heads), :]
                sends.append((peer, theirs, Rows(0, local)))
        return parts, transfers.post(sends, receives, transfers.now(), self.dim)

    def _documents(self, parts: list[Tensor], pending: object) -> Tensor:
        pending.wait()  # type: ignore[attr-defined]
        whole = torch.cat(parts, self.dim)
        if self.order.to_documents is None:
            return whole
        return whole.index_select(self.dim, self.order.to_documents)

    def _to_tokens(self, x: Tensor, heads: int, transfers: Transfers) -> Tensor:
        """All heads of the rank's tokens, from the ranks that worked on them. Where several worked
        on one head of k or v, their parts are added up."""
        if self.order.to_ranks is not None:
            x = x.index_select(self.dim, self.order.to_ranks)
        parts = torch.split(x, list(self.order.counts), self.dim)
        local = self.order.counts[self.rank]
        shape = [*x.shape]
        shape[self.dim], shape[-2] = local, heads
        shared = heads < self.world
        dtype = wide(x.dtype) if shared else x.dtype
        total = x.new_zeros(shape, dtype=dtype) if shared else x.new_empty(shape)
        arrived, sends, receives = [], [], []
        for peer, part in enumerate(parts):
            arrived.append(part)
            if peer == self.rank:
                continue
            if part.shape[self.dim]:
                sends.append((peer, part, Rows(0, part.shape[self.dim])))
            arrived[-1] = torch.empty_like(parts[self.rank], memory_format=torch.contiguous_format)
            if local:
                receives.append((peer, arrived[-1]))
        transfers.post(sends, receives, transfers.now(), self.dim).wait()
        for peer, part in enumerate(arrived):
            into = total[..., heads_of(peer, self.world, heads), :]
            if shared:
                into.add_(part)
            else:
                into.copy_(part)
        return total.to(x.dtype)
