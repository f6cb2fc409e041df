"""What the autotuner may try on the kernels of this folder, and which tiles it tries first.

The estimate ranks tiles, no more; the compiler's report and the clock decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from flash_attn_interface._common.ask.problem import Problem, Target
from flash_attn_interface._common.runtime.spec import KernelSpec
from flash_attn_interface._common.tiles.tuning import Tunable
from flash_attn_interface._flash2.tuning import backward_problem

from . import bwd_tiles, fwd_tiles
from .bwd import BackwardPlan
from .bwd_tiles import BackwardTile
from .fwd import ForwardPlan
from .fwd_tiles import ForwardTile

# Of an SM, per cycle: multiply-adds of WGMMA, bytes of shared memory.
WGMMA_PER_CYCLE, SMEM_BYTES_PER_CYCLE = 2048, 128
STEP_CYCLES, COPY_CYCLES = 150, 600
OTHER_REGISTERS = 25
# Of the backward: a thread beside sums, scores and packed P; an SM's additions to L2.
BACKWARD_OTHER_REGISTERS = 16
ADD_BYTES_PER_CYCLE = 16


def _consumer_registers(tile: ForwardTile, problem: Problem) -> int:
    """O, S and P of a consumer's thread, see fwd_tiles.py."""
    of_scores = tile.block_n // 2 + (0 if tile.p_in_smem else tile.block_n // 4)
    return fwd_tiles.wgmma_pv_n(problem.head_dim_v) // 2 + of_scores + OTHER_REGISTERS


def _swizzles(head_dim: int) -> tuple[int, ...]:
    """0, the widest without waste; and a narrower one where it saves shared memory."""
    return (0, 64) if head_dim > 32 and -(-head_dim // 32) % 2 else (0,)


def _forward_space(problem: Problem, arch: str) -> Iterator[ForwardTile]:
    step = 32 if problem.dropout else 16
    for fields in product(
        fwd_tiles.CONSUMER_REGISTERS,
        range(32, fwd_tiles.MAX_WGMMA_N + 1, step),
        (1, 2, 3, 4),
        (1, 2),
        (False, True),  # ping_pong
        _swizzles(problem.head_dim_qk),
        _swizzles(problem.head_dim_v),
        (False, True),  # p_in_smem
    ):
        tile = ForwardTile(*fields)
        if (
            _consumer_registers(tile, problem)
            <= fwd_tiles.CONSUMER_REGISTERS[tile.num_mma_warpgroups]
        ):
            yield tile


def _forward_cost(tile: ForwardTile, problem: Problem) -> float:
    """Cycles of an SM per query and key."""
    qk, v = problem.head_dim_qk, problem.head_dim_v
    products = (qk + v) / WGMMA_PER_CYCLE
    rows = fwd_tiles.WG_ROWS * tile.num_mma_warpgroups // fwd_tiles.v_split(v)
    bytes_moved = (2 * qk + 2 * v) / fwd_tiles.WG_ROWS + 2 * qk / tile.block_n
    bytes_moved += 4 if tile.p_in_smem else 0  # written once, read once
    traffic = bytes_moved / SMEM_BYTES_PER_CYCLE
    step = STEP_CYCLES + (COPY_CYCLES if tile.num_stages == 1 else 0)
    softmax = 0.06 / tile.num_mma_warpgroups
    per_tile = 0.004 * (tile.num_q_buffers == 1)  # a tile's first product waits for the last store
    narrow = 0.003 * ((tile.swizzle_qk > 0) + (tile.swizzle_v > 0)) + 0.001 * tile.ping_pong
    return max(products, traffic) + softmax + per_tile + narrow + step / (rows * tile.block_n)


def _backward_needs(tile: BackwardTile, problem: Problem) -> tuple[int, int]:
    """Registers of the two roles, or of the joint one twice: sums, scores, packed P and dS."""
    qk, v = (
        bwd_tiles.gradient_columns(dim, tile.gradient_n) // 2
        for dim in (problem.head_dim_qk, problem.head_dim_v)
    )
    copies = 1 if problem.softcap == 0.0 and not problem.dropout else 2
    scores = tile.block_m // 2 + tile.block_m // 4 * copies + BACKWARD_OTHER_REGISTERS
    blocks = tile.block_n // fwd_tiles.WG_ROWS
    if tile.split_roles:
        return blocks * v + scores, blocks * qk + scores
    return qk + v + scores, qk + v + scores


def _backward_space(problem: Problem, arch: str) -> Iterator[BackwardTile]:
    dq_columns = {64, min(128, max(64, -(-problem.head_dim_qk // 16) * 16))}
    tile = BackwardTile(64, 64)
    aux = (True, False) if tile.aux_lse(problem) or tile.aux_d(problem) else (True,)
    for fields in product(
        (64, 128),  # block_m
        (64, 128),  # block_n
        (False, True),  # split_roles
        (1, 2, 3),  # stages_q
        (1, 2),  # stages_do
        (1, 2, 3),  # stages_ds
        (0, 2),  # add_stages
        sorted(dq_columns),
        (1, 2),  # dq_buffers
    ):
        for cluster_size, with_aux in product((1, 2), aux):
            tile = BackwardTile(*fields, cluster_size=cluster_size, aux=with_aux)
            if bwd_tiles.refuses_tile(tile, problem, arch) is None:
                given, needed = tile.registers(problem), _backward_needs(tile, problem)
                if needed[0] <= given[0] and needed[1] <= given[1]:
                    yield tile


def _backward_cost(tile: BackwardTile, problem: Problem) -> float:
    """Cycles of an SM per query and key."""
    qk, v = problem.head_dim_qk, problem.head_dim_v
    keys = tile.block_n * tile.cluster_size  # of one addition
    products = (3 * qk + 2 * v) / WGMMA_PER_CYCLE
    additions = 4 * qk / (keys * ADD_BYTES_PER_CYCLE)
    serial = 0.02 / tile.dq_buffers * (qk > 128) + 0.005 * (tile.stages_q + tile.stages_do < 4)
    step = (STEP_CYCLES + COPY_CYCLES * (tile.stages_q * tile.stages_do == 1)) / (
        tile.block_m * tile.block_n
    )
    more = 0.004 * (tile.cluster_size - 1) + 0.002 * (tile.add_stages > 0) * (qk > 64)
    more += 0.03 * (not tile.aux)
    return max(products, additions) + serial + step + more


def _backward_specs(problem: Problem, arch: str, tile: BackwardTile) -> tuple[KernelSpec, ...]:
    preprocess, main, *others = bwd_tiles.backward_specs(backward_problem(problem), arch, tile)
    return main, preprocess, *others


def _backward_plan(problem: Problem, target: Target, tile: BackwardTile) -> BackwardPlan:
    return BackwardPlan(backward_problem(problem), target, tile)


TUNABLES = (
    Tunable(
        "hopper",
        "fwd",
        ForwardTile,
        lambda problem, arch: fwd_tiles.forward_tile(problem),
        fwd_tiles.refuses_tile,
        _forward_space,
        _forward_cost,
        lambda problem, arch, tile: (fwd_tiles.forward_spec(problem, arch, tile),),
        ForwardPlan,
    ),
    Tunable(
        "hopper",
        "bwd",
        BackwardTile,
        bwd_tiles.backward_tile,
        bwd_tiles.refuses_tile,
        _backward_space,
        _backward_cost,
        _backward_specs,
        _backward_plan,
    ),
)
