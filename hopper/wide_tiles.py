"""Problem -> KernelSpec of fwd_wide.cu: head_dim_v over 256 beside a head_dim_qk over 64. Pure
functions; the reason stands beside each number.

Called by `fwd_tiles.py`. The memory map is `wide_layout.cuh`.
"""

from __future__ import annotations

from dataclasses import dataclass

from flash_attn_interface._common.ask.problem import Problem
from flash_attn_interface._common.features import union
from flash_attn_interface._common.runtime import arch as arch_table
from flash_attn_interface._common.runtime.spec import KernelSpec

from . import gqa_packing
from .gqa_packing import WG_ROWS

SOURCE, ENTRY = "hopper/fwd_wide.cu", "hopper_fwd_wide"
MAX_HEAD_DIM_QK, MAX_HEAD_DIM_V = 576, 512
# fwd.cu has more rows in a CTA, or makes the scores of a narrow Q twice.
MIN_HEAD_DIM_QK, MIN_HEAD_DIM_V = 65, 257

BLOCK_N = 64
CHUNK_COLUMNS = 64  # of the 128-byte swizzle
BOX_BYTES = 64 * 128  # of every load
K_PIECE_BYTES = 2 * BOX_BYTES
RECORD_BYTES = 64 * BLOCK_N * 2 + 64 * 4  # P, and a factor for each row
NUM_RECORDS = 2
# Work records and barriers, at the end of `Smem` in wide_layout.cuh.
SMEM_TAIL_BYTES = 1024
MAX_STAGES_K = 8

# Columns of O in a warpgroup -> columns of one product, registers of a thread that loads, with
# scores, with O: 512 in all, in eights. O takes half of the columns; with 168 beside 256 of them
# ptxas makes products wait for each other (C7512), with 24 for the loads it spills.
_REGISTERS = {256: (128, 40, 120, 176), 192: (192, 40, 136, 168)}


@dataclass(frozen=True)
class WideTile:
    """Pieces of K, and of each half of V, that are on their way or in use."""

    num_stages_k: int
    num_stages_v: int


def serves(head_dim_qk: int, head_dim_v: int) -> bool:
    """Whether fwd_wide.cu is the kernel for these head dims."""
    return (
        MIN_HEAD_DIM_QK <= head_dim_qk <= MAX_HEAD_DIM_QK
        and MIN_HEAD_DIM_V <= head_dim_v <= MAX_HEAD_DIM_V
    )


def half_columns(head_dim_v: int) -> int:
    """Columns of O in one of two warpgroups: whole chunks."""
    return -(-head_dim_v // (2 * CHUNK_COLUMNS)) * CHUNK_COLUMNS


def v_piece_bytes(head_dim_v: int) -> int:
    """Of 64 keys and the columns of one product."""
    part = _REGISTERS[half_columns(head_dim_v)][0]
    return part // CHUNK_COLUMNS * BOX_BYTES


def smem_bytes(tile: WideTile, head_dim_qk: int, head_dim_v: int) -> int:
    """Shared memory of `Smem` in wide_layout.cuh."""
    q = -(-head_dim_qk // CHUNK_COLUMNS) * BOX_BYTES
    rings = tile.num_stages_k * K_PIECE_BYTES + 2 * tile.num_stages_v * v_piece_bytes(head_dim_v)
    return q + rings + NUM_RECORDS * RECORD_BYTES + SMEM_TAIL_BYTES


def wide_tile(head_dim_qk: int, head_dim_v: int, arch: str) -> WideTile:
    """Three pieces of each half of V if four of K fit beside them, else two; the rest is K's.

    Loads take about 1000 cycles, in which an SM can use 64 KB: what a ring has beside the pieces
    in use should come near that.
    """
    available = arch_table.limits(arch).max_smem_per_cta
    tiles = [
        WideTile(stages_k, stages_v)
        for stages_v, least in ((3, 4), (2, 2))
        for stages_k in range(MAX_STAGES_K, least - 1, -1)
    ]
    return next(t for t in tiles if smem_bytes(t, head_dim_qk, head_dim_v) <= available)


def forward_spec(problem: Problem, arch: str) -> KernelSpec:
    """The kernel for a problem that it `serves`."""
    p = problem
    tile = wide_tile(p.head_dim_qk, p.head_dim_v, arch)
    group = gqa_packing.group_size(p, 1)
    part, loads, scores, output = _REGISTERS[half_columns(p.head_dim_v)]
    return KernelSpec.make(
        SOURCE,
        ENTRY,
        "HopperFwdParams",
        arch,
        head_dim_qk=p.head_dim_qk,
        head_dim_v=p.head_dim_v,
        block_m=WG_ROWS,
        query_rows=WG_ROWS // group,
        gqa_group=group,
        block_n=BLOCK_N,
        num_mma_warpgroups=2,  # with O; they share its columns
        v_split=2,
        num_threads=512,
        num_stages_k=tile.num_stages_k,
        num_stages_v=tile.num_stages_v,
        swizzle_qk=128,
        swizzle_v=128,
        wgmma_qk_n=BLOCK_N,
        wgmma_pv_n=part,
        producer_registers=loads,
        score_registers=scores,
        output_registers=output,
        min_ctas_per_sm=1,
        smem_bytes=smem_bytes(tile, p.head_dim_qk, p.head_dim_v),
        **union.constants(p, "forward"),
        ragged_k=p.varlen_k or p.has_seqused_k,
    )
