"""The flash2 tree as a backend: what it serves, and its plans.

Called by `flash_attn_interface/call/dispatch.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._common.ask.backward_problem import BackwardProblem
from .._common.ask.problem import Problem, Target
from .._common.features import union
from .fwd import ForwardPlan

if TYPE_CHECKING:  # imported where they are planned: a process that only infers needs half of it
    from .._common.tiles.tuning import Tunable
    from .bwd import BackwardPlan

MAX_HEAD_DIM = 256
# decode.cu divides the columns of V among warps; fwd.cu does not.
MAX_CACHED_HEAD_DIM_V = 512
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
    """Forward and backward for any head dims up to 256 on sm_80 and up."""

    name = "flash2"

    def refuses_forward(self, problem: Problem, target: Target) -> str | None:
        """Why this problem cannot be served on this target; None if it can."""
        if problem.append is None:
            return _refuses(problem, MAX_HEAD_DIM) or union.refuses(problem, SERVES, "forward")
        reason = _refuses(problem, MAX_CACHED_HEAD_DIM_V)
        return reason or union.refuses(problem, SERVES, "decode")

    def plan_forward(self, problem: Problem, target: Target) -> Any:
        """A `backends.Plan`: with the forward kernel or, over a key and value cache, that or the
        decode kernel."""
        if problem.append is None:
            return ForwardPlan(problem, target)
        from .kv import CachePlan

        return CachePlan(problem, target)

    def refuses_backward(self, problem: BackwardProblem, target: Target) -> str | None:
        """As refuses_forward; its limits are those of the forward."""
        reason = problem.forward.refuses_backward() or _refuses(problem.forward, MAX_HEAD_DIM)
        return reason or union.refuses(problem, SERVES, "backward")

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
