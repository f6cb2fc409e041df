"""BackwardProblem -> KernelSpecs of the backward: bwd.cu of this folder between the streaming
kernels of flash2/. Pure functions; the reason stands beside each number.

Change tile sizes here. What a tile may be is fixed by `bwd.cu` (its static_asserts), by registers
(below) and by shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from flash_attn_interface._common.ask.backward_problem import BackwardProblem
from flash_attn_interface._common.ask.problem import Problem
from flash_attn_interface._common.features import union
from flash_attn_interface._common.runtime import arch as arch_table
from flash_attn_interface._common.runtime.spec import KernelSpec
from flash_attn_interface._common.tiles import tuned_tiles
from flash_attn_interface._flash2.bwd_tiles import ds_shift, streaming_specs

from .fwd_tiles import ELEM_BYTES, WG_ROWS

MAX_HEAD_DIM = 256
CHUNK_COLUMNS = 64  # of the 128-byte swizzle: tiles in shared memory have whole ones
THREADS = 512  # loads, dQ, and two warpgroups with scores, dK and dV
LAUNCH_REGISTERS = 65536 // THREADS
OTHER_REGISTERS = 40  # of a dQ warp, beside its part of dQ
# ptxas refuses wider products in 512 threads: C7602, "insufficient registers (128)".
MAX_GRADIENT_N = 192
BARRIER_BYTES = 384  # barriers and the work of a CTA
# softmax_lse / softmax_scale goes through the tensor cores in 16-bit parts, which reach to 2^31 in
# fp16 (StatWriter in bwd_producer.cuh): beyond these scales it is read as floats.
AUX_SCALES = (1e-4, 1e4)


@dataclass(frozen=True)
class BackwardTile:
    """How `bwd.cu` cuts a problem up."""

    block_m: int  # queries of a step: 64 or 128
    block_n: int  # keys of a CTA: 64 or 128
    split_roles: bool = False  # one warpgroup has S^T, P^T and dV, the other dP^T, dS^T and dK
    stages_q: int = 2  # Q tiles in flight
    stages_do: int = 2  # dO tiles in flight
    stages_ds: int = 2  # dS tiles between their warpgroups and dQ's
    add_stages: int = 0  # dQ goes to memory by bulk additions of so many stages; 0: from registers
    dq_columns: int = 64  # of dQ computed at a time
    dq_buffers: int = 1  # 2: a part is added while the next one's product is on its way
    gradient_n: int = MAX_GRADIENT_N  # most columns of dK or dV in one product
    cluster_size: int = 1  # 2: CTAs with neighbouring key tiles share dQ
    aux: bool = True  # lse and D go through the tensor cores, where they can

    def smem_bytes(self, problem: Problem) -> int:
        """Shared memory of `Smem` in bwd_layout.cuh."""
        columns_qk = _round_up(problem.head_dim_qk, CHUNK_COLUMNS)
        columns_v = _round_up(problem.head_dim_v, CHUNK_COLUMNS)
        score_tile = self.block_m * self.block_n
        ctas = self.cluster_size
        elements = self.block_n * (ctas * columns_qk + columns_v)
        elements += self.block_m * (self.stages_q * columns_qk + self.stages_do * columns_v)
        elements += score_tile * (self.stages_ds * (2 * ctas - 1) + self.split_roles)
        with_lse, with_d = self.aux_lse(problem), self.aux_d(problem)
        lse_bytes = 32 if with_lse else 4
        d_bytes = 32 if with_d else 4
        stats = self.block_m * (self.stages_q * lse_bytes + self.stages_do * d_bytes)
        ones = WG_ROWS * 32 if with_lse or with_d else 0
        staged = self.add_stages * WG_ROWS * self.dq_part(problem) * 4
        return elements * ELEM_BYTES + stats + ones + staged + BARRIER_BYTES

    def aux_lse(self, problem: Problem) -> bool:
        """softmax_lse is added by the tensor cores; softcap needs the scores themselves."""
        low, high = AUX_SCALES
        return self.aux and problem.softcap == 0.0 and low <= abs(problem.softmax_scale) <= high

    def aux_d(self, problem: Problem) -> bool:
        """D is subtracted by the tensor cores; dropout comes in between."""
        return self.aux and not problem.dropout

    def dq_part(self, problem: Problem) -> int:
        """Columns of one product of dQ."""
        return min(_round_up(problem.head_dim_qk, 16), self.dq_columns)

    def producer_registers(self, problem: Problem) -> int:
        """Of a thread that loads. Warps that write lse and D hold block_m / 32 values of this step
        and of the next; with 24 registers ptxas spilled 8 bytes at 128 queries, 4 with floats.
        """
        narrow = self.block_m == WG_ROWS and self.aux_lse(problem) and self.aux_d(problem)
        return 24 if narrow else 32

    def registers(self, problem: Problem) -> tuple[int, int, int]:
        """Of a thread with scores (or S^T, P^T and dV), with dP^T, dS^T and dK, and with dQ."""
        sums = self.dq_buffers * self.dq_part(problem) // 2
        dq = max(72, _round_up(sums + OTHER_REGISTERS, 8))
        rest = 4 * LAUNCH_REGISTERS - self.producer_registers(problem) - dq
        if not self.split_roles:
            return rest // 16 * 8, rest // 16 * 8, dq
        qk, v = (gradient_columns(d, self.gradient_n) for d in _dims(problem))
        wider = self.block_n // WG_ROWS * (v - qk) // 4
        scores = max(96, min((_round_up(rest // 2, 8) + wider) // 8 * 8, (rest - 96) // 8 * 8))
        return min(scores, 232), min((rest - scores) // 8 * 8, 232), dq


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _dims(problem: Problem) -> tuple[int, int]:
    return problem.head_dim_qk, problem.head_dim_v


def gradient_n(head_dim: int, most: int) -> int:
    """Columns of dK or dV in one product: all, or equal parts of whole chunks."""
    columns = _round_up(head_dim, 16)
    if columns <= most:
        return columns
    parts = -(-columns // most)
    return _round_up(-(-columns // parts), CHUNK_COLUMNS)


def gradient_columns(head_dim: int, most: int) -> int:
    """Columns of dK or dV that the products write."""
    return _round_up(head_dim, gradient_n(head_dim, most))


def _candidates(problem: Problem) -> Iterator[BackwardTile]:
    """Tiles by preference; the first that fits is taken.

    dK and dV of a CTA stay in registers: that bounds block_n. Up to 256 columns of both, a
    warpgroup can have all of 64 keys. Softcap and dropout need a second copy of P^T, so they split
    roles sooner. Beyond that dQ's additions are the limit, 64 keys at a time: pairs of CTAs add
    half as often, and a part of dQ is added beside the next one's product. Measured on an H200:
    docs/performance/.
    """
    qk, v = (_round_up(d, 16) for d in _dims(problem))
    plain = problem.softcap == 0.0 and not problem.dropout
    if plain and qk + v <= 128:
        yield BackwardTile(128, 128, stages_q=3, stages_ds=1)
    if plain and qk + v <= 256:
        # Bulk additions are faster where they are short.
        joint = BackwardTile(64, 128, add_stages=2 if qk <= 64 else 0)
        if not problem.causal and problem.seqlen_q >= 2048:
            yield replace(joint, stages_ds=3)
        yield joint
    if max(qk, v) <= 64:
        yield BackwardTile(64, 128, split_roles=True)
    split = BackwardTile(64, 64, split_roles=True)
    if plain and qk <= 96:
        yield replace(split, add_stages=2, dq_columns=96, stages_ds=2 if problem.causal else 3)
    pair = replace(split, cluster_size=2, dq_buffers=2 if qk % 64 == 0 else 1)
    if plain and qk > 96 and not (problem.causal and min(qk, v) > 192):
        yield replace(pair, stages_ds=2 if qk > v else 1)
        yield replace(pair, stages_ds=1)
        yield replace(pair, stages_q=1, stages_do=1, stages_ds=1)
    one = replace(split, dq_buffers=pair.dq_buffers if plain else 1)
    for q, do, ds in ((2, 2, 2), (2, 1, 2), (1, 1, 2), (1, 1, 1)):
        yield replace(one, stages_q=q, stages_do=do, stages_ds=ds)


def backward_tile(problem: Problem, arch: str) -> BackwardTile:
    """The tables' choice."""
    for tile in _candidates(problem):
        if refuses_tile(tile, problem, arch) is None:
            return tile
    raise AssertionError(f"no tile fits {problem.describe()}")


def refuses_tile(tile: BackwardTile, problem: Problem, arch: str) -> str | None:
    """Why `bwd.cu` cannot be built so, or not be launched; None if it can."""
    if tile.block_m not in (64, 128) or tile.block_n not in (64, 128):
        return f"block_m={tile.block_m}, block_n={tile.block_n}: 64 or 128"
    if not tile.split_roles:
        if tile.block_n != 2 * WG_ROWS:
            return "two warpgroups with 64 keys each need block_n=128"
        if problem.softcap > 0.0 or problem.dropout:
            return "softcap and dropout need split_roles"
    if not {tile.stages_q, tile.stages_do, tile.stages_ds} <= {1, 2, 3, 4}:
        return "stages_q, stages_do and stages_ds are 1 to 4"
    if tile.cluster_size not in (1, 2):
        return f"cluster_size={tile.cluster_size}: 1 or 2"
    if not 0 <= tile.add_stages <= 4:
        return f"add_stages={tile.add_stages}: 0 to 4"
    if tile.dq_columns < _round_up(problem.head_dim_qk, 16) and tile.dq_columns % CHUNK_COLUMNS:
        return f"dq_columns={tile.dq_columns} cuts a chunk of {CHUNK_COLUMNS} columns"
    if tile.dq_buffers not in (1, 2):
        return f"dq_buffers={tile.dq_buffers}: 1 or 2"
    if tile.dq_buffers == 2 and _round_up(problem.head_dim_qk, 16) % tile.dq_part(problem):
        return "dq_buffers=2 needs equal parts of dQ"
    if not 64 <= tile.gradient_n <= MAX_GRADIENT_N or tile.gradient_n % CHUNK_COLUMNS:
        return f"gradient_n={tile.gradient_n} is not a multiple of 64 up to {MAX_GRADIENT_N}"
    smem, available = tile.smem_bytes(problem), arch_table.limits(arch).max_smem_per_cta
    if smem > available:
        return f"it needs {smem} bytes of shared memory, a CTA has {available}"
    return None


def refuses_head_dims(head_dim_qk: int, head_dim_v: int) -> str | None:
    """Why the kernel does not exist for these; None if it does."""
    if max(head_dim_qk, head_dim_v) > MAX_HEAD_DIM:
        return f"its backward has head dims up to {MAX_HEAD_DIM}"
    return None


def tuned_tile(problem: Problem, arch: str, gpu: str = "") -> BackwardTile | None:
    """What a table of the autotuner holds for the problem, if any does."""
    key = tuned_tiles.key("hopper", "bwd", problem)
    return tuned_tiles.tile(BackwardTile, key, arch, gpu, lambda t: refuses_tile(t, problem, arch))


def backward_specs(
    problem: BackwardProblem, arch: str, tile: BackwardTile | None = None, gpu: str = ""
) -> tuple[KernelSpec, ...]:
    """(preprocess, main, convert) and, where query heads share K or V heads, sum; with a given tile
    or else the tuned one, or else `backward_tile`. gpu: the device's model, as `Target.gpu`.
    """
    forward = problem.forward
    tile = tile or tuned_tile(forward, arch, gpu) or backward_tile(forward, arch)
    accum_columns, v_columns = (_round_up(d, 16) for d in _dims(forward))
    # Additions to dq_accum in a fixed order, to one copy of it, are how this tree is deterministic.
    preprocess, *others = streaming_specs(
        replace(problem, deterministic=False),
        arch,
        accum_columns,
        v_columns,
        programmatic=True,
        ordered=problem.deterministic,
    )
    return preprocess, _main_spec(problem, arch, tile, accum_columns, v_columns), *others


def _main_spec(
    problem: BackwardProblem, arch: str, tile: BackwardTile, accum_columns: int, v_columns: int
) -> KernelSpec:
    p = problem.forward
    score_registers, gradient_registers, dq_registers = tile.registers(p)
    dq_part = tile.dq_part(p)
    return KernelSpec.make(
        "hopper/bwd.cu",
        "hopper_bwd",
        "HopperBwdParams",
        arch,
        head_dim_qk=p.head_dim_qk,
        head_dim_v=p.head_dim_v,
        block_m=tile.block_m,
        block_n=tile.block_n,
        split_roles=tile.split_roles,
        stages_q=tile.stages_q,
        stages_do=tile.stages_do,
        stages_ds=tile.stages_ds,
        add_stages=tile.add_stages,
        cluster_size=tile.cluster_size,
        aux_lse=tile.aux_lse(p),
        aux_d=tile.aux_d(p),
        wgmma_scores_n=tile.block_m,
        wgmma_dk_n=gradient_n(p.head_dim_qk, tile.gradient_n),
        wgmma_dv_n=gradient_n(p.head_dim_v, tile.gradient_n),
        dq_buffers=tile.dq_buffers,
        wgmma_dq_n=dq_part,
        wgmma_dq_last_n=accum_columns % dq_part or dq_part,
        num_threads=THREADS,
        launch_registers=LAUNCH_REGISTERS,
        producer_registers=tile.producer_registers(p),
        score_registers=score_registers,
        gradient_registers=gradient_registers,
        dq_registers=dq_registers,
        min_ctas_per_sm=1,
        smem_bytes=tile.smem_bytes(p),
        accum_columns=accum_columns,
        v_columns=v_columns,
        grad_vector_bytes=problem.grad_vector_bytes,
        probability_shift=0,
        scale_ds=ds_shift(p) > 0,
        # Causal CTAs begin at different queries anyway.
        rotate=not p.causal and not problem.deterministic,
        deterministic=False,  # in the sense of flash2's kernels: dq_accum once for each split
        ordered=problem.deterministic,
        **union.constants(p, "backward"),
        ragged_q=p.varlen_q or p.has_seqused_q,
        ragged_k=p.varlen_k or p.has_seqused_k,
    )
