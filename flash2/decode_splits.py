"""How many parts the keys of a decode launch are divided into. Pure functions; the reason stands
beside each number.

Called by `decode.py`. Tiles: `decode_tiles.py`. Who merges the parts: `decode_merge.py`.
"""

from __future__ import annotations

from .._common.ask.problem import Problem
from .decode_tiles import DecodeTile, expected_ctas
from .fwd_tiles import ELEM_BYTES

# Enough for a single sequence on the largest GPUs, less those splits that would be too short.
MAX_CHOSEN_SPLITS = 192
MIN_KEYS_PER_SPLIT = 128
# A CTA takes about 2.5 us from its start to its first key and from its last key to its end, and the
# merge of splits about as long: time in which an SM reads this much of the cache (H100).
OVERHEAD_BYTES = 64 * 1024
# Keys of a paged split from which a CTA alone on an SM, which waits for page numbers, gets a second
# one beside it (H200, 8 key heads: 16 x 8192 keys 128 us against 124, 1 x 65536 71 against 68).
MIN_KEYS_OF_SHARED_SM = 1024
# As few splits as are this near to the best number. The estimate is no better than that.
SPLIT_TOLERANCE = 1.05


def _visible_keys(problem: Problem) -> int:
    """Keys that one row tile may see: fewer than the capacity behind a window or chunk."""
    keys = problem.seqlen_k
    if problem.window_left >= 0 and problem.window_right >= 0:
        keys = min(keys, problem.window_left + problem.window_right + problem.seqlen_q)
    if problem.attention_chunk > 0:
        keys = min(keys, problem.attention_chunk + problem.seqlen_q)
    return keys


def choose_num_splits(problem: Problem, tile: DecodeTile, num_sms: int) -> int:
    """Parts of the keys that CTAs work on at the same time: enough to fill the machine.

    A function of the capacity, never of the lengths, which are on the device. Without splits each
    (sequence, unit, row tile) is one CTA.

    The estimate: reading the cache is all that counts, and one CTA on an SM reads as fast as two.
    CTAs run in waves; the last one reads more slowly if it leaves SMs without any. Each wave, and
    the merge of splits, also takes a constant time. On an H100 this picks the best number of those
    measured wherever `_candidates` says (16 x 8192: 1, 2, 8 for 8, 4, 1 key heads; 1 x 65536: 16,
    32, 128), within 1%.
    """
    ctas = expected_ctas(problem, tile)
    keys = _visible_keys(problem)
    round_keys = tile.num_teams * tile.block_n  # as split_tiles() of decode_work.cuh divides
    rounds = -(-keys // round_keys)
    overhead = OVERHEAD_BYTES / ((problem.head_dim_qk + problem.head_dim_v) * ELEM_BYTES)

    def estimate(splits: int) -> float:
        full_waves, rest = divmod(ctas * splits, num_sms * tile.min_ctas_per_sm)
        reading = full_waves * tile.min_ctas_per_sm + (max(1.0, rest / num_sms) if rest else 0.0)
        longest = -(-rounds // splits) * round_keys  # CTAs with less to do leave it more bandwidth
        split_keys = (3 * keys / splits + longest) / 4
        return reading * split_keys + (full_waves + (rest > 0) + (splits > 1)) * overhead

    most = max(1, min(MAX_CHOSEN_SPLITS, keys // MIN_KEYS_PER_SPLIT))
    estimates = [estimate(splits) for splits in range(1, most + 1)]
    enough = SPLIT_TOLERANCE * min(estimates)
    splits = next(i for i, time in enumerate(estimates, 1) if time <= enough)
    alone = ctas * splits <= num_sms and tile.min_ctas_per_sm > 1
    if problem.page_size and alone and keys >= 2 * splits * MIN_KEYS_OF_SHARED_SM:
        splits = min(2 * splits, most)
    return splits
