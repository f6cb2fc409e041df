"""Problem -> KernelSpec for the kernels of this folder. Pure functions; the reason stands beside
each number.

Change tile sizes here. What a tile may be is fixed by `fwd.cu` (its static_asserts), by registers
(below) and by shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flash_attn_interface._common.ask.problem import Problem
from flash_attn_interface._common.features import union
from flash_attn_interface._common.runtime import arch as arch_table
from flash_attn_interface._common.runtime.spec import KernelSpec
from flash_attn_interface._common.tiles import tuned_tiles

from . import gqa_packing, wide_tiles

ARCH = "sm_90a"
ELEM_BYTES = 2
WG_ROWS = gqa_packing.WG_ROWS  # rows of a consumer warpgroup: M of every WGMMA
MAX_WGMMA_N = 256
SMS = 132  # of an H100 SXM
# Work records and barriers, at the end of `Smem` in fwd.cu.
SMEM_TAIL_BYTES = 1024


@dataclass(frozen=True)
class ForwardTile:
    """How `fwd.cu` cuts a problem up."""

    num_mma_warpgroups: int  # consumers, 64 query rows each
    block_n: int  # keys of a tile: a multiple of 16, with dropout of 32
    num_stages: int = 2  # K and V tiles in flight, each
    num_q_buffers: int = 2  # 2: the next tile's first product overlaps the last one of this tile
    ping_pong: bool = False  # consumers issue their products in turn
    swizzle_qk: int = 0  # bytes; 0: the widest without waste
    swizzle_v: int = 0
    p_in_smem: bool = False  # products take P from shared memory: frees block_n / 4 registers

    def smem_bytes(self, head_dim_qk: int, head_dim_v: int) -> int:
        """Shared memory of `Smem` in fwd.cu."""
        parts = v_split(head_dim_v)
        chunk_qk = (self.swizzle_qk or swizzle_bytes(head_dim_qk)) // ELEM_BYTES
        chunk_v = (self.swizzle_v or swizzle_bytes(head_dim_v)) // ELEM_BYTES
        columns_qk = _round_up(head_dim_qk, chunk_qk)
        columns_o = _round_up(wgmma_pv_n(head_dim_v), chunk_v)
        slices = self.num_q_buffers * self.num_mma_warpgroups * WG_ROWS
        ring = self.num_stages * self.block_n * (columns_qk + parts * columns_o)
        p_columns = _round_up(self.block_n, 64) if self.p_in_smem else 0
        p = self.num_mma_warpgroups * WG_ROWS * p_columns
        o_over_p = self.num_q_buffers == 1 and p_columns >= columns_o
        slice_columns = columns_qk if o_over_p else max(columns_qk, columns_o)
        return (slices * slice_columns + ring + p) * ELEM_BYTES + SMEM_TAIL_BYTES


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def swizzle_bytes(head_dim: int) -> int:
    """Bytes of a row in one chunk of columns: 128, less where that would mostly hold zeros.

    Dims such as 80 and 96 keep 128: shared memory holds their zero columns, products skip them.
    """
    columns = _round_up(head_dim, 16)
    return 32 if columns == 16 else 64 if columns == 32 else 128


def v_split(head_dim_v: int) -> int:
    """Warpgroups that share the columns of one O: a warpgroup can hold 64 x 256 of it."""
    return 1 if head_dim_v <= MAX_WGMMA_N else 2


def wgmma_pv_n(head_dim_v: int) -> int:
    """Columns of O in a warpgroup."""
    if v_split(head_dim_v) == 1:
        return _round_up(head_dim_v, 16)
    return _round_up(-(-head_dim_v // 2), 64)  # whole chunks


# A thread of a consumer holds head_dim_v / 2 registers of O, block_n / 2 of S, block_n / 4 of P and
# about 25 more, beside 232 (two consumers), 160 (three) or 112 (four): 65536 registers, in eights a
# thread, less what the producer keeps. Below its 40 or 32 the producer spills. Measured on an H100:
# docs/performance/.
_REGISTERS = {2: (40, 232), 3: (32, 160), 4: (32, 112)}
CONSUMER_REGISTERS = {consumers: registers for consumers, (_, registers) in _REGISTERS.items()}

# Tiles by length: (from this many keys, tile), shortest first. A CTA of three consumers reads K and
# V once for 192 rows, faster where the launch has many tiles; two lose less to the diagonal
# and to a sequence's last rows.
ByLength = tuple[tuple[int, ForwardTile], ...]

_THREE_64 = ForwardTile(3, 128, num_stages=3)  # a third softmax hides behind two products
_TURNS_64 = replace(_THREE_64, ping_pong=True)  # 2k tokens 468 -> 475, causal 16k 521 -> 547
# TFLOP/s at 8k and 16k: 511 and 536, with 128 keys 494 and 512, at 2k 465 against 468; causal 536
# and 547 against 526 and 532 (H200), at 4k 497 against 500. A second Q buffer gains nothing, and
# registers spill.
_LONG_64 = ForwardTile(3, 192, num_q_buffers=1, ping_pong=True, p_in_smem=True)
_FOUR_64 = ForwardTile(4, 64, num_stages=4)  # the diagonal cuts off less of 64 keys
# O of 128 columns and S of 128 keys leave three consumers no registers for P. TFLOP/s at 1k, 4k
# and 16k against the best tile with P in registers: (64,128) 542, 607, 641 against 504, 561, 603,
# causal 407, 582, 642 against 405, 522, 563; (128,128) 580, 660, 704 against 569, 637, 678, causal
# 437, 649, 688 against 429, 609, 651. Ping-pong is worth 3-7 % of that when causal, else nothing.
_THREE_128 = ForwardTile(3, 128, num_q_buffers=1, ping_pong=True, p_in_smem=True)
_TWO_64_128, _SHORT_64_128 = ForwardTile(2, 128, num_stages=3), ForwardTile(3, 64, num_stages=4)
_TWO_128 = ForwardTile(2, 128)
_SHORT_192_128, _TWO_192_128 = ForwardTile(2, 64, num_stages=3), ForwardTile(2, 96)
_WIDE_192_128 = ForwardTile(2, 128, num_q_buffers=1)
_SHORT_96_192, _TWO_96_192 = ForwardTile(2, 64, num_stages=3), ForwardTile(2, 96)
_WIDE_96_192 = ForwardTile(2, 112, swizzle_qk=64)
_TWO_128_256, _WIDE_128_256 = ForwardTile(2, 64), ForwardTile(2, 80, num_q_buffers=1)


def _both(*by_length: tuple[int, ForwardTile]) -> tuple[ByLength, ByLength]:
    return by_length, by_length


def _always(tile: ForwardTile) -> tuple[ByLength, ByLength]:
    return _both((0, tile))


# (head_dim_qk, head_dim_v) up to which a row is meant -> tiles not causal, tiles causal. The first
# row that holds both dims is taken, so rows are sorted by what they cost.
_TILES: tuple[tuple[int, int, tuple[ByLength, ByLength]], ...] = (
    (32, 64, (((0, _TURNS_64),), ((0, _FOUR_64), (6144, _TURNS_64)))),
    (
        64,
        64,
        (
            ((0, _THREE_64), (768, _TURNS_64), (6144, _LONG_64)),
            ((0, _FOUR_64), (3072, _TURNS_64), (6144, _LONG_64)),
        ),
    ),
    # 16k tokens, ping-pong or not: (112,48) 652 and 599, causal 648 and 627 TFLOP/s.
    (128, 64, _always(ForwardTile(3, 128, ping_pong=True))),
    (
        64,
        128,
        (
            ((0, _TWO_64_128), (768, _THREE_128)),
            ((0, _SHORT_64_128), (768, _THREE_128)),
        ),
    ),
    # (80, 80), 4k tokens: 522 TFLOP/s, causal 462; with the next row's tiles 495 and 449.
    (80, 80, _always(ForwardTile(3, 112))),
    (128, 128, _both((0, _TWO_128), (768, _THREE_128))),
    (
        192,
        128,
        (
            ((0, _WIDE_192_128),),
            ((0, _SHORT_192_128), (1536, _TWO_192_128), (3072, _WIDE_192_128)),
        ),
    ),
    (
        96,
        192,
        (
            ((0, _TWO_96_192), (1536, _WIDE_96_192)),
            ((0, _SHORT_96_192), (1536, _WIDE_96_192)),
        ),
    ),
    (128, 192, _always(ForwardTile(2, 96))),
    (128, 256, (((0, _WIDE_128_256),), ((0, _TWO_128_256), (3072, _WIDE_128_256)))),
    (192, 192, _always(ForwardTile(2, 80))),
    (192, 256, _always(ForwardTile(2, 80, num_q_buffers=1))),
    (256, 128, _always(ForwardTile(2, 96, num_q_buffers=1))),
    (256, 192, _always(ForwardTile(2, 80, num_q_buffers=1))),
    (256, 256, _always(ForwardTile(2, 64, num_q_buffers=1))),
    # Two warpgroups share 64 rows.
    (64, 512, _always(ForwardTile(2, 64, num_q_buffers=1))),
    # As many keys as fit beside 128 rows of a wide Q, in two stages where those hold 64 each. Not
    # measured yet.
    (384, 128, _always(ForwardTile(2, 64, num_q_buffers=1))),
    (384, 256, _always(ForwardTile(2, 64, num_stages=1, num_q_buffers=1))),
    (512, 64, _always(ForwardTile(2, 80, num_stages=1, num_q_buffers=1))),
    (512, 128, _always(ForwardTile(2, 64, num_stages=1, num_q_buffers=1))),
    (576, 64, _always(ForwardTile(2, 64, num_stages=1, num_q_buffers=1))),
    (576, 256, _always(ForwardTile(2, 48, num_stages=1, num_q_buffers=1))),
)


def refuses_head_dims(head_dim_qk: int, head_dim_v: int) -> str | None:
    """Why there is no tile for these head dims; None if there is one."""
    if any(head_dim_qk <= row[0] and head_dim_v <= row[1] for row in _TILES):
        return None
    if wide_tiles.serves(head_dim_qk, head_dim_v):
        return None
    limits = (wide_tiles.MAX_HEAD_DIM_QK, wide_tiles.MAX_HEAD_DIM_V)
    return f"head dims are limited to {limits}"


def forward_tile(problem: Problem) -> ForwardTile:
    """The tile for a problem."""
    for head_dim_qk, head_dim_v, (full, causal) in _TILES:
        if problem.head_dim_qk <= head_dim_qk and problem.head_dim_v <= head_dim_v:
            if _needs_registers(problem):
                return _with_features(head_dim_qk, head_dim_v, full[0][1], problem)
            by_length = full[:1] if problem.local else causal if problem.causal else full
            tile = [tile for keys, tile in by_length if problem.seqlen_k >= keys][-1]
            if tile.p_in_smem and (problem.attention_chunk or _few_tiles(tile, problem)):
                return by_length[0][1]
            return tile
    raise NotImplementedError(
        f"no tile of fwd.cu for head dims ({problem.head_dim_qk}, {problem.head_dim_v})"
    )


def _few_tiles(tile: ForwardTile, problem: Problem) -> bool:
    """Whether the last round of CTAs, partly idle, weighs more than what a taller tile saves."""
    rows = WG_ROWS * tile.num_mma_warpgroups // v_split(problem.head_dim_v)
    return problem.num_heads_q * problem.total_q < 3 * SMS * rows


def _needs_registers(problem: Problem) -> bool:
    """For random numbers, tanh or distances."""
    return problem.dropout or problem.softcap > 0.0 or problem.alibi


# Rows of _TILES with tiles of their own for softcap or ALiBi. Three consumers have registers
# enough: at 16k tokens on an H100 softcap 319 TFLOP/s against 281 at 64, causal 476 against 433 at
# 128; ALiBi causal 571 against 521 at 128. Beside 256 columns of O, 80 keys would spill.
_WITH_SCORES = {
    (64, 64): ForwardTile(3, 96, num_stages=3),
    (128, 128): ForwardTile(3, 80),
    (128, 256): _TWO_128_256,
}


def _with_features(
    head_dim_qk: int, head_dim_v: int, tile: ForwardTile, problem: Problem
) -> ForwardTile:
    """Two consumers have more registers each; dropout's patches are 32 keys wide."""
    one = not problem.dropout and not (problem.alibi and problem.softcap > 0.0)
    if one and (head_dim_qk, head_dim_v) in _WITH_SCORES:
        return _WITH_SCORES[head_dim_qk, head_dim_v]
    tile = replace(tile, num_mma_warpgroups=2)
    if problem.dropout:
        tile = replace(tile, block_n=max(32, tile.block_n // 32 * 32))
    return tile


def refuses_tile(tile: ForwardTile, problem: Problem, arch: str) -> str | None:
    """Why `fwd.cu` cannot be built so, or not be launched; None if it can."""
    if wide_tiles.serves(problem.head_dim_qk, problem.head_dim_v):
        return f"{wide_tiles.SOURCE} serves these head dims"
    parts = v_split(problem.head_dim_v)
    if tile.num_mma_warpgroups not in _REGISTERS or tile.num_mma_warpgroups % parts:
        return f"num_mma_warpgroups={tile.num_mma_warpgroups}: 2, 3 or 4, even for a wide v"
    multiple = 32 if problem.dropout else 16
    if not multiple <= tile.block_n <= MAX_WGMMA_N or tile.block_n % multiple:
        return f"block_n={tile.block_n} is not a multiple of {multiple} up to {MAX_WGMMA_N}"
    if not 1 <= tile.num_stages <= 4 or tile.num_q_buffers not in (1, 2):
        return "num_stages is 1 to 4, num_q_buffers 1 or 2"
    if not {tile.swizzle_qk, tile.swizzle_v} <= {0, 32, 64, 128}:
        return "swizzle_qk and swizzle_v are 0 (the widest without waste), 32, 64 or 128"
    swizzles = {tile.swizzle_qk or swizzle_bytes(problem.head_dim_qk)}
    swizzles.add(tile.swizzle_v or swizzle_bytes(problem.head_dim_v))
    if tile.p_in_smem and 32 in swizzles and tile.num_stages * tile.block_n % 32:
        return "p_in_smem needs rings of whole KiB, with a swizzle of 32 bytes an even number of 16"
    if parts == 2 and wgmma_pv_n(problem.head_dim_v) % (tile.swizzle_v // ELEM_BYTES or 64):
        return "a wide v needs whole chunks of columns in each warpgroup"
    smem = tile.smem_bytes(problem.head_dim_qk, problem.head_dim_v)
    available = arch_table.limits(arch).max_smem_per_cta
    if smem > available:
        return f"it needs {smem} bytes of shared memory, a CTA has {available}"
    return None


def tuned_tile(problem: Problem, arch: str, gpu: str = "") -> ForwardTile | None:
    """What a table of the autotuner holds for the problem, if any does."""
    key = tuned_tiles.key("hopper", "fwd", problem)
    return tuned_tiles.tile(ForwardTile, key, arch, gpu, lambda t: refuses_tile(t, problem, arch))


def forward_spec(
    problem: Problem, arch: str, tile: ForwardTile | None = None, gpu: str = ""
) -> KernelSpec:
    """The kernel for a problem, with a given tile or else the tuned one, or else `forward_tile`.
    gpu: the device's model, as `Target.gpu`.
    """
    if tile is None and wide_tiles.serves(problem.head_dim_qk, problem.head_dim_v):
        return wide_tiles.forward_spec(problem, arch)
    tile = tile or tuned_tile(problem, arch, gpu) or forward_tile(problem)
    parts = v_split(problem.head_dim_v)
    slices = tile.num_mma_warpgroups // parts
    group = gqa_packing.group_size(problem, slices)
    producer_registers, consumer_registers = _REGISTERS[tile.num_mma_warpgroups]
    return KernelSpec.make(
        "hopper/fwd.cu",
        "hopper_fwd",
        "HopperFwdParams",
        arch,
        head_dim_qk=problem.head_dim_qk,
        head_dim_v=problem.head_dim_v,
        block_m=WG_ROWS * slices,
        query_rows=WG_ROWS // group * slices,
        gqa_group=group,
        block_n=tile.block_n,
        num_mma_warpgroups=tile.num_mma_warpgroups,
        num_threads=128 * (1 + tile.num_mma_warpgroups),
        num_stages=tile.num_stages,
        num_q_buffers=tile.num_q_buffers,
        v_split=parts,
        ping_pong=tile.ping_pong,
        p_in_smem=tile.p_in_smem,
        swizzle_qk=tile.swizzle_qk or swizzle_bytes(problem.head_dim_qk),
        swizzle_v=tile.swizzle_v or swizzle_bytes(problem.head_dim_v),
        wgmma_qk_n=tile.block_n,
        wgmma_pv_n=wgmma_pv_n(problem.head_dim_v),
        producer_registers=producer_registers,
        consumer_registers=consumer_registers,
        min_ctas_per_sm=1,
        smem_bytes=tile.smem_bytes(problem.head_dim_qk, problem.head_dim_v),
        **union.constants(problem, "forward"),
        ragged_k=problem.varlen_k or problem.has_seqused_k,
    )
