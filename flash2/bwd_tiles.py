"""BackwardProblem -> KernelSpecs of the backward kernels. Pure functions.

Change tile sizes here; the reason stands beside each number. What a tile may be is fixed by
`bwd.cu` (its static_asserts) and by the arch's limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import floor, log2

from .._common.ask.backward_problem import BackwardProblem
from .._common.ask.problem import Problem
from .._common.features import dtype, lengths, union
from .._common.runtime import arch as arch_table
from .._common.runtime.spec import KernelSpec
from .._common.tiles import tuned_tiles
from .._common.tiles.row_strides import wide_row_strides
from .fwd_tiles import padded_bytes, row_bytes

STAT_BYTES = 4  # lse and D of one query, each
# Split roles hand P^T over as fp16. Times 2^14 (undone at the end, exactly) its normal numbers
# reach from 2^-28 to 1, so bf16 inputs with a million keys lose nothing.
HANDOFF_SHIFT = 14
MAX_HEAD_DIM_V = 256
# Of dS: at most MAX_HEAD_DIM_V products of two fp16 numbers, 2^40, is then in fp16's range.
MAX_DS_SHIFT = 25
STREAM_THREADS = 256  # kernels other than bwd.cu: enough loads in flight for the memory bandwidth


@dataclass(frozen=True)
class BackwardTile:
    """How `bwd.cu` cuts a problem up.

    The warps divide S^T and dP^T (keys x queries) as s_warps_n x the rest, dK and dV (keys x head
    dim) as kv_warps_n x the rest, dQ (queries x head dim) as dq_warps_m x the rest. With s_warps_n
    = kv_warps_n = num_warps, P^T and dS^T go from product to product in registers; else through
    shared memory. With split_roles, one half of the warps has S^T, P^T and dV, the other dP^T, dS^T
    and dK, and s_warps_n and kv_warps_n divide a half.
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
    split_roles: bool = False
    lines: bool = False  # Q and dO in shared memory are swizzled, where rows are whole lines

    @property
    def role_warps(self) -> int:
        """Warps that share one product of scores, dK or dV."""
        return self.num_warps // 2 if self.split_roles else self.num_warps

    @property
    def p_in_registers(self) -> bool:
        return self.s_warps_n == self.kv_warps_n == self.role_warps

    def column_multiples(self) -> tuple[int, int]:
        """Of tiles with head_dim_qk and head_dim_v columns: warps share them, 16 at a time."""
        kv_warps_d = self.role_warps // self.kv_warps_n
        return 16 * max(kv_warps_d, self.num_warps // self.dq_warps_m), 16 * kv_warps_d

    def accum_columns(self, head_dim_qk: int) -> int:
        """Columns of the fp32 accumulators of dQ and dK."""
        return _round_up(head_dim_qk, self.column_multiples()[0])

    def v_columns(self, head_dim_v: int) -> int:
        """Columns of the fp32 accumulator of dV."""
        return _round_up(head_dim_v, self.column_multiples()[1])

    def smem_bytes(self, head_dim_qk: int, head_dim_v: int) -> int:
        """Shared memory of `Smem` in bwd_warps.cuh."""
        multiple_qk, multiple_v = self.column_multiples()
        columns_qk = _round_up(head_dim_qk, multiple_qk)
        columns_v = _round_up(head_dim_v, multiple_v)
        kv_warps_d = self.role_warps // self.kv_warps_n
        row_k, row_v = padded_bytes(columns_qk), padded_bytes(columns_v)
        row_q = row_bytes(columns_qk, kv_warps_d) if self.lines else row_k
        row_do = row_bytes(columns_v, kv_warps_d) if self.lines else row_v
        score_tile = self.block_n * padded_bytes(self.block_m)
        resident = self.block_n * row_k
        streamed = self.stages_q * self.block_m * (row_q + STAT_BYTES)
        streamed += self.stages_do * self.block_m * (row_do + STAT_BYTES)
        v_bytes = self.block_n * row_v
        scores = score_tile * (self.stages_ds + (not self.p_in_registers))
        shared = max(v_bytes, scores) if self.v_in_registers else v_bytes + scores
        return resident + streamed + shared


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _candidates(problem: Problem) -> Iterator[BackwardTile]:
    """Tiles by preference; the first that fits the arch is taken.

    dK and dV of a CTA stay in registers, block_n x (head_dim_qk + head_dim_v) fp32 values: that
    bounds block_n. Where a warp can hold 32 whole rows of them, P^T and dS^T need not be shared.
    Else split roles: a warp then has dK or dV only, so 32 rows of it fit; it reads a fifth less
    from shared memory, and one role's exponentials run beside the other's products (2 to 20 %
    faster than what follows). Else warps in 2-D grids, whose tiles of 32 x 32 and 32 x 64 keep the
    traffic of ldmatrix below that of the tensor cores. Measured on an H100 over the named pairs:
    docs/performance/.
    """
    qk, v = problem.head_dim_qk, problem.head_dim_v
    if qk > 256:  # dK and dV take most registers: tiles that spill least. Not measured yet.
        few = BackwardTile(*((64, 32, 8, 2, 2, 4) if qk + v > 576 else (32, 64, 8, 4, 2, 2)), 16)
        yield from (_staged(few, 2, 2), few, BackwardTile(32, 32, 4, 2, 2, 1, sub_m=16))
        return
    dq_warps_m = 2 if qk % 64 == 0 or qk < 64 else 4  # without padding of head_dim_qk
    if qk + v <= 128:
        if not problem.dropout:
            if qk <= 32:
                yield _staged(BackwardTile(128, 128, 4, 4, 4, 4, sub_m=32), 2, 1, 1, 2)
            yield _staged(BackwardTile(64, 128, 4, 4, 4, 2, sub_m=32), 2, 2, 2, 2)
        # 16 rows a warp leave registers for V and for dropout's random numbers.
        half_rows = BackwardTile(64, 128, 8, 8, 8, 4, 32, k_in_registers=True, v_in_registers=True)
        yield _staged(half_rows, 2, 2, 2)
    if 128 < qk + v and max(qk, v) <= 128 and not problem.dropout:
        roles = BackwardTile(64, 128, 8, 4, 4, dq_warps_m, sub_m=64, split_roles=True)
        yield _staged(roles, 2, 2, 2)
    if qk <= 64 and v <= 128 and not problem.dropout:
        yield _staged(BackwardTile(64, 64, 4, 2, 2, 2, sub_m=32), 2, 2, 1, 2)
    if qk + v <= 320 and max(qk, v) <= 192 and min(qk, v) <= 128:
        wide = BackwardTile(64, 128, 8, 4, 4, dq_warps_m, sub_m=32)
        if qk + v <= 288:
            yield _staged(wide, 2, 2)
        yield _staged(wide, 2, 1)
        yield _staged(wide, 1, 1)
    if (qk + v > 384 or min(qk, v) > 128) and not problem.dropout:
        # 231 KB at (256, 256): sm_90 and sm_100. Where both dims are beyond 128 what follows spills
        # and is slower, by 4 to 9 % at (192, 192), 12 to 25 % at (160, 224).
        roles = BackwardTile(64, 64, 8, 2, 2, 2, sub_m=32, split_roles=True)
        yield _staged(roles, 2, 2, 2)
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
    if problem.head_dim_v > MAX_HEAD_DIM_V:
        raise NotImplementedError(f"bwd.cu takes V in parts of up to {MAX_HEAD_DIM_V} columns")
    limits, dims = arch_table.limits(arch), (problem.head_dim_qk, problem.head_dim_v)
    for candidate in _candidates(problem):
        tile = replace(candidate, rotate=rotates(problem), lines=gains_by_lines(problem))
        smem = tile.smem_bytes(*dims)
        if limits.max_ctas_per_sm(smem, 32 * tile.num_warps) >= tile.min_ctas_per_sm:
            return tile
    raise NotImplementedError(f"no backward tile of head dims {dims} fits {limits.name}")


def rotates(problem: Problem) -> bool:
    """Without a mask all CTAs walk the same query tiles, so they had better begin apart."""
    return not (problem.causal or problem.local or problem.attention_chunk)


def gains_by_lines(problem: Problem) -> bool:
    """Whether BackwardTile.lines pays: not where V is the wider one, unless both dims are small,
    and not at 256 with different numbers of K and V heads.

    The addresses take registers, and more of them spill. Measured on an H200, 1k and 16k tokens,
    causal or not: (64,64) 0-3 % faster, (128,128) 0-4, (256,256) 3, (192,128) 0-7, (32,64) -1 to 3;
    (64,128) 1-5 % slower, (128,256) 0-2.
    """
    if problem.head_dim_v > 192 and problem.qhead_per_khead != problem.qhead_per_vhead:
        return False
    return problem.head_dim_v <= max(64, problem.head_dim_qk)


def refuses_tile(tile: BackwardTile, problem: Problem, arch: str) -> str | None:
    """Why `bwd.cu` cannot be built so, or not be launched on the arch; None if it can."""
    warps, role_warps = tile.num_warps, tile.role_warps
    if warps not in (1, 2, 4, 8, 16):
        return f"num_warps={warps} is not a power of two up to 16"
    for name, count, divided in (
        ("s_warps_n", tile.s_warps_n, role_warps),
        ("kv_warps_n", tile.kv_warps_n, role_warps),
        ("dq_warps_m", tile.dq_warps_m, warps),
    ):
        if count < 1 or divided % count:
            return f"{name}={count} does not divide {divided} warps"
    if tile.block_m not in (16, 32, 64, 128):
        return f"block_m={tile.block_m} is not 16, 32, 64 or 128"
    if tile.sub_m < 16 or tile.sub_m % 16:
        return f"sub_m={tile.sub_m} is not a multiple of 16"
    for size, name, part in (
        (tile.block_n, "block_n", 16 * tile.s_warps_n),
        (tile.block_n, "block_n", 16 * tile.kv_warps_n),
        (tile.block_m, "block_m", role_warps // tile.s_warps_n * tile.sub_m),
        (tile.block_m, "block_m", 16 * tile.dq_warps_m),
    ):
        if size < part or size % part:
            return f"{name}={size} is not a multiple of {part}, as its warps need"
    if not {tile.stages_q, tile.stages_do, tile.stages_ds} <= {1, 2}:
        return "stages_q, stages_do and stages_ds are 1 or 2"
    if tile.stages_ds == 2 and not (
        (tile.p_in_registers or tile.split_roles) and tile.stages_q == tile.stages_do == 2
    ):
        return "stages_ds=2 needs P^T in registers or split roles, and two stages of Q and dO"
    if tile.split_roles and (
        tile.stages_ds != 2
        or tile.k_in_registers
        or tile.v_in_registers
        or tile.block_m != role_warps // tile.s_warps_n * tile.sub_m
    ):
        return "split_roles needs stages_ds=2, no operands in registers, and all of block_m at once"
    smem = tile.smem_bytes(problem.head_dim_qk, problem.head_dim_v)
    fitting = arch_table.limits(arch).max_ctas_per_sm(smem, 32 * warps)
    if not 1 <= tile.min_ctas_per_sm <= fitting:
        return f"min_ctas_per_sm={tile.min_ctas_per_sm}, but {fitting} fit ({smem} bytes each)"
    return None


def tuned_tile(problem: Problem, arch: str, gpu: str = "") -> BackwardTile | None:
    """What a table of the autotuner holds for the problem, if any does."""
    key = tuned_tiles.key("flash2", "bwd", problem)
    return tuned_tiles.tile(BackwardTile, key, arch, gpu, lambda t: refuses_tile(t, problem, arch))


def backward_specs(
    problem: BackwardProblem, arch: str, tile: BackwardTile | None = None, gpu: str = ""
) -> tuple[KernelSpec, ...]:
    """(preprocess, main, convert) and, where query heads share K or V heads, sum; with a given tile
    or else the tuned one, or else `backward_tile`. gpu: the device's model, as `Target.gpu`.
    """
    forward = problem.forward
    tile = tile or tuned_tile(forward, arch, gpu) or backward_tile(forward, arch)
    accum_columns = tile.accum_columns(forward.head_dim_qk)
    v_columns = tile.v_columns(forward.head_dim_v)
    preprocess, *others = streaming_specs(problem, arch, accum_columns, v_columns)
    return preprocess, _main_spec(problem, arch, tile, accum_columns), *others


def streaming_specs(
    problem: BackwardProblem,
    arch: str,
    accum_columns: int,
    v_columns: int,
    programmatic: bool = False,
    ordered: bool = False,
) -> tuple[KernelSpec, ...]:
    """(preprocess, convert) and, where query heads share K or V heads, sum: what runs before and
    after the main kernel of either tree, limited by memory bandwidth.

    accum_columns, v_columns: of the fp32 accumulators of dQ and dK, and of dV. programmatic: each
        kernel may start before the one ahead of it has ended, and waits for it by itself (sm_90+).
    ordered: the main kernel counts what it adds to dq_accum.
    """
    forward = problem.forward
    streaming: dict[str, bool | int] = {
        "num_threads": STREAM_THREADS,
        "min_ctas_per_sm": 1,
        "smem_bytes": 0,
        "accum_columns": accum_columns,
        "vector_atomics": _vector_atomics(arch),
        "programmatic": programmatic,
        **dtype.constants(forward, "backward"),
        **lengths.constants(forward, "backward"),
    }
    preprocess = KernelSpec.make(
        "flash2/bwd_preprocess.cu",
        "flash2_bwd_preprocess",
        "BwdParams",
        arch,
        head_dim_v=forward.head_dim_v,
        vector_bytes=problem.out_vector_bytes,
        ordered=ordered,
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
    if forward.qhead_per_khead == forward.qhead_per_vhead == 1:
        return preprocess, convert
    del streaming["vector_atomics"]
    total = KernelSpec.make(
        "flash2/bwd_sum.cu",
        "flash2_bwd_sum",
        "BwdParams",
        arch,
        head_dim_qk=forward.head_dim_qk,
        head_dim_v=forward.head_dim_v,
        v_columns=v_columns,
        grad_vector_bytes=problem.grad_vector_bytes,
        **streaming,
    )
    return preprocess, convert, total


def _main_spec(
    problem: BackwardProblem, arch: str, tile: BackwardTile, accum_columns: int
) -> KernelSpec:
    forward = problem.forward
    copied = (forward.q_strides, forward.k_strides, forward.v_strides, problem.dout_strides)
    return KernelSpec.make(
        "flash2/bwd.cu",
        "flash2_bwd",
        "BwdParams",
        arch,
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
        split_roles=tile.split_roles,
        lines=tile.lines,
        probability_shift=HANDOFF_SHIFT if tile.split_roles and forward.dtype == "bf16" else 0,
        scale_ds=ds_shift(forward) > 0,
        vector_atomics=_vector_atomics(arch),
        k_in_registers=tile.k_in_registers,
        v_in_registers=tile.v_in_registers,
        rotate=tile.rotate,
        min_ctas_per_sm=tile.min_ctas_per_sm,
        smem_bytes=tile.smem_bytes(forward.head_dim_qk, forward.head_dim_v),
        accum_columns=accum_columns,
        vector_bytes=problem.vector_bytes,
        grad_vector_bytes=problem.grad_vector_bytes,
        wide_row_strides=wide_row_strides(*(row for _, row, _ in copied)),
        deterministic=problem.deterministic,
        ordered=False,  # bwd_order.py
        unequal_heads=forward.qhead_per_khead != forward.qhead_per_vhead,
        **union.constants(forward, "backward"),
    )


def ds_shift(problem: Problem) -> int:
    """dS is held in 16 bits times 2^-ds_shift, for both trees; dQ and dK undo it.

    They are softmax_scale * dS times K or Q. With fp16 and a small scale dS overflows where they do
    not; times the scale, rounded up to a power of two, it overflows no sooner. Scales near the
    default are left alone: small gradients would lose bits of dS that fp16 has no more of below
    2^-14, and every one of today's results would change.
    """
    scale = abs(problem.softmax_scale)
    if problem.dtype != "fp16" or 2 * scale > problem.head_dim_qk**-0.5:
        return 0
    return min(MAX_DS_SHIFT, floor(-log2(scale))) if scale > 0.0 else MAX_DS_SHIFT


def _vector_atomics(arch: str) -> bool:
    """Whether red.global.add.v4.f32 exists."""
    return int(arch.removeprefix("sm_").rstrip("af")) >= 90
