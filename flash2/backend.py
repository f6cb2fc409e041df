"""The flash2 tree as a backend: what it serves, and its plans.

Called by `flash_attn_interface/dispatch.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._common.backward_problem import BackwardProblem
from .._common.cache_problem import CacheProblem
from .._common.problem import Problem, Target
from . import part_tiles, tiles
from .fwd import ForwardPlan
from .fwd_parts import PartsPlan

if TYPE_CHECKING:  # imported where they are planned: a process that only infers needs half of it
    from .._common.tuning import Tunable
    from .bwd import BackwardPlan
    from .cache import CachePlan

# fwd.cu takes the columns of V in up to two parts, decode.cu divides them among warps.
MAX_HEAD_DIM_V = part_tiles.MAX_PARTS * tiles.MAX_HEAD_DIM_V
MAX_HEAD_DIM_QK_WITH_QV = 256
# Row and column arithmetic in the kernels is 32-bit: row + seqlen_k + window must not wrap.
MAX_SEQLEN = 2**29


class Flash2Backend:
    """On sm_80 and up, forward and attention over a cache for head dims up to 576 of q and k and
    512 of v, backward for any up to 256.
    """

    name = "flash2"

    def refuses_forward(self, problem: Problem, target: Target) -> str | None:
        """Why this problem cannot be served on this target; None if it can."""
        return _refuses(problem)

    def plan_forward(self, problem: Problem, target: Target) -> ForwardPlan | PartsPlan:
        wide = problem.head_dim_v > tiles.MAX_HEAD_DIM_V
        return PartsPlan(problem, target) if wide else ForwardPlan(problem, target)

    def refuses_backward(self, problem: BackwardProblem, target: Target) -> str | None:
        """As refuses_forward; what the forward serves, the backward does, but for caches."""
        from .bwd_tiles import MAX_HEAD_DIM

        p = problem.forward
        if max(p.head_dim_qk, p.head_dim_v) > MAX_HEAD_DIM:
            return f"head dims of its backward are limited to {MAX_HEAD_DIM}"
        return p.refuses_backward() or self.refuses_forward(p, target)

    def plan_backward(self, problem: BackwardProblem, target: Target) -> BackwardPlan:
        from .bwd import BackwardPlan

        return BackwardPlan(problem, target)

    def refuses_cache(self, problem: CacheProblem, target: Target) -> str | None:
        """As refuses_forward, of attention over a key and value cache."""
        p = problem.forward
        reason = _refuses(p)
        if reason is None and p.qv and p.head_dim_qk > MAX_HEAD_DIM_QK_WITH_QV:
            return f"beside qv, head_dim_qk is limited to {MAX_HEAD_DIM_QK_WITH_QV}"
        return reason

    def plan_cache(self, problem: CacheProblem, target: Target) -> CachePlan:
        from .cache import CachePlan

        return CachePlan(problem, target)

    def tunables(self) -> tuple[Tunable, ...]:
        """The kernels that the autotuner can find tiles for."""
        from .tuning import TUNABLES

        return TUNABLES


def _refuses(problem: Problem) -> str | None:
    if problem.head_dim_qk > tiles.MAX_HEAD_DIM_QK or problem.head_dim_v > MAX_HEAD_DIM_V:
        return f"head dims are limited to {tiles.MAX_HEAD_DIM_QK}, that of v to {MAX_HEAD_DIM_V}"
    packed_k = 0 if problem.cache_slots else problem.total_k
    if max(problem.seqlen_q, problem.seqlen_k, problem.total_q, packed_k) >= MAX_SEQLEN:
        return f"sequences and packed buffers are limited to {MAX_SEQLEN - 1} tokens"
    if problem.page_size and problem.return_softmax:
        return "S_dmask, a debugging output, is not written for paged keys"
    return None


BACKEND = Flash2Backend()
