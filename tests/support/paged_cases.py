"""Problems of flash_attn_varlen_func(block_table=...), their tensors, and the same keys packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from cases import DTYPES
from inputs import SEEDS
from torch import Tensor

HUGE = 2**31 - 1


@dataclass(frozen=True)
class PagedCase:
    """Packed queries over pages."""

    page_size: int = 16
    lengths_q: tuple[int, ...] = (5, 130, 0, 1)
    lengths_k: tuple[int, ...] = (70, 150, 3, 33)
    dtype: str = "bf16"
    head_dim_qk: int = 32
    head_dim_v: int = 64
    heads: tuple[int, int, int] = (4, 2, 2)
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    dropout_p: float = 0.0
    step: int = 0  # elements between heads: vectors of 2 * step bytes
    only_gpu: bool = False
    slow: bool = False

    @property
    def id(self) -> str:
        changed = [self.dtype, f"qk{self.head_dim_qk}-v{self.head_dim_v}", f"page{self.page_size}"]
        for name in ("causal", "alibi"):
            changed += [name] if getattr(self, name) else []
        for name in ("window_size", "softcap", "dropout_p", "step", "heads", "lengths_k"):
            value = getattr(self, name)
            if value != getattr(PagedCase, name):
                changed.append(name + str(value).replace(" ", ""))
        return "-".join(changed)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "causal": self.causal,
            "window_size": self.window_size,
            "softcap": self.softcap,
            "dropout_p": self.dropout_p,
        }


@dataclass(frozen=True)
class Paged:
    """Tensors of a case, and the same keys packed."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    table: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    alibi_slopes: Tensor | None

    def lengths(self, case: PagedCase) -> dict[str, Any]:
        return {
            "cu_seqlens_q": self.cu_seqlens_q,
            "cu_seqlens_k": self.cu_seqlens_k,
            "max_seqlen_q": max(case.lengths_q),
            "max_seqlen_k": max(case.lengths_k),
            "alibi_slopes": self.alibi_slopes,
        }


def make_paged(case: PagedCase, device: torch.device | str) -> Paged:
    seed = SEEDS.randrange(1 << 62)
    print(f"make_paged({case.id}): generator seed {seed}")
    generator = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, heads: int, dim: int) -> Tensor:
        values = torch.randn(rows, heads, dim, generator=generator, device=device)
        return values.to(DTYPES[case.dtype])

    size = case.page_size
    num_heads_q, num_heads_k, num_heads_v = case.heads
    counts = [-(-length // size) for length in case.lengths_k]
    order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(seed)).tolist()
    table = torch.full((len(counts), max(counts) + 4), HUGE, dtype=torch.int32)
    table[:, -2:] = -1
    pages = {
        name: draw(len(order) * size, heads, dim + case.step).unflatten(0, (len(order), size))
        for name, heads, dim in (
            ("k", num_heads_k, case.head_dim_qk),
            ("v", num_heads_v, case.head_dim_v),
        )
    }
    pages = {name: x.fill_(torch.nan)[..., case.step :] for name, x in pages.items()}
    packed: dict[str, list[Tensor]] = {"k": [], "v": []}
    for b, length in enumerate(case.lengths_k):
        table[b, : counts[b]] = torch.tensor([order.pop() for _ in range(counts[b])])
        at = torch.arange(length)
        place = (table[b, at // size].long().to(device), (at % size).to(device))
        for name, cache in pages.items():
            rows = draw(length, *cache.shape[2:])
            cache[place] = rows
            packed[name].append(rows)

    def ends(lengths: Sequence[int]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

    slopes = torch.rand(len(counts), num_heads_q, generator=generator, device=device) * 0.3
    return Paged(
        draw(sum(case.lengths_q) + 2, num_heads_q, case.head_dim_qk),
        pages["k"],
        pages["v"],
        table.to(device)[:, :-1],
        torch.cat(packed["k"]),
        torch.cat(packed["v"]),
        ends(case.lengths_q),
        ends(case.lengths_k),
        slopes if case.alibi else None,
    )
