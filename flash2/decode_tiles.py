"""Problem -> KernelSpecs of decode.cu and combine.cu, and the number of splits. Pure functions; the
reason stands beside each number.

Change tile sizes and split rules here. What a tile may be is fixed by `decode.cu` (its
static_asserts) and by the arch's limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

from .._common import arch as arch_table
from .._common import tuned_tiles
from .._common.problem import Problem, Target
from .._common.spec import KernelSpec
from .tiles import COLUMN_MULTIPLE, ELEM_BYTES, ROW_PAD_BYTES

# What the merges have room for (kMaxSplits), and what callers may ask for.
MAX_SPLITS = 256
# Enough for a single sequence on the largest GPUs, less those splits that would be too short.
MAX_CHOSEN_SPLITS = 192
MIN_KEYS_PER_SPLIT = 128
# A CTA takes about 2.5 us from its start to its first key and from its last key to its end, and the
# merge of splits about as long: time in which an SM reads this much of the cache (H100).
OVERHEAD_BYTES = 64 * 1024
# As few splits as are this near to the best number. The estimate is no better than that.
SPLIT_TOLERANCE = 1.05

# Bytes of splits that the last CTA of a tile should read in 2 to 3 us, by the 64 bytes a cycle that
# an SM gets from L2. More are merged by a launch of its own, which has many CTAs.
MAX_BYTES_TO_MERGE = 256 * 1024

# Bytes that a CTA has under way while it works on a tile. More gained nothing on an H100, where one
# CTA on each SM comes to 4 MB: 3 TB/s for 1.4 us. GPUs whose SMs have little shared memory read
# less per SM, too: a seventh of it is enough for them, and leaves room for two CTAs.
BYTES_IN_FLIGHT = 32 * 1024
SMEM_PER_BYTE_IN_FLIGHT = 7

# decode.cu, hand_over(): O is padded against bank conflicts; a maximum and a sum per row.
MERGE_PAD_BYTES = 32
MERGE_STAT_BYTES = 8
# Lanes hold vectors of four columns when they merge splits.
PARTIAL_COLUMN_MULTIPLE = 4


@dataclass(frozen=True)
class DecodeTile:
    """How `decode.cu` cuts a problem up. Teams of row_warps * col_warps warps share keys."""

    block_m: int  # packed query rows: 16, 32 or 64
    block_n: int  # keys of a team's tile: 16 or 32
    row_warps: int  # that divide block_m
    num_teams: int  # they divide the keys
    num_stages: int  # tiles in a team's ring, at least 2
    q_in_registers: bool = True
    min_ctas_per_sm: int = 1
    col_warps: int = 1  # that divide the columns of V; each computes all scores of its rows

    @property
    def num_threads(self) -> int:
        return 32 * self.row_warps * self.col_warps * self.num_teams

    def smem_bytes(self, head_dim_qk: int, head_dim_v: int) -> int:
        """Shared memory of `Smem` in decode.cu."""
        columns_v = _columns(head_dim_v, self.col_warps)
        row_qk = _columns(head_dim_qk) * ELEM_BYTES + ROW_PAD_BYTES
        row_v = columns_v * ELEM_BYTES + ROW_PAD_BYTES
        rings = self.num_teams * self.num_stages * self.block_n * (row_qk + row_v)
        merge_row = columns_v * 4 + MERGE_PAD_BYTES + MERGE_STAT_BYTES
        split_weights = self.num_threads // 32 * MAX_SPLITS * 4
        of_teams = max(self.block_m * row_qk + rings, self.num_teams * self.block_m * merge_row)
        return max(of_teams, split_weights)

    def bytes_in_flight(self, head_dim_qk: int, head_dim_v: int) -> int:
        """Keys and values on their way to a CTA while it works on others."""
        keys = (self.num_stages - 1) * self.num_teams * self.block_n
        return keys * (head_dim_qk + head_dim_v) * ELEM_BYTES


def _columns(head_dim: int, warps: int = 1) -> int:
    multiple = COLUMN_MULTIPLE * warps
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


def _candidates(problem: Problem) -> Iterator[DecodeTile]:
    """Tiles by preference, if they fit the arch.

    As few rows as there are: each row tile reads all keys. Up to 16 rows four warps with keys of
    their own, and two CTAs on an SM, for grids of more CTAs than SMs; with more rows, which warps
    share the keys of, eight warps and one CTA. Then the fewest stages that have BYTES_IN_FLIGHT
    under way, with tiles of 16 keys (32 for eight warps).

    Measured on an H100, bf16, head dims (128, 128), (64, 128), (192, 128), 32 query heads and 8, 4
    or 1 key heads, 16 x 8192, 1 x 65536, 64 x 8192 and 128 x 2048 keys: these are within 1.5% of
    the best of 14 (9 with 32 rows) tiles in each. Three stages instead of two lose 1 to 2%; with 32
    rows, four warps and two CTAs 2 to 5%.
    """
    rows = packed_rows(problem)
    row_warps = 1 if rows <= 16 else 2 if rows <= 32 else 4
    # A warp has 255 registers a thread. Q takes head_dim_qk / 4 of them, O head_dim_v / 2: too much
    # for one warp with the widest V.
    col_warps = 2 if problem.head_dim_v > 192 else 1
    q_in_registers = problem.head_dim_qk + 2 * problem.head_dim_v // col_warps <= 512
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
    best: DecodeTile | None = None
    most = 0
    for tile in _candidates(problem):
        fitting = limits.max_ctas_per_sm(tile.smem_bytes(*dims), tile.num_threads)
        in_flight = tile.bytes_in_flight(*dims)
        if fitting >= tile.min_ctas_per_sm and in_flight > most:
            best, most = tile, in_flight
            if in_flight >= enough:
                break
    if best is None:
        raise NotImplementedError(f"no decode tile of head dims {dims} fits {limits.name}")
    return best


def refuses_tile(tile: DecodeTile, problem: Problem, arch: str) -> str | None:
    """Why `decode.cu` cannot be built so, or not be launched on the arch; None if it can."""
    if tile.row_warps not in (1, 2, 4) or tile.block_m not in (
        16 * tile.row_warps,
        32 * tile.row_warps,
    ):
        return f"block_m={tile.block_m} is not 16 or 32 rows for each of {tile.row_warps} warps"
    if tile.block_n not in (16, 32) or not 2 <= tile.num_stages <= 8:
        return "block_n is 16 or 32, num_stages 2 to 8"
    if tile.col_warps not in (1, 2) or not 1 <= tile.num_threads // 32 <= 8:
        return f"{tile.num_threads // 32} warps, {tile.col_warps} in a row: 1 to 8, and 1 or 2"
    smem = tile.smem_bytes(problem.head_dim_qk, problem.head_dim_v)
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


def _visible_keys(problem: Problem) -> int:
    """Keys that one row tile may see: fewer than the capacity behind a window or chunk."""
    keys = problem.seqlen_k
    if problem.window_left >= 0 and problem.window_right >= 0:
        keys = min(keys, problem.window_left + problem.window_right + problem.seqlen_q)
    if problem.attention_chunk > 0:
        keys = min(keys, problem.attention_chunk + problem.seqlen_q)
    return keys


def _expected_ctas(problem: Problem, tile: DecodeTile) -> int:
    """CTAs with work, without splits. Of ragged queries, at least one tile for each sequence."""
    units = problem.num_heads_q // heads_per_unit(problem)
    if problem.varlen_q:
        rows = problem.total_q * heads_per_unit(problem)
        return units * max(problem.batch, -(-rows // tile.block_m))
    return units * num_tiles(problem, tile.block_m)


def choose_num_splits(problem: Problem, tile: DecodeTile, num_sms: int) -> int:
    """Parts of the keys that CTAs work on at the same time: enough to fill the machine.

    A function of the capacity, never of the lengths, which are on the device. Without splits each
    (sequence, unit, row tile) is one CTA.

    The estimate: reading the cache is all that counts, and one CTA on an SM reads as fast as two.
    CTAs run in waves; the last one reads more slowly if it leaves SMs without any. Each wave, and
    the merge of splits, also takes a constant time. On an H100 this picks the best number of those
    measured wherever `_candidates` says (16 x 8192: 1, 2, 8 for 8, 4, 1 key heads; 1 x 65536: 16,
    32, 123), within 1%.
    """
    ctas = _expected_ctas(problem, tile)
    keys = _visible_keys(problem)
    overhead = OVERHEAD_BYTES / ((problem.head_dim_qk + problem.head_dim_v) * ELEM_BYTES)

    def estimate(splits: int) -> float:
        full_waves, rest = divmod(ctas * splits, num_sms * tile.min_ctas_per_sm)
        reading = full_waves * tile.min_ctas_per_sm + (max(1.0, rest / num_sms) if rest else 0.0)
        return reading * keys / splits + (full_waves + (rest > 0) + (splits > 1)) * overhead

    most = max(1, min(MAX_CHOSEN_SPLITS, keys // MIN_KEYS_PER_SPLIT))
    estimates = [estimate(splits) for splits in range(1, most + 1)]
    enough = SPLIT_TOLERANCE * min(estimates)
    return next(i for i, time in enumerate(estimates, 1) if time <= enough)


def merges_in_place(problem: Problem, tile: DecodeTile, num_splits: int) -> bool:
    """Whether decode.cu merges the splits itself, rather than combine.cu."""
    rows = min(tile.block_m, packed_rows(problem))
    return rows * num_splits * 4 * partial_columns(problem.head_dim_v) <= MAX_BYTES_TO_MERGE


def partial_columns(head_dim_v: int) -> int:
    """Columns of a row of a split's O."""
    return -(-head_dim_v // PARTIAL_COLUMN_MULTIPLE) * PARTIAL_COLUMN_MULTIPLE


def decode_spec(
    problem: Problem, arch: str, split: bool, tile: DecodeTile | None = None
) -> KernelSpec:
    """The kernel for the attention over a cache, with the tile of the table or a given one."""
    tile = tile or decode_tile(problem, arch)
    return KernelSpec.make(
        "flash2/decode.cu",
        "flash2_decode",
        "DecodeParams",
        arch,
        bf16=problem.dtype == "bf16",
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
        smem_bytes=tile.smem_bytes(problem.head_dim_qk, problem.head_dim_v),
        vector_bytes=problem.vector_bytes,
        out_vector_bytes=gcd(problem.head_dim_v * ELEM_BYTES, 8),
        wide_row_strides=_wide_row_strides(problem),
        causal=problem.causal,
        local=problem.local,
        chunk=problem.attention_chunk > 0,
        softcap=problem.softcap > 0.0,
        alibi=problem.alibi,
        prescale=problem.softmax_scale <= 0.0,
        varlen_q=problem.varlen_q,
        varlen_k=False,
        paged=problem.page_size > 0,
        cache_batch_idx=problem.cache_batch_idx,
        leftpad_k=problem.leftpad_k,
        split=split,
    )


def _wide_row_strides(problem: Problem) -> bool:
    strides = [problem.q_strides[1], problem.k_strides[1], problem.v_strides[1]]
    if problem.page_size > 0:
        strides += [problem.k_strides[0], problem.v_strides[0]]
    return max(strides) * ELEM_BYTES >= 2**31


def combine_spec(
    arch: str, out_dtype: str, head_dim_v: int, num_splits: int, wide_loads: bool, wide_stores: bool
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
        bf16=out_dtype == "bf16",
        out_f32=out_dtype == "fp32",
        head_dim_v=head_dim_v,
        warps_per_row=warps_per_row,
        num_threads=32 * num_warps,
        min_ctas_per_sm=1,
        smem_bytes=rows * MAX_SPLITS * 4 + sums,
        wide_loads=wide_loads,
        wide_stores=wide_stores,
    )
