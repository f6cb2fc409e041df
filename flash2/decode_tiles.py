"""Problem -> KernelSpecs of decode.cu and combine.cu. Pure functions; the reason stands beside each
number.

Change tile sizes here, the number of splits in `decode_splits.py`. What a tile may be is fixed by
`decode_layout.cuh` (its static_asserts) and by the arch's limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

from .._common.ask.problem import Problem, Target
from .._common.features import dtype, union
from .._common.runtime import arch as arch_table
from .._common.runtime.spec import KernelSpec
from .._common.tiles import tuned_tiles
from .._common.tiles.row_strides import wide_row_strides
from .fwd_tiles import COLUMN_MULTIPLE, ELEM_BYTES, ROW_PAD_BYTES, row_bytes

# What the merges have room for (kMaxSplits), and what callers may ask for.
MAX_SPLITS = 256

# Bytes that a CTA has under way while it works on a tile. More gained nothing on an H100, where one
# CTA on each SM comes to 4 MB: 3 TB/s for 1.4 us. GPUs whose SMs have little shared memory read
# less per SM, too: a seventh of it is enough for them, and leaves room for two CTAs. An H200, which
# reads 4.4 TB/s, wants twice that of a CTA alone on its SM: DecodeParams::refill_first.
BYTES_IN_FLIGHT = 32 * 1024
SMEM_PER_BYTE_IN_FLIGHT = 7

# Registers of a thread that Q and O may take, else Q stays in shared memory. More of them with qv:
# to read it again for each tile costs half of what reading the keys does. ptxas then spills up to
# 200 bytes, none of them in the loop.
MAX_REGISTERS, MAX_REGISTERS_WITH_QV = 128, 160

# Query rows up to which mma.sync is no slower (H100, qv, 64 x 8192 keys: 2.76 TB/s against 2.79
# with 16 heads, 2.63 against 2.73 with 32, 1.0 against 2.0 with 128).
MAX_ROWS_WITHOUT_WGMMA = 16
# The code that has WGMMA; columns of a chunk (swizzled_tile.cuh).
WGMMA_ARCH = "sm_90a"
WGMMA_CHUNK = 64

# decode_output.cuh, hand_over(): O is padded against bank conflicts; a maximum and a sum per row.
MERGE_PAD_BYTES = 32
MERGE_STAT_BYTES = 8
# decode_layout.cuh: rows of splits that a warp has under way when it merges them.
MIN_SPLITS_AHEAD = 4
# Lanes hold vectors of four columns when they merge splits.
PARTIAL_COLUMN_MULTIPLE = 4


@dataclass(frozen=True)
class DecodeTile:
    """How `decode.cu` cuts a problem up. Teams of row_warps * col_warps warps share keys."""

    block_m: int  # packed query rows: 16, 32 or 64
    block_n: int  # keys of a team's tile: 16 or 32; 64 with wgmma
    row_warps: int  # that divide block_m
    num_teams: int  # they divide the keys
    num_stages: int  # tiles in a team's ring, at least 2
    q_in_registers: bool = True
    min_ctas_per_sm: int = 1
    col_warps: int = 1  # that divide the columns of V; each needs all scores of its rows
    wgmma: bool = False  # products by warpgroups, on sm_90 and with qv only

    @property
    def num_threads(self) -> int:
        return 32 * self.row_warps * self.col_warps * self.num_teams

    def smem_bytes(self, head_dim_qk: int, head_dim_v: int, qv: bool = False) -> int:
        """Shared memory of `Smem` in decode_layout.cuh."""
        multiple_v = (WGMMA_CHUNK if self.wgmma else COLUMN_MULTIPLE) * self.col_warps
        multiple_qk = COLUMN_MULTIPLE * (self.col_warps if qv else 1)
        if self.wgmma:
            multiple_qk = multiple_v if head_dim_qk > WGMMA_CHUNK else WGMMA_CHUNK
        columns_qk, columns_v = _columns(head_dim_qk, multiple_qk), _columns(head_dim_v, multiple_v)
        pad = 0 if self.wgmma else ROW_PAD_BYTES  # for WGMMA rows are swizzled
        queries = self.block_m * (columns_qk * ELEM_BYTES + pad)
        if self.wgmma:  # the rest of qv gives way to keys
            queries += self.block_m * WGMMA_CHUNK * self.col_warps * ELEM_BYTES
        elif qv:
            queries += self.block_m * (columns_v * ELEM_BYTES + pad)
        if self.wgmma:
            row = (columns_qk + columns_v) * ELEM_BYTES
        else:
            row = row_bytes(columns_qk, self.col_warps if qv else 1)
            row += row_bytes(columns_v, self.col_warps)
        rings = self.num_teams * self.num_stages * self.block_n * row
        scores = 0
        if qv and self.col_warps > 1:  # what each warp has of them
            scores = self.num_teams * self.col_warps * self.block_m * self.block_n * 4
        merge_row = columns_v * 4 + MERGE_PAD_BYTES + MERGE_STAT_BYTES
        merge = self.num_teams * self.block_m * merge_row
        num_warps = self.num_threads // 32
        row = num_warps * -(-head_dim_v // 128) * 512  # of a split, one for each warp
        splits = 16 + -(-num_warps * MERGE_STAT_BYTES // 16) * 16 + (1 + MIN_SPLITS_AHEAD) * row
        return max(queries + rings + scores, merge, splits)

    def bytes_in_flight(self, head_dim_qk: int, head_dim_v: int) -> int:
        """Keys and values on their way to a CTA while it works on others."""
        keys = (self.num_stages - 1) * self.num_teams * self.block_n
        return keys * (head_dim_qk + head_dim_v) * ELEM_BYTES


def _columns(head_dim: int, multiple: int) -> int:
    return -(-head_dim // multiple) * multiple


def heads_per_unit(problem: Problem) -> int:
    """Query heads that are packed into the rows of one tile: they share a K head and a V head.

    Aligned runs of this many heads do so for any pair of head counts: the run divides both group
    sizes.
    """
    return gcd(problem.qhead_per_khead, problem.qhead_per_vhead)


def packed_rows(problem: Problem) -> int:
    """Query rows of one sequence that read the same keys; an upper bound if ragged."""
    return problem.seqlen_q * heads_per_unit(problem)


def _candidates(problem: Problem, row_warps: int) -> Iterator[DecodeTile]:
    """Tiles of 16 * row_warps rows by preference, if they fit the arch.

    As few rows as there are: each row tile reads all keys. Up to 16 rows four warps with keys of
    their own, and two CTAs on an SM, for grids of more CTAs than SMs; with more rows, which warps
    share the keys of, eight warps and one CTA. Then the fewest stages that have BYTES_IN_FLIGHT
    under way, with tiles of 16 keys (32 for eight warps).

    Measured on an H100, bf16, head dims (128, 128), (64, 128), (192, 128), 32 query heads and 8, 4
    or 1 key heads, 16 x 8192, 1 x 65536, 64 x 8192 and 128 x 2048 keys: these are within 1.5% of
    the best of 14 (9 with 32 rows) tiles in each. Three stages instead of two lose 1 to 2%; with 32
    rows, four warps and two CTAs 2 to 5%.
    """
    if problem.qv and problem.head_dim_v > 256 and row_warps == 1:  # 6% faster with 16 heads
        yield DecodeTile(16, 32, row_warps, 2, 2, col_warps=4)
    # A warp has 255 registers a thread. Q takes head_dim_qk / 4 of them, O head_dim_v / 2: too much
    # for one warp with the widest V. Of qv, as of V, a warp has its columns only. Beside the widest
    # Q 99 KB of shared memory hold one team, not two: its warps share V sooner.
    wide = problem.head_dim_v > (192 if problem.head_dim_qk <= 256 else 64)
    col_warps = 2 if wide else 1
    quarter_registers = problem.head_dim_qk + 2 * problem.head_dim_v // col_warps
    if problem.qv:
        quarter_registers = (problem.head_dim_qk + 3 * problem.head_dim_v) // col_warps
    most_registers = MAX_REGISTERS_WITH_QV if problem.qv else MAX_REGISTERS
    q_in_registers = quarter_registers <= 4 * most_registers and problem.vector_bytes > 2
    sharing = row_warps * col_warps
    shapes = [(4, 2, [(16, 2), (16, 3), (32, 3), (32, 4)])]
    if row_warps > 1:
        shapes.insert(0, (8, 1, [(32, 2), (32, 3), (32, 4)]))
    for num_warps, ctas, rings in shapes:
        for fewer in (1, 2):
            num_teams = max(num_warps // fewer // sharing, 1)
            for block_n, num_stages in rings:
                yield DecodeTile(
                    16 * row_warps, block_n, row_warps, num_teams, num_stages, q_in_registers,
                    ctas, col_warps,
                )  # fmt: skip
    for block_n, num_stages in ((16, 2), (16, 3), (32, 2)):  # shared memory is short
        for num_teams in (max(4 // sharing, 1), max(2 // sharing, 1)):
            yield DecodeTile(
                16 * row_warps, block_n, row_warps, num_teams, num_stages, q_in_registers,
                1, col_warps,
            )  # fmt: skip


def decode_tile(problem: Problem, arch: str) -> DecodeTile:
    """The tile for a problem on an arch ("sm_80"): the first with enough bytes in flight, else the
    one with most of them."""
    dims = (problem.head_dim_qk, problem.head_dim_v)
    limits = arch_table.limits(arch)
    enough = min(BYTES_IN_FLIGHT, limits.smem_per_sm // SMEM_PER_BYTE_IN_FLIGHT)
    rows = packed_rows(problem)
    if rows > MAX_ROWS_WITHOUT_WGMMA and problem.head_dim_v > 192:
        for num_stages in (3, 2):
            tile = DecodeTile(64, 64, 4, 1, num_stages, col_warps=2, wgmma=True)
            if refuses_tile(tile, problem, arch) is None:
                return tile
    row_warps = 1 if rows <= 16 else 2 if rows <= 32 else 4
    # Where the queries leave no room for keys, tiles of fewer rows, which read all keys again.
    while row_warps:
        best: DecodeTile | None = None
        most = 0
        for tile in _candidates(problem, row_warps):
            smem_bytes = tile.smem_bytes(*dims, problem.qv)
            fitting = limits.max_ctas_per_sm(smem_bytes, tile.num_threads)
            in_flight = tile.bytes_in_flight(*dims)
            if fitting >= tile.min_ctas_per_sm and in_flight > most:
                best, most = tile, in_flight
                if in_flight >= enough:
                    break
        if best is not None:
            return best
        row_warps //= 2
    raise NotImplementedError(f"no decode tile of head dims {dims} fits {limits.name}")


def refuses_tile(tile: DecodeTile, problem: Problem, arch: str) -> str | None:
    """Why `decode.cu` cannot be built so, or not be launched on the arch; None if it can."""
    if tile.row_warps not in (1, 2, 4) or tile.block_m not in (
        16 * tile.row_warps,
        32 * tile.row_warps,
    ):
        return f"block_m={tile.block_m} is not 16 or 32 rows for each of {tile.row_warps} warps"
    if tile.block_n not in ((64,) if tile.wgmma else (16, 32)) or not 2 <= tile.num_stages <= 8:
        return "block_n is 16 or 32 (64 with WGMMA), num_stages 2 to 8"
    if tile.col_warps not in (1, 2, 4) or not 1 <= tile.num_threads // 32 <= 8:
        return f"{tile.num_threads // 32} warps, {tile.col_warps} in a row: 1 to 8, and 1, 2 or 4"
    if tile.wgmma:
        warps = (tile.row_warps, tile.col_warps, tile.num_teams)
        if arch.rstrip("a") != WGMMA_ARCH.rstrip("a") or not problem.qv:
            return "WGMMA is for qv on sm_90"
        if problem.vector_bytes != 16 or tile.block_m != 64 or warps != (4, 2, 1):
            return "WGMMA needs loads of 16 bytes and 64 rows by two warpgroups"
        if not tile.q_in_registers or problem.head_dim_v <= WGMMA_CHUNK * tile.col_warps:
            return "WGMMA takes qv from registers, but for its first columns"
    smem = tile.smem_bytes(problem.head_dim_qk, problem.head_dim_v, problem.qv)
    fitting = arch_table.limits(arch).max_ctas_per_sm(smem, tile.num_threads)
    if not 1 <= tile.min_ctas_per_sm <= fitting:
        return f"min_ctas_per_sm={tile.min_ctas_per_sm}, but {fitting} fit ({smem} bytes each)"
    return None


def row_class(problem: Problem) -> int:
    """Query rows up to which problems share a tile: 16, 32 or 64 (which stands for more, too)."""
    rows = packed_rows(problem)
    return 16 if rows <= 16 else 32 if rows <= 32 else 64


def tuned_tile(problem: Problem, arch: str, gpu: str = "") -> DecodeTile | None:
    """What a table of the autotuner holds for the problem, if any does."""
    key = tuned_tiles.key("flash2", "decode", problem, row_class(problem))
    return tuned_tiles.tile(DecodeTile, key, arch, gpu, lambda t: refuses_tile(t, problem, arch))


def chosen_tile(problem: Problem, target: Target) -> DecodeTile:
    """The tuned tile, or else `decode_tile`."""
    tuned = tuned_tile(problem, target.arch, target.gpu)
    return tuned or decode_tile(problem, target.arch)


def num_tiles(problem: Problem, block_m: int) -> int:
    """Row tiles of all sequences of a unit; ragged: enough for any division of total_q."""
    if problem.varlen_q:
        rows = problem.total_q * heads_per_unit(problem)
        return -(-rows // block_m) + problem.batch
    return problem.batch * -(-packed_rows(problem) // block_m)


def expected_ctas(problem: Problem, tile: DecodeTile) -> int:
    """CTAs with work, without splits. Of ragged queries, at least one tile for each sequence."""
    units = problem.num_heads_q // heads_per_unit(problem)
    if problem.varlen_q:
        rows = problem.total_q * heads_per_unit(problem)
        return units * max(problem.batch, -(-rows // tile.block_m))
    return units * num_tiles(problem, tile.block_m)


def partial_columns(head_dim_v: int) -> int:
    """Columns of a row of a split's O."""
    return -(-head_dim_v // PARTIAL_COLUMN_MULTIPLE) * PARTIAL_COLUMN_MULTIPLE


def decode_spec(
    problem: Problem, arch: str, split: bool, tile: DecodeTile | None = None
) -> KernelSpec:
    """The kernel for the attention over a cache, with the tile of the table or a given one."""
    tile = tile or decode_tile(problem, arch)
    wgmma: dict[str, int] = {}
    if tile.wgmma:
        arch = WGMMA_ARCH
        columns = _columns(problem.head_dim_v, WGMMA_CHUNK * tile.col_warps) // tile.col_warps
        wgmma = {"wgmma_scores_n": tile.block_n, "wgmma_output_n": columns}
    return KernelSpec.make(
        "flash2/decode.cu",
        "flash2_decode",
        "DecodeParams",
        arch,
        head_dim_qk=problem.head_dim_qk,
        head_dim_v=problem.head_dim_v,
        block_m=tile.block_m,
        block_n=tile.block_n,
        row_warps=tile.row_warps,
        col_warps=tile.col_warps,
        num_teams=tile.num_teams,
        num_threads=tile.num_threads,
        num_stages=tile.num_stages,
        q_in_registers=tile.q_in_registers,
        min_ctas_per_sm=tile.min_ctas_per_sm,
        smem_bytes=tile.smem_bytes(problem.head_dim_qk, problem.head_dim_v, problem.qv),
        vector_bytes=problem.vector_bytes,
        out_vector_bytes=gcd(problem.head_dim_v * ELEM_BYTES, 8),
        wide_row_strides=_wide_row_strides(problem),
        split=split,
        read_once=_reads_keys_once(problem, tile),
        wgmma=tile.wgmma,
        **wgmma,
        **union.constants(problem, "decode"),
    )


def _reads_keys_once(problem: Problem, tile: DecodeTile) -> bool:
    """Whether a key and a value belong to one row tile of one unit each. They are then the first
    to leave L2, which keeps the partial results and the kernel's code: 1 us at 1 x 65536 keys."""
    one_unit_each = problem.qhead_per_khead == problem.qhead_per_vhead
    return one_unit_each and packed_rows(problem) <= tile.block_m


def _wide_row_strides(problem: Problem) -> bool:
    strides = [problem.q_strides[1], problem.k_strides[1], problem.v_strides[1]]
    strides.append(problem.qv_strides[1])
    if problem.page_size > 0:  # slots are rows of pages: LookedUpCopy
        strides += [problem.k_strides[0], problem.v_strides[0]]
    return wide_row_strides(*strides)


def combine_spec(
    arch: str,
    out_dtype: str,
    head_dim_v: int,
    num_splits: int,
    wide_loads: bool,
    wide_stores: bool,
    sink: bool = False,
) -> KernelSpec:
    """The merge of num_splits splits into out of out_dtype ("fp32", "fp16" or "bf16").

    wide_loads: rows of out_partial are aligned to 16 bytes and readable up to a multiple of four
    columns. wide_stores: four columns of a row of out are aligned and belong to it.
    """
    # Few splits: a warp has enough loads of its own in flight. Many: four warps share a row, for
    # the rows are few then.
    warps_per_row = 1 if num_splits <= 8 else 4
    num_warps = 4
    rows = num_warps // warps_per_row
    sums = rows * warps_per_row * -(-head_dim_v // 128) * 512 if warps_per_row > 1 else 0
    return KernelSpec.make(
        "flash2/combine.cu",
        "flash2_combine",
        "CombineParams",
        arch,
        **dtype.element(out_dtype),
        out_f32=out_dtype == "fp32",
        head_dim_v=head_dim_v,
        warps_per_row=warps_per_row,
        num_threads=32 * num_warps,
        min_ctas_per_sm=1,
        smem_bytes=rows * MAX_SPLITS * 4 + sums,
        wide_loads=wide_loads,
        wide_stores=wide_stores,
        sink=sink,
    )
