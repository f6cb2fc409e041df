"""Problem -> KernelSpec for the kernels of this folder. Pure functions; the reason stands beside
each number.

Change tile sizes here. What a tile may be is fixed by `fwd.cu` (its static_asserts), by registers
(below) and by shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flash_attn_interface._common.problem import Problem
from flash_attn_interface._common.spec import KernelSpec

ARCH = "sm_90a"
ELEM_BYTES = 2
WG_ROWS = 64  # query rows of a consumer warpgroup: M of every WGMMA
MAX_WGMMA_N = 256
# Work records and barriers, at the end of `Smem` in fwd.cu.
SMEM_TAIL_BYTES = 512


@dataclass(frozen=True)
class ForwardTile:
    """How `fwd.cu` cuts a problem up."""

    num_mma_warpgroups: int  # consumers, 64 query rows each
    block_n: int  # keys of a tile: a multiple of 16, with dropout of 32
    num_stages: int = 2  # K and V tiles in flight, each
    num_q_buffers: int = 2  # 2: the next tile's first product overlaps the last one of this tile
    ping_pong: bool = False
    swizzle_qk: int = 0  # bytes; 0: the widest without waste
    swizzle_v: int = 0

    def smem_bytes(self, head_dim_qk: int, head_dim_v: int) -> int:
        """Shared memory of `Smem` in fwd.cu."""
        parts = v_split(head_dim_v)
        chunk_qk = (self.swizzle_qk or swizzle_bytes(head_dim_qk)) // ELEM_BYTES
        chunk_v = (self.swizzle_v or swizzle_bytes(head_dim_v)) // ELEM_BYTES
        columns_qk = _round_up(head_dim_qk, chunk_qk)
        columns_o = _round_up(wgmma_pv_n(head_dim_v), chunk_v)
        slices = self.num_q_buffers * self.num_mma_warpgroups * WG_ROWS
        ring = self.num_stages * self.block_n * (columns_qk + parts * columns_o)
        return (slices * max(columns_qk, columns_o) + ring) * ELEM_BYTES + SMEM_TAIL_BYTES


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
# about 25 more, beside 232 (two consumers) or 160 (three): 65536 registers, less what the producer
# keeps. Below its 40 or 32 the producer spills. Measured on an H100: docs/performance/.
_REGISTERS = {2: (40, 232), 3: (32, 160)}

# Three consumers are faster where nothing is masked, larger key tiles where the diagonal cuts.
_TILE_64_128 = ForwardTile(3, 80, num_stages=3)
_CAUSAL_TILE_64_128 = ForwardTile(2, 128, num_stages=3)

# (head_dim_qk, head_dim_v) up to which a tile is meant -> tile. The first row that holds both dims
# is taken, so rows are sorted by what they cost.
_TILES: tuple[tuple[int, int, ForwardTile], ...] = (
    (32, 64, ForwardTile(3, 128, num_stages=3, ping_pong=True)),
    (64, 64, ForwardTile(3, 128, num_stages=3)),  # a third softmax hides behind two products
    (128, 64, ForwardTile(3, 128, num_stages=2)),
    (64, 128, _TILE_64_128),
    (128, 128, ForwardTile(2, 128)),
    (192, 128, ForwardTile(2, 128, num_q_buffers=1)),
    (96, 192, ForwardTile(2, 112, swizzle_qk=64)),
    (128, 192, ForwardTile(2, 96)),
    (128, 256, ForwardTile(2, 80, num_q_buffers=1)),
    (192, 192, ForwardTile(2, 80)),
    (192, 256, ForwardTile(2, 80, num_q_buffers=1)),
    (256, 128, ForwardTile(2, 96, num_q_buffers=1)),
    (256, 192, ForwardTile(2, 80, num_q_buffers=1)),
    (256, 256, ForwardTile(2, 64, num_q_buffers=1)),
    (64, 512, ForwardTile(2, 64, num_q_buffers=1)),  # two warpgroups share 64 rows
)
MAX_HEAD_DIM = 256
MAX_WIDE_V, MAX_QK_OF_WIDE_V = 512, 64


def refuses_head_dims(head_dim_qk: int, head_dim_v: int) -> str | None:
    """Why there is no tile for these head dims; None if there is one."""
    if any(head_dim_qk <= row[0] and head_dim_v <= row[1] for row in _TILES):
        return None
    return (
        f"head dims are limited to ({MAX_HEAD_DIM}, {MAX_HEAD_DIM}), head_dim_v to {MAX_WIDE_V} "
        f"where head_dim_qk is at most {MAX_QK_OF_WIDE_V}"
    )


def forward_tile(problem: Problem) -> ForwardTile:
    """The tile for a problem."""
    for head_dim_qk, head_dim_v, tile in _TILES:
        if problem.head_dim_qk <= head_dim_qk and problem.head_dim_v <= head_dim_v:
            if tile == _TILE_64_128 and problem.causal:
                tile = _CAUSAL_TILE_64_128
            return _with_features(tile, problem)
    raise NotImplementedError(
        f"no forward tile of head dims ({problem.head_dim_qk}, {problem.head_dim_v})"
    )


def _with_features(tile: ForwardTile, problem: Problem) -> ForwardTile:
    """Random numbers, tanh and distances need registers too, so fewer keys at a time."""
    if not (problem.dropout or problem.softcap > 0.0 or problem.alibi or problem.local):
        return tile
    if tile.num_mma_warpgroups == 3:
        tile = replace(tile, num_mma_warpgroups=2)
    if problem.dropout:
        tile = replace(tile, block_n=max(32, tile.block_n // 32 * 32))
    return tile


def forward_spec(problem: Problem, arch: str, tile: ForwardTile | None = None) -> KernelSpec:
    """The kernel for a problem, with the tile of the table or a given one."""
    tile = tile or forward_tile(problem)
    parts = v_split(problem.head_dim_v)
    producer_registers, consumer_registers = _REGISTERS[tile.num_mma_warpgroups]
    return KernelSpec.make(
        "hopper/fwd.cu",
        "hopper_fwd",
        "HopperFwdParams",
        arch,
        bf16=problem.dtype == "bf16",
        head_dim_qk=problem.head_dim_qk,
        head_dim_v=problem.head_dim_v,
        block_m=WG_ROWS * tile.num_mma_warpgroups // parts,
        block_n=tile.block_n,
        num_mma_warpgroups=tile.num_mma_warpgroups,
        num_threads=128 * (1 + tile.num_mma_warpgroups),
        num_stages=tile.num_stages,
        num_q_buffers=tile.num_q_buffers,
        v_split=parts,
        ping_pong=tile.ping_pong,
        swizzle_qk=tile.swizzle_qk or swizzle_bytes(problem.head_dim_qk),
        swizzle_v=tile.swizzle_v or swizzle_bytes(problem.head_dim_v),
        wgmma_qk_n=tile.block_n,
        wgmma_pv_n=wgmma_pv_n(problem.head_dim_v),
        producer_registers=producer_registers,
        consumer_registers=consumer_registers,
        min_ctas_per_sm=1,
        smem_bytes=tile.smem_bytes(problem.head_dim_qk, problem.head_dim_v),
        causal=problem.causal,
        local=problem.local,
        chunk=problem.attention_chunk > 0,
        softcap=problem.softcap > 0.0,
        alibi=problem.alibi,
        prescale=problem.softmax_scale <= 0.0,
        dropout=problem.dropout,
        varlen_q=problem.varlen_q,
        varlen_k=problem.varlen_k,
        ragged_k=problem.varlen_k or problem.has_seqused_k,
    )
