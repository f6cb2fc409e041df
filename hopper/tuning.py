"""What the autotuner may try on the kernels of this folder, and which tiles it tries first.

The estimate ranks tiles, no more; the compiler's report and the clock decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from flash_attn_interface._common.problem import Problem
from flash_attn_interface._common.tuning import Tunable

from . import tiles
from .fwd import ForwardPlan
from .tiles import ForwardTile

# Of an SM, per cycle: multiply-adds of WGMMA, bytes of shared memory.
WGMMA_PER_CYCLE, SMEM_BYTES_PER_CYCLE = 2048, 128
STEP_CYCLES, COPY_CYCLES = 150, 600
OTHER_REGISTERS = 25


def _consumer_registers(tile: ForwardTile, problem: Problem) -> int:
    """O, S and P of a consumer's thread, see tiles.py."""
    of_scores = tile.block_n // 2 + (0 if tile.p_in_smem else tile.block_n // 4)
    return tiles.wgmma_pv_n(problem.head_dim_v) // 2 + of_scores + OTHER_REGISTERS


def _swizzles(head_dim: int) -> tuple[int, ...]:
    """0, the widest without waste; and a narrower one where it saves shared memory."""
    return (0, 64) if head_dim > 32 and -(-head_dim // 32) % 2 else (0,)


def _forward_space(problem: Problem, arch: str) -> Iterator[ForwardTile]:
    step = 32 if problem.dropout else 16
    for fields in product(
        tiles.CONSUMER_REGISTERS,
        range(32, tiles.MAX_WGMMA_N + 1, step),
        (1, 2, 3, 4),
        (1, 2),
        (False, True),  # ping_pong
        _swizzles(problem.head_dim_qk),
        _swizzles(problem.head_dim_v),
        (False, True),  # p_in_smem
    ):
        tile = ForwardTile(*fields)
        if _consumer_registers(tile, problem) <= tiles.CONSUMER_REGISTERS[tile.num_mma_warpgroups]:
            yield tile


def _forward_cost(tile: ForwardTile, problem: Problem) -> float:
    """Cycles of an SM per query and key."""
    qk, v = problem.head_dim_qk, problem.head_dim_v
    products = (qk + v) / WGMMA_PER_CYCLE
    rows = tiles.WG_ROWS * tile.num_mma_warpgroups // tiles.v_split(v)
    bytes_moved = (2 * qk + 2 * v) / tiles.WG_ROWS + 2 * qk / tile.block_n
    bytes_moved += 4 if tile.p_in_smem else 0  # written once, read once
    traffic = bytes_moved / SMEM_BYTES_PER_CYCLE
    step = STEP_CYCLES + (COPY_CYCLES if tile.num_stages == 1 else 0)
    softmax = 0.06 / tile.num_mma_warpgroups
    per_tile = 0.004 * (tile.num_q_buffers == 1)  # a tile's first product waits for the last store
    narrow = 0.003 * ((tile.swizzle_qk > 0) + (tile.swizzle_v > 0)) + 0.001 * tile.ping_pong
    return max(products, traffic) + softmax + per_tile + narrow + step / (rows * tile.block_n)


TUNABLES = (
    Tunable(
        "hopper",
        "fwd",
        ForwardTile,
        lambda problem, arch: tiles.forward_tile(problem),
        tiles.refuses_tile,
        _forward_space,
        _forward_cost,
        lambda problem, arch, tile: (tiles.forward_spec(problem, arch, tile),),
        ForwardPlan,
    ),
)
