"""The Hopper tree as a backend: what it serves, and its plans.

Called by `flash_attn_interface/call/dispatch.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flash_attn_interface._common.ask.backward_problem import BackwardProblem
from flash_attn_interface._common.ask.problem import Problem, Target
from flash_attn_interface._common.ask.serves import unserved
from flash_attn_interface._common.runtime import sources

from . import bwd, fwd_tiles, tensor_maps
from .bwd import BackwardPlan
from .fwd import ForwardPlan
from .version import RELEASE

if TYPE_CHECKING:
    from flash_attn_interface._common.tiles.tuning import Tunable

# Row and column arithmetic in the kernels is 32-bit: row + seqlen_k + window must not wrap.
MAX_SEQLEN = 2**29

_CONTIGUOUS = "it reads contiguous keys and values, without pages, indices or left padding"
_REASONS = {
    "kv_cache": "it has no kernels that read a cache",
    "pages": _CONTIGUOUS,
    "cache_batch_idx": _CONTIGUOUS,
    "leftpad": _CONTIGUOUS,
    "s_dmask": "S_dmask, a debugging output, is written by the flash2 kernels only",
}

sources.register_root("hopper", Path(__file__).resolve().parent)


class HopperBackend:
    """Forward for any head dims up to 256, and (64, 512), backward up to 256, on sm_90a."""

    name = "hopper"
    release = RELEASE
    serves = frozenset(
        ("causal", "window", "attention_chunk", "softcap", "alibi", "dropout", "varlen", "seqused")
    )
    serves_backward = serves | {"s_dmask"}  # which is the forward's alone

    def refuses_forward(self, problem: Problem, target: Target) -> str | None:
        """Why this problem cannot be served on this target; None if it can."""
        p = problem
        reason = unserved(p.needs(), self.serves, _REASONS)
        if reason is not None:
            return reason
        if target.arch != fwd_tiles.ARCH:
            return f"its kernels are {fwd_tiles.ARCH} code"
        reason = fwd_tiles.refuses_head_dims(p.head_dim_qk, p.head_dim_v)
        if reason is not None:
            return reason
        if max(p.seqlen_q, p.seqlen_k, p.total_q, p.total_k) >= MAX_SEQLEN:
            return f"sequences and packed buffers are limited to {MAX_SEQLEN - 1} tokens"
        return tensor_maps.refuses_layout(p)

    def plan_forward(self, problem: Problem, target: Target) -> ForwardPlan:
        return ForwardPlan(problem, target)

    def refuses_backward(self, problem: BackwardProblem, target: Target) -> str | None:
        """As refuses_forward. softmax_lse and dropout mean the same in all trees."""
        p = problem.forward
        reason = p.refuses_backward() or unserved(p.needs(), self.serves_backward, _REASONS)
        if reason is not None:
            return reason
        if target.arch != fwd_tiles.ARCH:
            return f"its kernels are {fwd_tiles.ARCH} code"
        if max(p.seqlen_q, p.seqlen_k, p.total_q, p.total_k) >= MAX_SEQLEN:
            return f"sequences and packed buffers are limited to {MAX_SEQLEN - 1} tokens"
        if problem.deterministic and not target.simulated:
            return "its deterministic mode has run in the simulator only so far"
        return bwd.refuses(problem)

    def plan_backward(self, problem: BackwardProblem, target: Target) -> BackwardPlan:
        return BackwardPlan(problem, target)

    def tunables(self) -> tuple[Tunable, ...]:
        """The kernels that the autotuner can find tiles for."""
        from .tuning import TUNABLES

        return TUNABLES


BACKEND = HopperBackend()
