"""Who merges the splits of a decode launch: its own CTAs, or one of combine.cu. Pure functions.

Called by `decode.py`. The number of splits: `decode_tiles.py`. The merge: `decode_output.cuh`.
"""

from __future__ import annotations

from .._common.ask.problem import Problem
from .decode_tiles import DecodeTile, expected_ctas, packed_rows, partial_columns

# The last CTAs of a tile to finish merge its splits: as many as get this much to read each, for
# which an SM takes 0.2 us.
BYTES_OF_A_MERGER = 16 * 1024
MAX_MERGERS = 32  # bits of a share, decode_output.cuh
# What one of them may have to read in 2 to 3 us, by the 64 bytes a cycle that an SM gets from L2.
# More are merged by a launch of its own, which has many CTAs.
MAX_BYTES_TO_MERGE = 256 * 1024


def num_mergers(problem: Problem, tile: DecodeTile, num_splits: int, num_sms: int) -> int:
    """CTAs among which the merge of a tile's splits is shared out by rows: the last to finish.

    They wait for each other, which only pays if all CTAs run at the same time.
    """
    if expected_ctas(problem, tile) * num_splits > num_sms * tile.min_ctas_per_sm:
        return 1
    most = min(num_splits, _tile_rows(problem, tile), MAX_MERGERS)
    return max(1, min(most, _merge_bytes(problem, tile, num_splits) // BYTES_OF_A_MERGER))


def merges_in_place(problem: Problem, tile: DecodeTile, num_splits: int, num_sms: int) -> bool:
    """Whether decode.cu merges the splits itself, rather than combine.cu."""
    mergers = num_mergers(problem, tile, num_splits, num_sms)
    return _merge_bytes(problem, tile, num_splits) <= MAX_BYTES_TO_MERGE * mergers


def _merge_bytes(problem: Problem, tile: DecodeTile, num_splits: int) -> int:
    return _tile_rows(problem, tile) * num_splits * 4 * partial_columns(problem.head_dim_v)


def _tile_rows(problem: Problem, tile: DecodeTile) -> int:
    return min(tile.block_m, packed_rows(problem))
