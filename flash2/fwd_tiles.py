"""Problem -> KernelSpec for the forward. Pure functions; the reason stands beside each number.

Change tile sizes here. What a tile may be is fixed by `fwd.cu` (its static_asserts) and by the
arch's limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

from .._common.ask.problem import Problem
from .._common.features import union
from .._common.features.kv import page_division
from .._common.runtime import arch as arch_table
from .._common.runtime.spec import KernelSpec
from .._common.tiles import tuned_tiles
from .._common.tiles.row_strides import wide_row_strides

ELEM_BYTES = 2
# tile_copy.cuh: columns are rounded up to the depth of one mma; rows are swizzled if they are whole
# lines of 128 bytes, else padded against bank conflicts.
COLUMN_MULTIPLE = 16
LINE_COLUMNS = 64
ROW_PAD_BYTES = 16
CHUNK_COLUMNS = 64  # what the threads of a row copy at a time, or twice that
# A warp holds O of all columns of its rows: 128 registers a thread at 256. More: part_tiles.py.
MAX_HEAD_DIM_QK, MAX_HEAD_DIM_V = 576, 256


@dataclass(frozen=True)
class ForwardTile:
    """How `fwd.cu` cuts a problem up. block_m / num_warps, the rows of a warp, is 16 or 32."""

    block_m: int
    block_n: int  # a multiple of 32, the width of a dropout patch
    num_warps: int
    num_stages: int = 1  # K and V tiles in flight, each
    q_in_registers: bool = False
    min_ctas_per_sm: int = 1
    one_barrier: bool = False  # a key tile, instead of two; needs two stages
    # Column chunks in which the first Q and K arrive, the first product behind them; more than one
    # needs one stage and Q in shared memory.
    prologue_chunks: int = 1
    lines: bool = False  # tiles in shared memory are swizzled, where rows are whole lines

    def smem_bytes(self, head_dim_qk: int, head_dim_v: int) -> int:
        """Shared memory of `Smem` in fwd.cu."""
        of_row = row_bytes if self.lines else padded_bytes
        row_qk, row_v = (
            of_row(-(-head_dim // COLUMN_MULTIPLE) * COLUMN_MULTIPLE)
            for head_dim in (head_dim_qk, head_dim_v)
        )
        ring = self.num_stages * self.block_n * (row_qk + row_v)
        return self.block_m * row_qk + ring


def row_bytes(columns: int, parts: int = 1) -> int:
    """Of CopiedTileLayout in tile_copy.cuh, whose columns are shared by so many warps."""
    part = columns // parts
    whole = part % LINE_COLUMNS == 0 or LINE_COLUMNS % part == 0
    lines = columns % LINE_COLUMNS == 0 and whole
    return columns * ELEM_BYTES if lines else padded_bytes(columns)


def padded_bytes(columns: int) -> int:
    """Of a row of TileLayout."""
    return columns * ELEM_BYTES + ROW_PAD_BYTES


def _candidates(problem: Problem) -> Iterator[ForwardTile]:
    """Tiles by preference; the first that fits the arch is taken.

    A warp of 32 rows reads each K and V fragment from shared memory for two row tiles, half the
    traffic of 16 rows, but holds 32 x head_dim_v of O in registers: 128 registers a thread at 128.
    So 4 warps of 32 rows, two CTAs on an SM, up to head_dim_v 128; beyond that, and where dropout's
    random numbers need registers too, 8 warps of 16 rows. Two stages let a product carry the next
    tile's copy without waiting for it. With one barrier a tile the warps drift apart, so one's
    softmax runs beside another's products; but Q K^T then carries all copies, which costs 2 to 6 %
    where shared memory is the limit (16 rows a warp). 64 keys a tile spill a few registers at
    head_dim_v 128 and are 5 % faster than 32 all the same. Measured on an H100 (sm_90) over head
    dims (32,64) to (256,256), docs/performance/. Other archs: the same order, by what fits.
    """
    qk, v = problem.head_dim_qk, problem.head_dim_v
    # Odd dims are copied by two bytes, through registers: 64 keys spill too much beside that.
    even = qk % 2 == v % 2 == 0
    if v <= 128 and not problem.dropout and (v <= 64 or even):
        in_registers = qk <= 64 and v <= 64
        yield ForwardTile(128, 64, 4, 2, in_registers, min_ctas_per_sm=2, one_barrier=True)
    if v <= 64 and not problem.dropout:
        yield ForwardTile(128, 64, 4, min_ctas_per_sm=2)
    elif v <= 128 and not (problem.dropout and v > 64):
        yield ForwardTile(128, 32, 4, num_stages=2, min_ctas_per_sm=2)
        yield ForwardTile(128, 32, 4, min_ctas_per_sm=2)
    elif v > 192 and qk > 128:
        # 203 KB at (256, 256): sm_90 and sm_100. One CTA on an SM, idle while it loads.
        yield ForwardTile(128, 128, 8, prologue_chunks=prologue_chunks(qk))
    # Q in registers frees the memory pipe where O leaves room for it.
    yield ForwardTile(128, 64, 8, num_stages=2, q_in_registers=qk <= 128 and v <= 192)
    yield ForwardTile(128, 64, 8)
    yield ForwardTile(64, 64, 4)
    yield ForwardTile(64, 32, 4)
    if qk > 256:  # 99 KB of shared memory: sm_86, sm_89, sm_120
        if not problem.dropout:
            yield ForwardTile(64, 16, 4)
        yield ForwardTile(32, 32, 2)


def prologue_chunks(head_dim_qk: int) -> int:
    """The value of `ForwardTile.prologue_chunks` other than 1, if there is one."""
    return 1 if head_dim_qk % CHUNK_COLUMNS else head_dim_qk // CHUNK_COLUMNS


def forward_tile(problem: Problem, arch: str) -> ForwardTile:
    """The tile for a problem on an arch ("sm_80")."""
    if problem.head_dim_v > MAX_HEAD_DIM_V:
        raise NotImplementedError(
            f"no tile of fwd.cu for head_dim_v {problem.head_dim_v}: it takes V in parts of up to "
            f"{MAX_HEAD_DIM_V} columns, with the tiles of those"
        )
    for candidate in _candidates(problem):
        tile = replace(candidate, lines=gains_by_lines(problem, arch))
        if _fits(tile, problem, arch):
            # Pages beside the widest V leave no registers for lines. The rest of a tile may not
            # depend on pages: they promise the bits of packed keys, whatever the layout.
            padded = replace(tile, lines=False)
            few_registers = problem.page_size > 0 and problem.head_dim_v > 192
            return padded if few_registers and _fits(padded, problem, arch) else tile
    raise NotImplementedError(
        f"no forward tile of head dims ({problem.head_dim_qk}, {problem.head_dim_v}) fits "
        f"{arch_table.limits(arch).name}"
    )


def _fits(tile: ForwardTile, problem: Problem, arch: str) -> bool:
    smem = tile.smem_bytes(problem.head_dim_qk, problem.head_dim_v)
    fitting = arch_table.limits(arch).max_ctas_per_sm(smem, 32 * tile.num_warps)
    return fitting >= tile.min_ctas_per_sm


def gains_by_lines(problem: Problem, arch: str) -> bool:
    """Whether ForwardTile.lines pays: not on sm_100 at head_dim_v 128, where ptxas then spills.
    Measured on an H200, 1k and 16k tokens: (256,256) 2-5 % faster, (128,128), (64,128), (128,256)
    0-3, (192,128) 0-2, (64,64) -1 to 0."""
    return not (arch.startswith("sm_100") and 64 < problem.head_dim_v <= 128)


def refuses_tile(tile: ForwardTile, problem: Problem, arch: str) -> str | None:
    """Why `fwd.cu` cannot be built so, or not be launched on the arch; None if it can."""
    if tile.num_warps not in (1, 2, 4, 8, 16) or tile.block_m not in (
        16 * tile.num_warps,
        32 * tile.num_warps,
    ):
        return f"block_m={tile.block_m} is not 16 or 32 rows for each of {tile.num_warps} warps"
    multiple = 32 if problem.dropout else 16
    if tile.block_n < multiple or tile.block_n % multiple:
        return f"block_n={tile.block_n} is not a multiple of {multiple}"
    if not 1 <= tile.num_stages <= 4:
        return f"num_stages={tile.num_stages} is not 1 to 4"
    if tile.one_barrier and tile.num_stages != 2:
        return "one_barrier needs num_stages=2"
    if tile.prologue_chunks != 1:
        if tile.num_stages != 1 or tile.q_in_registers:
            return "prologue_chunks needs num_stages=1 and q_in_registers=False"
        chunks = prologue_chunks(problem.head_dim_qk)
        if tile.prologue_chunks != chunks:
            return f"prologue_chunks={tile.prologue_chunks} is neither 1 nor {chunks}"
    smem = tile.smem_bytes(problem.head_dim_qk, problem.head_dim_v)
    fitting = arch_table.limits(arch).max_ctas_per_sm(smem, 32 * tile.num_warps)
    if not 1 <= tile.min_ctas_per_sm <= fitting:
        return f"min_ctas_per_sm={tile.min_ctas_per_sm}, but {fitting} fit ({smem} bytes each)"
    return None


def tuned_tile(problem: Problem, arch: str, gpu: str = "") -> ForwardTile | None:
    """What a table of the autotuner holds for the problem, if any does."""
    key = tuned_tiles.key("flash2", "fwd", problem)
    return tuned_tiles.tile(ForwardTile, key, arch, gpu, lambda t: refuses_tile(t, problem, arch))


def forward_spec(
    problem: Problem, arch: str, tile: ForwardTile | None = None, gpu: str = ""
) -> KernelSpec:
    """The kernel for a problem on an arch, with a given tile or else the tuned one, or else
    `forward_tile`. gpu: the device's model, as `Target.gpu`.
    """
    tile = tile or tuned_tile(problem, arch, gpu) or forward_tile(problem, arch)
    return KernelSpec.make(
        "flash2/fwd.cu",
        "flash2_fwd",
        "FwdParams",
        arch,
        head_dim_qk=problem.head_dim_qk,
        head_dim_v=problem.head_dim_v,
        block_m=tile.block_m,
        block_n=tile.block_n,
        num_warps=tile.num_warps,
        num_threads=32 * tile.num_warps,
        num_stages=tile.num_stages,
        q_in_registers=tile.q_in_registers,
        min_ctas_per_sm=tile.min_ctas_per_sm,
        one_barrier=tile.one_barrier,
        lines=tile.lines,
        # Each chunk would look its rows' pages up anew.
        prologue_chunks=1 if problem.page_size else tile.prologue_chunks,
        smem_bytes=tile.smem_bytes(problem.head_dim_qk, problem.head_dim_v),
        vector_bytes=problem.vector_bytes,
        out_vector_bytes=gcd(problem.head_dim_v * ELEM_BYTES, 16),
        wide_row_strides=wide_row_strides(
            problem.q_strides[1], problem.k_strides[1], problem.v_strides[1]
        ),
        **union.constants(problem, "forward"),
    )


def division(divisor: int) -> int:
    """By what `divide` of common/device/elem.cuh divides: magic, and shift in the upper 32 bits."""
    magic, shift = page_division(divisor)
    return shift << 32 | magic
