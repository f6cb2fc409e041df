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
    from .bwd_parts import BackwardPartsPlan
    from .cache import CachePlan

# fwd.cu takes the columns of V in up to two parts, decode.cu divides them among warps.
MAX_HEAD_DIM_V = part_tiles.MAX_PARTS * tiles.MAX_HEAD_DIM_V
MAX_HEAD_DIM_QK_WITH_QV = 256
# Row and column arithmetic in the kernels is 32-bit: row + seqlen_k + window must not wrap.
MAX_SEQLEN = 2**29


class Flash2Backend:
    """Forward, backward and attention over a cache on sm_80 and up, head dims up to (576, 512)."""

    name = "flash2"

    def refuses_forward(self, problem: Problem, target: Target) -> str | None:
        """Why this problem cannot be served on this target; None if it can."""
        return _refuses(problem)

    def plan_forward(self, problem: Problem, target: Target) -> ForwardPlan | PartsPlan:
        wide = problem.head_dim_v > tiles.MAX_HEAD_DIM_V
        return PartsPlan(problem, target) if wide else ForwardPlan(problem, target)

    def refuses_backward(self, problem: BackwardProblem, target: Target) -> str | None:
        """As refuses_forward; what the forward serves, the backward does, but for caches."""
        return problem.forward.refuses_backward() or self.refuses_forward(problem.forward, target)

    def plan_backward(
        self, problem: BackwardProblem, target: Target
    ) -> BackwardPlan | BackwardPartsPlan:
        from .bwd import BackwardPlan

        if len(part_tiles.backward_parts(problem.forward, target.arch)) == 1:
            return BackwardPlan(problem, target)
        from .bwd_parts import BackwardPartsPlan

        return BackwardPartsPlan(problem, target)

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
