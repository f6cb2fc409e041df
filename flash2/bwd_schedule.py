"""Which CTA of `bwd.cu` works on what: pure functions of the problem, the kernel and the number of
SMs. The device's side is `common/device/bwd_work.cuh`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm
from typing import Protocol

from .._common.ask.backward_problem import BackwardProblem
from .._common.ask.problem import Problem
from .fwd_tiles import ELEM_BYTES


class Kernel(Protocol):
    """Constants of the main kernel: block_m, block_n, accum_columns, min_ctas_per_sm; ordered, if
    the problem is deterministic."""

    def __getitem__(self, name: str, /) -> bool | int: ...


# Q, dO and dq_accum of the heads that run together should stay in L2 (A100 2 x 20 MB, H100 50 MB).
L2_BUDGET_BYTES = 24 * 2**20
MAX_DETERMINISTIC_SPLITS = 8
# Deterministic and ordered: key tiles follow one another by one to two steps. What is above that
# lets steps and, when causal, walks differ in length (a model: docs/performance/log/).
ORDERED_STEPS_APART = 4
ORDERED_TILES_TOGETHER = 3  # of a unit at least, where there are steps enough: they share queries
MANY_ROUNDS = 4  # a launch so many times as long as its longest CTA ends evenly in any order
# What choose_heads_per_cta weighs, in steps (a query tile) of a CTA. Fitted to an H100.
CTA_STEPS = 2  # beginning and end of a CTA
SUM_STEPS = 2  # launch of bwd_sum.cu
IDLE_AT_END = 0.25  # of the difference between the longest and the shortest CTA
FLOP_PER_BYTE = 100  # of tensor cores in the time of a byte from memory (A100, H100)
WORTHWHILE = 0.95  # of the time with half as many CTAs


@dataclass(frozen=True)
class BackwardSchedule:
    """Fields as in BwdParams; dq_splits is its num_splits."""

    heads_per_group: int
    heads_per_cta: int
    dq_splits: int
    k_units: int
    k_tiles_per_unit: int
    k_tiles_per_phase: int
    k_units_per_turn: int

    @property
    def ctas_per_group(self) -> int:
        return -(-self.heads_per_group // self.heads_per_cta)

    def sharing_ctas(self, qheads_per_head: int) -> int:
        """Most CTAs that contribute to the same tile of dK or dV; qheads_per_head: of K or V."""
        return _sharing_ctas(self.heads_per_group, self.heads_per_cta, qheads_per_head)


def _sharing_ctas(heads_per_group: int, heads_per_cta: int, qheads_per_head: int) -> int:
    return max(
        (first + qheads_per_head - 1) // heads_per_cta - first // heads_per_cta + 1
        for first in range(0, heads_per_group, qheads_per_head)
    )


def heads_per_group(problem: Problem) -> int:
    """Query heads that share K heads or V heads with one another."""
    return lcm(problem.qhead_per_khead, problem.qhead_per_vhead)


def schedule(
    problem: BackwardProblem, kernel: Kernel, num_sms: int, heads_per_cta: int = 0
) -> BackwardSchedule:
    """kernel: of bwd.cu. heads_per_cta: instead of the rule's."""
    if problem.deterministic and kernel["ordered"]:
        return _ordered(replace(problem, deterministic=False), kernel, num_sms, heads_per_cta)
    p = problem.forward
    of_group = heads_per_group(p)
    heads_per_cta = heads_per_cta or choose_heads_per_cta(problem, kernel, num_sms)
    units_per_sequence = p.num_heads_q // of_group * -(-of_group // heads_per_cta)
    units, tiles = p.batch * units_per_sequence, _key_tiles(p, kernel)
    dq_splits = 1
    if problem.deterministic:
        dq_splits = tiles = _dq_splits(units, tiles, num_sms)
        # The tail of the packed keys counts as a sequence.
        units += units_per_sequence if p.varlen_k else 0
    elif p.varlen_k:
        units, tiles = units_per_sequence, -(-p.total_k // int(kernel["block_n"])) + p.batch
    row_bytes = ELEM_BYTES * (p.head_dim_qk + p.head_dim_v) + 4 * int(kernel["accum_columns"])
    units_per_turn = L2_BUDGET_BYTES // max(1, p.seqlen_q * row_bytes * heads_per_cta)
    if p.varlen_k and not problem.deterministic:
        # A turn goes through all sequences: the fewer turns, the sooner the long ones begin.
        units_per_turn = max(units_per_turn, _slots(kernel, num_sms) // (2 * _sharing(kernel)))
    turns = -(-units // max(1, units_per_turn))
    tiles_per_phase = tiles
    if p.causal and not p.varlen_k and not problem.deterministic:
        queries = _queries_of_key_tiles(p, kernel)
        rounds = sum(queries) * units / (_slots(kernel, num_sms) * max(queries[0], 1))
        sharing = _sharing(kernel)
        tiles_per_phase = min(tiles, max(8, sharing) if rounds >= MANY_ROUNDS else sharing)
    return BackwardSchedule(
        heads_per_group=of_group,
        heads_per_cta=heads_per_cta,
        dq_splits=dq_splits,
        k_units=units,
        k_tiles_per_unit=tiles,
        k_tiles_per_phase=tiles_per_phase,
        k_units_per_turn=-(-units // turns),
    )


def _ordered(
    problem: BackwardProblem, kernel: Kernel, num_sms: int, heads_per_cta: int
) -> BackwardSchedule:
    """As without order, with so few key tiles of a unit at a time that none waits for long.

    All begin at the same query tile and follow each other ORDERED_STEPS_APART steps apart. While
    the first one walks, as many can begin; more would wait, and keep others from running.
    """
    chosen = schedule(problem, kernel, num_sms, heads_per_cta)
    queries = _queries_of_key_tiles(problem.forward, kernel)
    steps = sum(queries) / len(queries) / int(kernel["block_m"]) * chosen.heads_per_cta
    together = max(ORDERED_TILES_TOGETHER, _sharing(kernel))
    together = max(1, min(together, int(steps / ORDERED_STEPS_APART)))
    units = max(1, _slots(kernel, num_sms) // together)
    turns = max(1, chosen.k_units // units)
    return replace(
        chosen,
        k_tiles_per_phase=chosen.k_tiles_per_unit,
        k_units_per_turn=-(-chosen.k_units // turns),
    )


def choose_heads_per_cta(problem: BackwardProblem, kernel: Kernel, num_sms: int) -> int:
    """All heads of a group, if that makes enough CTAs to keep the SMs busy to the end; else fewer.

    Several CTAs then share a K or V head. Each leaves its part of dK and dV in memory in fp32, so
    there are no more than pay, and always fewer than query heads.
    """
    best = heads = of_group = heads_per_group(problem.forward)
    if of_group <= 2:
        return of_group
    queries = _queries_of_key_tiles(problem.forward, kernel)
    least = _steps(problem, kernel, num_sms, heads, queries)
    while heads > 2:  # twice as many CTAs
        heads = max(2, -(-of_group // (2 * -(-of_group // heads))))
        steps = _steps(problem, kernel, num_sms, heads, queries)
        if steps < WORTHWHILE * least:
            best, least = heads, steps
    return best


def _slots(kernel: Kernel, num_sms: int) -> int:
    return num_sms * int(kernel["min_ctas_per_sm"])


def _key_tiles(p: Problem, kernel: Kernel) -> int:
    """Of a sequence, the longest one."""
    return -(-p.seqlen_k // int(kernel["block_n"]))


def _dq_splits(units: int, key_tiles: int, num_sms: int) -> int:
    return max(1, min(-(-num_sms // units), key_tiles, MAX_DETERMINISTIC_SPLITS))


def _sharing(kernel: Kernel) -> int:
    """Key tiles of a unit that should at least run together, because they read the same queries.

    Else memory does not keep up; a step on fewer keys does less with its queries. Measured on an
    H100: with one, (128, 128) took 1.2 times as long for 128 units and (256, 256), which has 64
    keys, 1.7 times for 64 units. More cost balance, see MANY_ROUNDS.
    """
    block_n = int(kernel["block_n"])
    return 2 if block_n >= 128 else 4 if block_n >= 96 else 12


def _queries_of_key_tiles(p: Problem, kernel: Kernel) -> list[float]:
    """Rows that see each key tile of a sequence, in order."""
    block_n, tiles = int(kernel["block_n"]), max(1, _key_tiles(p, kernel))
    if p.causal:
        return [min(p.seqlen_q, p.seqlen_k - i * block_n) for i in range(tiles)]
    seen: float = p.seqlen_q
    if p.window_left >= 0 and p.window_right >= 0:
        seen = min(seen, p.window_left + p.window_right + block_n)
    if p.attention_chunk:
        seen = min(seen, p.attention_chunk)
    return [seen] * tiles


def _steps(
    problem: BackwardProblem, kernel: Kernel, num_sms: int, heads: int, queries: list[float]
) -> float:
    """Estimated steps until the last CTA ends, each with so many query heads."""
    p = problem.forward
    block_m, block_n = int(kernel["block_m"]), int(kernel["block_n"])
    of_group, slots = heads_per_group(p), _slots(kernel, num_sms)
    units = p.num_heads_q // of_group * -(-of_group // heads)
    units *= max(1, p.total_k // max(1, p.seqlen_k)) if p.varlen_k else p.batch
    if problem.deterministic:
        splits = _dq_splits(units, len(queries), num_sms)
        queries = [sum(queries) / splits] * splits
    lengths = [rows * heads / block_m + CTA_STEPS for rows in queries]
    steps = sum(lengths) * units / slots
    for k in range(8):  # some SM has k + 1 of the k * slots + 1 longest CTAs
        rank = k * slots // units
        if rank < len(lengths):
            steps = max(steps, (k + 1) * lengths[rank])
    steps += IDLE_AT_END * (max(lengths) - min(lengths))
    columns = 0  # of all heads, of rows that bwd_sum.cu reads
    for group, head_dim in (
        (p.qhead_per_khead, p.head_dim_qk),
        (p.qhead_per_vhead, p.head_dim_v),
    ):
        sharing = _sharing_ctas(of_group, heads, group)
        columns += sharing * head_dim * (p.num_heads_q // group) if sharing > 1 else 0
    if columns:
        flop_per_step = 2 * block_m * block_n * (3 * p.head_dim_qk + 2 * p.head_dim_v)
        steps += SUM_STEPS + 4 * columns * p.total_k * FLOP_PER_BYTE / flop_per_step / num_sms
    return steps
