"""The flash2 tree as a backend: what it serves, and its plans.

Called by `flash_attn_interface/call/dispatch.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._common.ask.backward_problem import BackwardProblem
from .._common.ask.problem import Problem, Target
from .._common.features import union
from . import fwd_tiles, part_tiles
from .fwd import ForwardPlan
from .fwd_parts import PartsPlan

if TYPE_CHECKING:  # imported where they are planned: a process that only infers needs half of it
    from .._common.tiles.tuning import Tunable
    from .bwd import BackwardPlan
    from .bwd_parts import BackwardPartsPlan

# fwd.cu takes the columns of V in up to two parts, decode.cu divides them among warps.
MAX_HEAD_DIM_V = part_tiles.MAX_PARTS * fwd_tiles.MAX_HEAD_DIM_V
MAX_HEAD_DIM_QK_WITH_QV = 256
# Row and column arithmetic in the kernels is 32-bit: row + seqlen_k + window must not wrap.
MAX_SEQLEN = 2**29

# Features by direction; what is not here is refused by its name.
_ANY_DIRECTION = frozenset(
    {
        "fp16", "bf16", "varlen", "seqused", "causal", "window", "attention_chunk", "softcap",
        "alibi", "sink", "softmax_lse",
    }
)  # fmt: skip
_OF_A_CACHE = frozenset({"pages", "cache_batch_idx", "leftpad_k"})
SERVES: union.Serves = {
    "forward": _ANY_DIRECTION | _OF_A_CACHE | {"dropout", "s_dmask"},
    "backward": _ANY_DIRECTION | {"dropout", "s_dmask", "deterministic"},
    "decode": _ANY_DIRECTION | _OF_A_CACHE | {"qv", "append", "rotary"},
}


class Flash2Backend:
    """Forward, backward and attention over a cache on sm_80 and up, head dims up to (576, 512)."""

    name = "flash2"

    def refuses_forward(self, problem: Problem, target: Target) -> str | None:
        """Why this problem cannot be served on this target; None if it can."""
        if problem.append is None:
            return _refuses(problem) or union.refuses(problem, SERVES, "forward")
        reason = _refuses(problem)
        if reason is None and problem.qv and problem.head_dim_qk > MAX_HEAD_DIM_QK_WITH_QV:
            reason = f"beside qv, head_dim_qk is limited to {MAX_HEAD_DIM_QK_WITH_QV}"
        return reason or union.refuses(problem, SERVES, "decode")

    def plan_forward(self, problem: Problem, target: Target) -> Any:
        """A `backends.Plan`: with the forward kernel, for a wide v in parts, or, over a key and
        value cache, that or the decode kernel."""
        if problem.append is not None:
            from .kv import CachePlan

            return CachePlan(problem, target)
        wide = problem.head_dim_v > fwd_tiles.MAX_HEAD_DIM_V
        return PartsPlan(problem, target) if wide else ForwardPlan(problem, target)

    def refuses_backward(self, problem: BackwardProblem, target: Target) -> str | None:
        """As refuses_forward; what the forward serves, the backward does, but for caches."""
        p = problem.forward
        reason = p.refuses_backward() or _refuses(p)
        return reason or union.refuses(problem, SERVES, "backward")

    def plan_backward(
        self, problem: BackwardProblem, target: Target
    ) -> BackwardPlan | BackwardPartsPlan:
        from .bwd import BackwardPlan

        if len(part_tiles.backward_parts(problem.forward, target.arch)) == 1:
            return BackwardPlan(problem, target)
        from .bwd_parts import BackwardPartsPlan

        return BackwardPartsPlan(problem, target)

    def tunables(self) -> tuple[Tunable, ...]:
        """The kernels that the autotuner can find tiles for."""
        from .tuning import TUNABLES

        return TUNABLES


def _refuses(problem: Problem) -> str | None:
    if problem.head_dim_qk > fwd_tiles.MAX_HEAD_DIM_QK or problem.head_dim_v > MAX_HEAD_DIM_V:
        return (
            f"head dims are limited to {fwd_tiles.MAX_HEAD_DIM_QK}, that of v to {MAX_HEAD_DIM_V}"
        )
    packed_k = 0 if problem.cache_slots else problem.total_k
    if max(problem.seqlen_q, problem.seqlen_k, problem.total_q, packed_k) >= MAX_SEQLEN:
        return f"sequences and packed buffers are limited to {MAX_SEQLEN - 1} tokens"
    if problem.page_size and problem.return_softmax:
        return "S_dmask, a debugging output, is not written for paged keys"
    return None


BACKEND = Flash2Backend()
