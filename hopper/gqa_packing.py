"""Packed GQA: how many query heads share the rows of a query tile.

Query heads of one K and V head load the same keys. With few query rows a tile of one head is mostly
empty, so `fwd.cu` can put rows of several heads into it and load the keys once.
"""

from __future__ import annotations

from math import gcd

from flash_attn_interface._common.ask.problem import Problem

WG_ROWS = 64  # rows of a consumer warpgroup, whole query rows of all heads that share them
# CTAs that run at once on an H100: below that, fewer tiles only leave more SMs idle.
SMS = 132
# Packed tiles are stored without TMA, which a gain in tiles has to pay for. Halving the tiles gains
# 1.4x and more on an H100, 1 query of 32 heads on 8 of K 1.9x.
WORTH_IT = 0.75


def stored_heads(problem: Problem) -> tuple[int, int]:
    """Heads of k and v in memory: one where they were expanded (stride 0)."""
    p = problem
    return (
        p.num_heads_k if p.k_strides[2] else 1,
        p.num_heads_v if p.v_strides[2] else 1,
    )


def group_size(problem: Problem, slices: int) -> int:
    """Query heads that share the rows of a tile of `slices` times 64 rows; 1: they do not.

    Where a tile depends on the head, with ALiBi and dropout, pack_gqa has no effect.
    """
    p = problem
    heads_k, heads_v = stored_heads(p)
    shared = gcd(p.num_heads_q // heads_k, p.num_heads_q // heads_v)
    if p.pack_gqa is False or p.alibi or p.dropout or shared == 1:
        return 1
    rows = -(-p.total_q // p.batch)

    def num_tiles(group: int) -> int:
        return -(-rows // (WG_ROWS // group * slices)) * (p.num_heads_q // group) * p.batch

    groups = [g for g in range(2, min(shared, WG_ROWS) + 1) if shared % g == 0]
    best = min(groups, key=num_tiles, default=1)
    if p.pack_gqa or max(num_tiles(best), SMS) <= WORTH_IT * num_tiles(1):
        return best
    return 1
