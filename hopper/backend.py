"""The Hopper tree as a backend: what it serves, and its plans.

Called by `flash_attn_interface/call/dispatch.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flash_attn_interface._common.ask.backward_problem import BackwardProblem
from flash_attn_interface._common.ask.problem import Problem, Target
from flash_attn_interface._common.features import union
from flash_attn_interface._common.runtime import sources

from . import bwd, fwd_tiles, tensor_maps
from .bwd import BackwardPlan
from .fwd import ForwardPlan
from .version import RELEASE

if TYPE_CHECKING:
    from flash_attn_interface._common.tiles.tuning import Tunable

# Row and column arithmetic in the kernels is 32-bit: row + seqlen_k + window must not wrap.
MAX_SEQLEN = 2**29

# Features by direction; what is not here is refused, by its name where nothing below says more.
_BOTH_WAYS = frozenset(
    {
        "fp16", "bf16", "varlen", "seqused", "causal", "window", "attention_chunk", "softcap",
        "alibi", "sink", "dropout", "softmax_lse",
    }
)  # fmt: skip
SERVES: union.Serves = {
    "forward": _BOTH_WAYS,
    "backward": _BOTH_WAYS | {"s_dmask", "deterministic"},
    "decode": frozenset(),
}

sources.register_root("hopper", Path(__file__).resolve().parent)


class HopperBackend:
    """Forward for head dims up to (576, 512), backward up to 256, on sm_90a."""

    name = "hopper"
    release = RELEASE

    def refuses_forward(self, problem: Problem, target: Target) -> str | None:
        """Why this problem cannot be served on this target; None if it can."""
        p = problem
        if p.append is not None:
            return "it has no kernels that read a cache"
        if target.arch != fwd_tiles.ARCH:
            return f"its kernels are {fwd_tiles.ARCH} code"
        reason = fwd_tiles.refuses_head_dims(p.head_dim_qk, p.head_dim_v)
        if reason is not None:
            return reason
        if max(p.seqlen_q, p.seqlen_k, p.total_q, p.total_k) >= MAX_SEQLEN:
            return f"sequences and packed buffers are limited to {MAX_SEQLEN - 1} tokens"
        if p.page_size or p.cache_batch_idx or p.leftpad_k:
            return "it reads contiguous keys and values, without pages, indices or left padding"
        if p.return_softmax:
            return "S_dmask, a debugging output, is written by the flash2 kernels only"
        return tensor_maps.refuses_layout(p) or union.refuses(p, SERVES, "forward")

    def plan_forward(self, problem: Problem, target: Target) -> ForwardPlan:
        return ForwardPlan(problem, target)

    def refuses_backward(self, problem: BackwardProblem, target: Target) -> str | None:
        """As refuses_forward. softmax_lse and dropout mean the same in all trees."""
        p = problem.forward
        reason = p.refuses_backward()
        if reason is not None:
            return reason
        if target.arch != fwd_tiles.ARCH:
            return f"its kernels are {fwd_tiles.ARCH} code"
        if max(p.seqlen_q, p.seqlen_k, p.total_q, p.total_k) >= MAX_SEQLEN:
            return f"sequences and packed buffers are limited to {MAX_SEQLEN - 1} tokens"
        if problem.deterministic and not target.simulated:
            return "its deterministic mode has run in the simulator only so far"
        return bwd.refuses(problem) or union.refuses(problem, SERVES, "backward")

    def plan_backward(self, problem: BackwardProblem, target: Target) -> BackwardPlan:
        return BackwardPlan(problem, target)

    def tunables(self) -> tuple[Tunable, ...]:
        """The kernels that the autotuner can find tiles for."""
        from .tuning import TUNABLES

        return TUNABLES


BACKEND = HopperBackend()
