"""The flash2 tree as a backend: what it serves, and its plans.

Called by `flash_attn_interface/call/dispatch.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._common.ask.backward_problem import BackwardProblem
from .._common.ask.problem import Problem, Target
from .._common.ask.serves import FEATURES, unserved
from .fwd import ForwardPlan

if TYPE_CHECKING:  # imported where they are planned: a process that only infers needs half of it
    from .._common.tiles.tuning import Tunable
    from .bwd import BackwardPlan

MAX_HEAD_DIM = 256
# decode.cu divides the columns of V among warps; fwd.cu does not.
MAX_CACHED_HEAD_DIM_V = 512
# Row and column arithmetic in the kernels is 32-bit: row + seqlen_k + window must not wrap.
MAX_SEQLEN = 2**29


class Flash2Backend:
    """Forward and backward for any head dims up to 256 on sm_80 and up."""

    name = "flash2"
    serves = FEATURES
    serves_backward = FEATURES - {"pages", "cache_batch_idx", "leftpad", "kv_cache", "append"}

    def refuses_forward(self, problem: Problem, target: Target) -> str | None:
        """Why this problem cannot be served on this target; None if it can."""
        in_cache = problem.append is not None
        limit = MAX_CACHED_HEAD_DIM_V if in_cache else MAX_HEAD_DIM
        return unserved(problem.needs(), self.serves) or _refuses(problem, limit)

    def plan_forward(self, problem: Problem, target: Target) -> Any:
        """A `backends.Plan`: with the forward kernel or, over a key and value cache, that or the
        decode kernel."""
        if problem.append is None:
            return ForwardPlan(problem, target)
        from .kv import CachePlan

        return CachePlan(problem, target)

    def refuses_backward(self, problem: BackwardProblem, target: Target) -> str | None:
        """As refuses_forward; what the forward serves, the backward does, but for caches."""
        forward = problem.forward
        return (
            forward.refuses_backward()
            or unserved(forward.needs(), self.serves_backward)
            or _refuses(forward, MAX_HEAD_DIM)
        )

    def plan_backward(self, problem: BackwardProblem, target: Target) -> BackwardPlan:
        from .bwd import BackwardPlan

        return BackwardPlan(problem, target)

    def tunables(self) -> tuple[Tunable, ...]:
        """The kernels that the autotuner can find tiles for."""
        from .tuning import TUNABLES

        return TUNABLES


def _refuses(problem: Problem, max_head_dim_v: int) -> str | None:
    if problem.head_dim_qk > MAX_HEAD_DIM or problem.head_dim_v > max_head_dim_v:
        return f"head dims are limited to {MAX_HEAD_DIM}" + (
            f", that of v to {max_head_dim_v}" if max_head_dim_v > MAX_HEAD_DIM else ""
        )
    packed_k = 0 if problem.cache_slots else problem.total_k
    if max(problem.seqlen_q, problem.seqlen_k, problem.total_q, packed_k) >= MAX_SEQLEN:
        return f"sequences and packed buffers are limited to {MAX_SEQLEN - 1} tokens"
    if problem.page_size and problem.return_softmax:
        return "S_dmask, a debugging output, is not written for paged keys"
    return None


BACKEND = Flash2Backend()
