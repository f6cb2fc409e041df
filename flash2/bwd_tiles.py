"""BackwardProblem -> KernelSpecs of the three backward kernels. Pure functions.

Change tile sizes here; the reason stands beside each number. What a tile may be is fixed by
`bwd.cu` (its static_asserts) and by the arch's limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .._common import arch as arch_table
from .._common.backward_problem import BackwardProblem
from .._common.problem import Problem
from .._common.spec import KernelSpec
from .tiles import ELEM_BYTES, ROW_PAD_BYTES

STAT_BYTES = 4  # lse and D of one query, each
STREAM_THREADS = (
    256  # bwd_preprocess.cu and bwd_convert.cu: enough loads in flight for the memory bandwidth
)


@dataclass(frozen=True)
class BackwardTile:
    """How `bwd.cu` cuts a problem up.

    The warps divide S^T and dP^T (keys x queries) as s_warps_n x the rest, dK and dV (keys x head
    dim) as kv_warps_n x the rest, dQ (queries x head dim) as dq_warps_m x the rest. With s_warps_n
    = kv_warps_n = num_warps, P^T and dS^T go from product to product in registers; else through
    shared memory.
    """

    block_m: int  # queries of a step; a power of two up to 128
    block_n: int  # keys of a CTA
    num_warps: int
    s_warps_n: int
    kv_warps_n: int
    dq_warps_m: int
    sub_m: int  # queries of S^T that a warp has in registers at a time, a multiple of 16
    stages_q: int = 1  # Q tiles in flight
    stages_do: int = 1  # dO tiles in flight
    stages_ds: int = 1  # 2 (P^T in registers): dQ of a step is computed in the next, at one barrier
    k_in_registers: bool = False
    v_in_registers: bool = False
    rotate: bool = (
        True  # CTAs begin at different query tiles, so that they add to different parts of dQ
    )
    min_ctas_per_sm: int = 1

    @property
    def p_in_registers(self) -> bool:
        return self.s_warps_n == self.kv_warps_n == self.num_warps

    def column_multiples(self) -> tuple[int, int]:
        """Of tiles with head_dim_qk and head_dim_v columns: warps share them, 16 at a time."""
        kv_warps_d = self.num_warps // self.kv_warps_n
        return 16 * max(kv_warps_d, self.num_warps // self.dq_warps_m), 16 * kv_warps_d

    def accum_columns(self, head_dim_qk: int) -> int:
        """Columns of the fp32 accumulator of dQ."""
        return _round_up(head_dim_qk, self.column_multiples()[0])

    def smem_bytes(self, head_dim_qk: int, head_dim_v: int) -> int:
        """Shared memory of `Smem` in bwd.cu."""
        multiple_qk, multiple_v = self.column_multiples()
        row_qk = _row_bytes(_round_up(head_dim_qk, multiple_qk))
        row_v = _row_bytes(_round_up(head_dim_v, multiple_v))
        score_tile = self.block_n * _row_bytes(self.block_m)
        resident = self.block_n * row_qk
        streamed = self.stages_q * self.block_m * (row_qk + STAT_BYTES)
        streamed += self.stages_do * self.block_m * (row_v + STAT_BYTES)
        v_bytes = self.block_n * row_v
        scores = score_tile * (self.stages_ds + (not self.p_in_registers))
        shared = max(v_bytes, scores) if self.v_in_registers else v_bytes + scores
        return resident + streamed + shared


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _row_bytes(columns: int) -> int:
    return columns * ELEM_BYTES + ROW_PAD_BYTES


def _candidates(problem: Problem) -> Iterator[BackwardTile]:
    """Tiles by preference; the first that fits the arch is taken.

    dK and dV of a CTA stay in registers, block_n x (head_dim_qk + head_dim_v) fp32 values: that
    bounds block_n. Where a warp can hold 32 whole rows of them, P^T and dS^T need not be shared.
    Else warps in 2-D grids, whose tiles of 32 x 32 and 32 x 64 keep the traffic of ldmatrix below
    that of the tensor cores. Measured on an H100 over the named pairs: docs/performance/.
    """
    qk, v = problem.head_dim_qk, problem.head_dim_v
    if qk + v <= 128:
        if not problem.dropout:
            if qk <= 32:
                yield _staged(BackwardTile(128, 128, 4, 4, 4, 4, sub_m=32), 2, 1, 1, 2)
            yield _staged(BackwardTile(64, 128, 4, 4, 4, 2, sub_m=32), 2, 2, 2, 2)
        # 16 rows a warp leave registers for V and for dropout's random numbers.
        half_rows = BackwardTile(64, 128, 8, 8, 8, 4, 32, k_in_registers=True, v_in_registers=True)
        yield _staged(half_rows, 2, 2, 2)
    if qk <= 64 and v <= 128 and not problem.dropout:
        yield _staged(BackwardTile(64, 64, 4, 2, 2, 2, sub_m=32), 2, 2, 1, 2)
    if qk + v <= 320 and max(qk, v) <= 192 and min(qk, v) <= 128:
        wide = BackwardTile(64, 128, 8, 4, 4, 2 if qk % 64 == 0 or qk < 64 else 4, sub_m=32)
        if qk + v <= 288:
            yield _staged(wide, 2, 2)
        yield _staged(wide, 2, 1)
        yield _staged(wide, 1, 1)
    if qk + v <= 384:
        middle = BackwardTile(64, 96, 8, 2, 2, 2, sub_m=16)
        yield _staged(middle, 2, 2)
        yield _staged(middle, 2, 1)
    square = BackwardTile(64, 64, 8, 2, 2, 2, sub_m=16)
    yield _staged(square, 2, 2)
    yield _staged(square, 2, 1)
    yield _staged(square, 1, 1)
    yield BackwardTile(32, 64, 8, 4, 2, 2, sub_m=16)
    yield BackwardTile(32, 32, 4, 2, 2, 2, sub_m=16)


def _staged(
    tile: BackwardTile, stages_q: int, stages_do: int, stages_ds: int = 1, min_ctas_per_sm: int = 1
) -> BackwardTile:
    return replace(
        tile,
        stages_q=stages_q,
        stages_do=stages_do,
        stages_ds=stages_ds,
        min_ctas_per_sm=min_ctas_per_sm,
    )


def backward_tile(problem: Problem, arch: str) -> BackwardTile:
    """The tile for a problem on an arch ("sm_80")."""
    limits = arch_table.limits(arch)
    for tile in _candidates(problem):
        smem = tile.smem_bytes(problem.head_dim_qk, problem.head_dim_v)
        if limits.max_ctas_per_sm(smem, 32 * tile.num_warps) >= tile.min_ctas_per_sm:
            return replace(
                tile, rotate=not (problem.causal or problem.local or problem.attention_chunk)
            )
    raise NotImplementedError(
        f"no backward tile of head dims ({problem.head_dim_qk}, {problem.head_dim_v}) fits "
        f"{limits.name}"
    )


def backward_specs(
    problem: BackwardProblem, arch: str, tile: BackwardTile | None = None
) -> tuple[KernelSpec, KernelSpec, KernelSpec]:
    """(preprocess, main, convert), with the tile of the table or a given one."""
    forward = problem.forward
    tile = tile or backward_tile(forward, arch)
    accum_columns = tile.accum_columns(forward.head_dim_qk)
    streaming: dict[str, bool | int] = {
        "bf16": forward.dtype == "bf16",
        "num_threads": STREAM_THREADS,
        "min_ctas_per_sm": 1,
        "smem_bytes": 0,
        "accum_columns": accum_columns,
        "varlen_q": forward.varlen_q,
        "varlen_k": forward.varlen_k,
    }
    preprocess = KernelSpec.make(
        "flash2/bwd_preprocess.cu",
        "flash2_bwd_preprocess",
        "BwdParams",
        arch,
        head_dim_v=forward.head_dim_v,
        vector_bytes=problem.out_vector_bytes,
        **streaming,
    )
    convert = KernelSpec.make(
        "flash2/bwd_convert.cu",
        "flash2_bwd_convert",
        "BwdParams",
        arch,
        head_dim_qk=forward.head_dim_qk,
        grad_vector_bytes=problem.grad_vector_bytes,
        deterministic=problem.deterministic,
        **streaming,
    )
    return preprocess, _main_spec(problem, arch, tile, accum_columns), convert


def _main_spec(
    problem: BackwardProblem, arch: str, tile: BackwardTile, accum_columns: int
) -> KernelSpec:
    forward = problem.forward
    return KernelSpec.make(
        "flash2/bwd.cu",
        "flash2_bwd",
        "BwdParams",
        arch,
        bf16=forward.dtype == "bf16",
        head_dim_qk=forward.head_dim_qk,
        head_dim_v=forward.head_dim_v,
        block_m=tile.block_m,
        block_n=tile.block_n,
        num_warps=tile.num_warps,
        num_threads=32 * tile.num_warps,
        s_warps_n=tile.s_warps_n,
        kv_warps_n=tile.kv_warps_n,
        dq_warps_m=tile.dq_warps_m,
        sub_m=tile.sub_m,
        stages_q=tile.stages_q,
        stages_do=tile.stages_do,
        stages_ds=tile.stages_ds,
        k_in_registers=tile.k_in_registers,
        v_in_registers=tile.v_in_registers,
        rotate=tile.rotate,
        min_ctas_per_sm=tile.min_ctas_per_sm,
        smem_bytes=tile.smem_bytes(forward.head_dim_qk, forward.head_dim_v),
        accum_columns=accum_columns,
        vector_bytes=problem.vector_bytes,
        grad_vector_bytes=problem.grad_vector_bytes,
        wide_row_strides=_wide_row_strides(problem),
        deterministic=problem.deterministic,
        grouped_heads=forward.qhead_per_khead * forward.qhead_per_vhead > 1,
        causal=forward.causal,
        local=forward.local,
        chunk=forward.attention_chunk > 0,
        softcap=forward.softcap > 0.0,
        alibi=forward.alibi,
        prescale=False,  # P is recomputed from softmax_lse, whatever the sign of the scale
        dropout=forward.dropout,
        varlen_q=forward.varlen_q,
        varlen_k=forward.varlen_k,
    )


def _wide_row_strides(problem: BackwardProblem) -> bool:
    forward = problem.forward
    of_inputs = (forward.q_strides, forward.k_strides, forward.v_strides, problem.dout_strides)
    return max(row for _, row, _ in of_inputs) * ELEM_BYTES >= 2**31
