"""What the autotuner may try on the kernels of this folder, and which tiles it tries first.

The estimates rank tiles, no more: products on the tensor cores, the traffic of ldmatrix that feeds
them, and what a step costs whatever its size. The compiler's report and the clock decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from .._common.ask.backward_problem import BackwardProblem
from .._common.ask.kv_problem import Append
from .._common.ask.problem import Problem, Strides, Target
from .._common.runtime.spec import KernelSpec
from .._common.tiles.tuning import Tunable, register_budget
from . import bwd_tiles, decode_tiles, fwd_tiles
from .bwd import BackwardPlan
from .bwd_tiles import BackwardTile
from .decode import DecodePlan
from .decode_tiles import DecodeTile
from .fwd import ForwardPlan
from .fwd_tiles import ForwardTile

# Of an SM, per cycle: multiply-adds of mma.sync, bytes of shared memory.
MMA_PER_CYCLE, SMEM_BYTES_PER_CYCLE = 1024, 128
# Cycles: of a barrier and the loop around it; of a copy that nothing hides.
STEP_CYCLES, COPY_CYCLES = 150, 400
# Registers of a thread beside its fragments: addresses, softmax, operands on their way. With less
# than these to spare, ptxas spilled 46 of 52 forward and 38 of 46 backward candidates for sm_90.
FORWARD_OTHER, BACKWARD_OTHER, DECODE_OTHER = 48, 52, 40
WARPS_TO_HIDE_SOFTMAX = 8
DECODE_BYTES_IN_FLIGHT = 64 * 1024


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _overlapped(a: float, b: float) -> float:
    """Two units at work at once hide most of the shorter."""
    return max(a, b) + 0.3 * min(a, b)


def _forward_registers(tile: ForwardTile, problem: Problem) -> int:
    m_tiles = tile.block_m // tile.num_warps // 16
    qk, v = (_round_up(n, 16) for n in (problem.head_dim_qk, problem.head_dim_v))
    of_q = qk // 4 if tile.q_in_registers else 0
    return m_tiles * (v // 2 + tile.block_n // 2 + of_q) + FORWARD_OTHER


def _forward_space(problem: Problem, arch: str) -> Iterator[ForwardTile]:
    lines = fwd_tiles.gains_by_lines(problem, arch)
    for warps, rows, block_n, stages, in_registers in product(
        (4, 8), (16, 32), range(16, 193, 16), (1, 2, 3), (False, True)
    ):
        if block_n == 16 and problem.head_dim_qk + problem.head_dim_v <= 256:
            continue  # where larger tiles fit, so small a step is all overhead
        fitting = []
        for ctas in (1, 2, 3, 4):
            tile = ForwardTile(
                warps * rows, block_n, warps, stages, in_registers, ctas, lines=lines
            )
            if _forward_registers(tile, problem) <= register_budget(arch, 32 * warps, ctas):
                if fwd_tiles.refuses_tile(tile, problem, arch) is None:
                    fitting.append(tile)
        yield from fitting[-2:]
        if stages == 2:
            yield from (replace(tile, one_barrier=True) for tile in fitting[-2:])
        chunks = fwd_tiles.prologue_chunks(problem.head_dim_qk)
        if chunks > 1 and stages == 1 and not in_registers:
            yield from (replace(tile, prologue_chunks=chunks) for tile in fitting[-2:])


def _forward_cost(tile: ForwardTile, problem: Problem) -> float:
    """Cycles of an SM per query and key."""
    qk, v = problem.head_dim_qk, problem.head_dim_v
    rows = tile.block_m / tile.num_warps
    bytes_read = 2 * (qk + v) / rows + (0 if tile.q_in_registers else 2 * qk / tile.block_n)
    bytes_written = 2 * (qk + v) / tile.block_m
    products = _overlapped(
        (qk + v) / MMA_PER_CYCLE, (bytes_read + bytes_written) / SMEM_BYTES_PER_CYCLE
    )
    warps = tile.num_warps * tile.min_ctas_per_sm
    softmax = 0.1 * max(0.25, WARPS_TO_HIDE_SOFTMAX / warps)
    step = STEP_CYCLES / (2 if tile.one_barrier else 1)
    step += COPY_CYCLES if tile.num_stages == 1 else 0
    return products + softmax + step / (tile.block_m * tile.block_n * tile.min_ctas_per_sm)


def _backward_registers(tile: BackwardTile, problem: Problem) -> int:
    warps = tile.num_warps
    columns_qk, columns_v = (
        _round_up(n, multiple)
        for n, multiple in zip(
            (problem.head_dim_qk, problem.head_dim_v), tile.column_multiples(), strict=True
        )
    )
    m_tiles_s, m_tiles_kv = (tile.block_n // n // 16 for n in (tile.s_warps_n, tile.kv_warps_n))
    kv_parts = tile.role_warps // tile.kv_warps_n
    columns = max(columns_qk, columns_v) if tile.split_roles else columns_qk + columns_v
    gradients = m_tiles_kv * columns // kv_parts // 2
    scores = m_tiles_s * tile.sub_m // 2  # S^T or dP^T in fp32
    if not tile.split_roles:
        scores += m_tiles_s * tile.sub_m // 4  # P^T in 16 bits, beside dP^T
    dq = tile.block_m // tile.dq_warps_m // 16 * columns_qk // (warps // tile.dq_warps_m) // 2
    of_k = m_tiles_s * _round_up(problem.head_dim_qk, 16) // 4 if tile.k_in_registers else 0
    of_v = m_tiles_s * _round_up(problem.head_dim_v, 16) // 4 if tile.v_in_registers else 0
    return gradients + max(scores, dq) + of_k + of_v + BACKWARD_OTHER


def _backward_space(problem: Problem, arch: str) -> Iterator[BackwardTile]:
    rotate, lines = bwd_tiles.rotates(problem), bwd_tiles.gains_by_lines(problem)
    for warps, block_m, block_n, split in product(
        (4, 8), (32, 64, 128), (32, 64, 96, 128, 192), (False, True)
    ):
        role_warps = warps // 2 if split else warps
        powers = [n for n in (1, 2, 4, 8) if n <= warps]
        of_role = [n for n in powers if n <= role_warps]
        for s_warps, kv_warps, dq_warps, sub_m in product(of_role, of_role, powers, (16, 32, 64)):
            owns_keys = s_warps == kv_warps == warps
            kept = ((False, False), (True, False), (True, True)) if owns_keys else ((False, False),)
            stages = [(2, 2, 1), (2, 1, 1), (1, 1, 1)] + ([(2, 2, 2)] if owns_keys else [])
            if split:
                stages = [(2, 2, 2)]
            for (keep_k, keep_v), (stages_q, stages_do, stages_ds) in product(kept, stages):
                fitting = []
                for ctas in (1, 2, 3):
                    tile = BackwardTile(
                        block_m, block_n, warps, s_warps, kv_warps, dq_warps, sub_m, stages_q,
                        stages_do, stages_ds, keep_k, keep_v, rotate, ctas, split, lines,
                    )  # fmt: skip
                    if bwd_tiles.refuses_tile(tile, problem, arch) is None:
                        budget = register_budget(arch, 32 * warps, ctas)
                        if _backward_registers(tile, problem) <= budget:
                            fitting.append(tile)
                yield from fitting[-1:]


def _backward_cost(tile: BackwardTile, problem: Problem) -> float:
    """Cycles of an SM per query and key."""
    qk, v = (
        _round_up(n, multiple)
        for n, multiple in zip(
            (problem.head_dim_qk, problem.head_dim_v), tile.column_multiples(), strict=True
        )
    )
    s_keys = tile.block_n / tile.s_warps_n
    kv_parts, dq_parts = tile.role_warps // tile.kv_warps_n, tile.num_warps // tile.dq_warps_m
    bytes_read = 2 * (qk + v) / s_keys  # Q and dO, for S^T and dP^T
    bytes_read += (0 if tile.k_in_registers else 2 * qk / tile.sub_m) + (
        0 if tile.v_in_registers else 2 * v / tile.sub_m
    )
    bytes_read += 2 * (qk + v) * tile.kv_warps_n / tile.block_n  # Q and dO, for dK and dV
    bytes_read += 2 * dq_parts + 2 * qk * tile.dq_warps_m / tile.block_m  # dS and K, for dQ
    if not tile.p_in_registers:
        bytes_read += 4 * kv_parts + 2  # P^T and dS^T
    bytes_written = 4 + 2 * (qk + v) / tile.block_n
    products = _overlapped(
        (3 * qk + 2 * v) / MMA_PER_CYCLE, (bytes_read + bytes_written) / SMEM_BYTES_PER_CYCLE
    )
    barriers = 1 if tile.stages_ds == 2 else 2 if tile.p_in_registers else 3
    copies = (tile.stages_q == 1) + (tile.stages_do == 1)
    step = barriers * STEP_CYCLES + copies * COPY_CYCLES
    adds_to_dq = 4 * qk / tile.block_n / 32
    softmax = 0.15 * WARPS_TO_HIDE_SOFTMAX / (tile.num_warps * tile.min_ctas_per_sm)
    pairs = tile.block_m * tile.block_n * tile.min_ctas_per_sm
    return products + softmax + adds_to_dq + step / pairs


def backward_problem(forward: Problem) -> BackwardProblem:
    """The backward of contiguous tensors."""

    def strides(heads: int, rows: int, head_dim: int) -> Strides:
        return (rows * heads * head_dim, heads * head_dim, head_dim)

    p = forward
    of_out = strides(p.num_heads_q, p.seqlen_q, p.head_dim_v)
    return BackwardProblem(
        forward,
        out_strides=of_out,
        dout_strides=of_out,
        dq_strides=strides(p.num_heads_q, p.seqlen_q, p.head_dim_qk),
        dk_strides=strides(p.num_heads_k, p.seqlen_k, p.head_dim_qk),
        dv_strides=strides(p.num_heads_v, p.seqlen_k, p.head_dim_v),
        vector_bytes=p.vector_bytes,
        out_vector_bytes=p.vector_bytes,
        grad_vector_bytes=p.vector_bytes,
    )


def _forward_specs(problem: Problem, arch: str, tile: ForwardTile) -> tuple[KernelSpec, ...]:
    return (fwd_tiles.forward_spec(problem, arch, tile),)


def _backward_specs(problem: Problem, arch: str, tile: BackwardTile) -> tuple[KernelSpec, ...]:
    preprocess, main, *others = bwd_tiles.backward_specs(backward_problem(problem), arch, tile)
    return main, preprocess, *others


def _backward_plan(problem: Problem, target: Target, tile: BackwardTile) -> BackwardPlan:
    return BackwardPlan(backward_problem(problem), target, tile)


def _decode_registers(tile: DecodeTile, problem: Problem) -> int:
    m_tiles = tile.block_m // tile.row_warps // 16
    qk, v = (_round_up(n, 16) for n in (problem.head_dim_qk, problem.head_dim_v))
    of_q = 0
    if tile.q_in_registers:
        of_q = (qk + v) // 4 // tile.col_warps if problem.qv else qk // 4
    return m_tiles * (v // tile.col_warps // 2 + tile.block_n // 2 + of_q) + DECODE_OTHER


def _decode_space(problem: Problem, arch: str) -> Iterator[DecodeTile]:
    for row_warps, rows, block_n, teams, stages, in_registers, col_warps in product(
        (1, 2, 4), (16, 32), (16, 32), (1, 2, 4, 8), range(2, 9), (False, True), (1, 2, 4)
    ):
        for ctas in (1, 2, 3, 4):
            tile = DecodeTile(
                row_warps * rows, block_n, row_warps, teams, stages, in_registers, ctas, col_warps
            )
            if decode_tiles.refuses_tile(tile, problem, arch) is None:
                budget = register_budget(arch, tile.num_threads, ctas)
                if _decode_registers(tile, problem) <= budget:
                    yield tile


def _decode_cost(tile: DecodeTile, problem: Problem) -> float:
    """The cache is read once for each row tile; the rest is bytes in flight on an SM, of which
    more than about 64 KB gain nothing, and warps to work on them.
    """
    row_tiles = -(-decode_tiles.packed_rows(problem) // tile.block_m)
    idle_rows = row_tiles * tile.block_m / decode_tiles.packed_rows(problem)
    tile_bytes = 2 * tile.block_n * (problem.head_dim_qk + problem.head_dim_v)
    ahead = (tile.num_stages - 1) * tile.num_teams * tile.min_ctas_per_sm * tile_bytes
    warps = tile.num_threads // 32 * tile.min_ctas_per_sm
    in_flight = max(1.0, DECODE_BYTES_IN_FLIGHT / ahead)
    few_warps = max(1.0, WARPS_TO_HIDE_SOFTMAX / warps)
    sharing = tile.row_warps * tile.col_warps
    step = 0.02 * (32 / tile.block_n + sharing) + 0.02 * (not tile.q_in_registers)
    return row_tiles * (in_flight + 0.2 * few_warps + step) + 0.02 * idle_rows


def cache_problem(forward: Problem) -> Problem:
    """Attention over all of a contiguous cache, into as many splits as the planner likes."""
    return replace(forward, has_seqused_k=True, cache_slots=forward.batch, append=Append())


def _decode_specs(problem: Problem, arch: str, tile: DecodeTile) -> tuple[KernelSpec, ...]:
    """With splits, for few and long sequences, and without."""
    forward = cache_problem(problem)
    return tuple(decode_tiles.decode_spec(forward, arch, split, tile) for split in (True, False))


def _decode_plan(problem: Problem, target: Target, tile: DecodeTile) -> DecodePlan:
    return DecodePlan(cache_problem(problem), target, tile)


TUNABLES = (
    Tunable(
        "flash2",
        "fwd",
        ForwardTile,
        fwd_tiles.forward_tile,
        fwd_tiles.refuses_tile,
        _forward_space,
        _forward_cost,
        _forward_specs,
        ForwardPlan,
    ),
    Tunable(
        "flash2",
        "bwd",
        BackwardTile,
        bwd_tiles.backward_tile,
        bwd_tiles.refuses_tile,
        _backward_space,
        _backward_cost,
        _backward_specs,
        _backward_plan,
    ),
    Tunable(
        "flash2",
        "decode",
        DecodeTile,
        decode_tiles.decode_tile,
        decode_tiles.refuses_tile,
        _decode_space,
        _decode_cost,
        _decode_specs,
        _decode_plan,
        decode_tiles.row_class,
    ),
)
