"""Whether all ranks of a group make the same call, found out before anything is transferred.

Ranks that disagree would wait for each other forever, or read memory of another meaning. So before
a transfer every rank tells the others a digest of its call, or that it refuses it; all of them
then raise, and each message says which rank has what. `layout.py` remembers what was agreed on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist


def agree(
    group: dist.ProcessGroup,
    device: torch.device,
    call: Mapping[str, object] | None,
    error: Exception | None,
) -> None:
    """Returns on every rank of the group, or raises on every rank.

    Args:
        device: of the tensors that the group moves.
        call: what has to be the same on all ranks, by name; None if this rank refuses the call.
        error: with which it does.
    """
    world = dist.get_world_size(group)
    if world == 1:
        if error is not None:
            raise error
        return
    mine = 0 if call is None else _digest(call)
    facts = torch.tensor([mine], dtype=torch.int64, device=device)
    everyone = [torch.empty_like(facts) for _ in range(world)]
    dist.all_gather(everyone, facts, group=group)
    digests = torch.cat(everyone).tolist()
    if 0 not in digests and len(set(digests)) == 1:
        return
    told: list[Any] = [None] * world
    dist.all_gather_object(told, (call, None if error is None else str(error)), group=group)
    if error is not None:
        raise error
    refused = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(told) if text is not None]
    if refused:
        raise ValueError(f"refused by another rank of the group: {'; '.join(refused)}")
    raise ValueError(_differences([dict(call) for call, _ in told]))


def _digest(call: Mapping[str, object]) -> int:
    """63 bits, never 0."""
    text = repr(sorted(call.items())).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1 | 1


def _differences(calls: list[dict[str, object]]) -> str:
    """Names what differs, and which ranks have which value."""
    lines = []
    for name in calls[0]:
        ranks: dict[str, list[int]] = {}
        for rank, call in enumerate(calls):
            ranks.setdefault(repr(call.get(name)), []).append(rank)
        if len(ranks) > 1:
            values = ", ".join(
                f"{value} on rank{'s' * (len(who) > 1)} {', '.join(map(str, who))}"
                for value, who in ranks.items()
            )
            lines.append(f"{name} is {values}")
    return f"ranks of the group disagree: {'; '.join(lines)}"
