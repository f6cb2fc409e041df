"""What a kernel tree must offer, and where the installed trees are found.

`dispatch.py` asks here for the candidates. The Ampere tree and the PyTorch reference are part of
this distribution; the Hopper tree is another one, `flash-attn-3`, which announces itself through
the entry point group `flash_attn_interface.backends`. Trees are imported when a call first needs
them, never by `import flash_attn_interface`.
"""

from __future__ import annotations

import functools
from importlib import metadata
from typing import Protocol

import torch
from torch import Tensor

from .._common.ask.backward_problem import BackwardProblem
from .._common.ask.call import Backward, Cache, Tensors
from .._common.ask.out_layout import new_out
from .._common.ask.problem import Problem, Target
from .._common.features import union
from .._common.features.direction import Direction
from .._common.runtime.spec import KernelSpec
from .._common.tiles.tuning import Tunable
from ..version import RELEASE

ENTRY_POINT_GROUP = "flash_attn_interface.backends"
HOPPER_DISTRIBUTION = "flash-attn-3"  # also the name of FlashAttention-3, which has no entry point

ForwardResult = tuple[Tensor, Tensor | None, Tensor | None]
"""(out, softmax_lse, s_dmask); what the problem does not ask for is None."""


class Plan(Protocol):
    """How one Problem is run on one Target. Made once, run often, by one thread."""

    def run(
        self, tensors: Tensors, cache: Cache | None = None, rng_state: Tensor | None = None
    ) -> ForwardResult:
        """Allocate and compute the results, on torch's current stream of the device.

        page_table: int32 (batch, seqlen_k / page_size), last dim contiguous; entries of unused
            pages may be anything. cache_batch_idx, leftpad_k: int32 (batch,). See `Problem`.
        cache: where the problem says `append`. Its new keys and values are written into the caches
            before the attention. seqlens: an int, which fits the cache, if `append` says
            one_length.
        rng_state: int64 (2,), with dropout.
        """

    def describe(self) -> str:
        """What run() does, for people."""


class BackwardPlan(Protocol):
    """How one BackwardProblem is run on one Target. Made once, run often, by one thread."""

    def run(self, tensors: Tensors, backward: Backward) -> Tensor:
        """Write every row of dq, dk and dv, on torch's current stream of the device.

        out and softmax_lse may be merged over more keys than k has (ring attention). dlse: gradient
        of softmax_lse. Returns softmax_d = rowsum(dout * out) - dlse, float32 (batch, num_heads_q,
        seqlen_q rounded up to 128), or (num_heads_q, total_q + 128 * batch) with cu_seqlens_q.
        """

    def describe(self) -> str:
        """What run() does, for people."""


class KernelPlan(Plan, Protocol):
    """A plan that launches a kernel."""

    @property
    def spec(self) -> KernelSpec: ...

    @property
    def grid(self) -> int:
        """Number of CTAs."""


class Backend(Protocol):
    """A kernel tree: `BACKEND` in flash2/__init__.py and its like."""

    @property
    def name(self) -> str: ...

    def refuses_forward(self, problem: Problem, target: Target) -> str | None:
        """Why this tree cannot serve the problem there; None if it can."""

    def plan_forward(self, problem: Problem, target: Target) -> Plan:
        """Chooses the kernels, the forward's or those of decoding. Cheap, works without a GPU:
        nothing is compiled or loaded before the plan's first run."""

    def refuses_backward(self, problem: BackwardProblem, target: Target) -> str | None:
        """As refuses_forward. The forward may have been another tree's."""

    def plan_backward(self, problem: BackwardProblem, target: Target) -> BackwardPlan:
        """As plan_forward."""

    def tunables(self) -> tuple[Tunable, ...]:
        """The kernels that the autotuner can find tiles for."""


# Features of the reference by direction; what is not here is refused by its name.
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


class ReferenceBackend:
    """PyTorch's own operations: serves CPU tensors, and any device when forced. Slow and exact."""

    name = "reference"

    def refuses_forward(self, problem: Problem, target: Target | None) -> str | None:
        direction: Direction = "forward" if problem.append is None else "decode"
        return union.refuses(problem, SERVES, direction)

    def plan_forward(self, problem: Problem, target: Target | None) -> Plan:
        return _ReferencePlan(problem) if problem.append is None else _ReferenceCachePlan(problem)

    def refuses_backward(self, problem: BackwardProblem, target: Target | None) -> str | None:
        reason = problem.forward.refuses_backward()
        return reason or union.refuses(problem, SERVES, "backward")

    def plan_backward(self, problem: BackwardProblem, target: Target | None) -> BackwardPlan:
        return _ReferenceBackwardPlan(problem.forward)

    def tunables(self) -> tuple[Tunable, ...]:
        return ()


class _ReferencePlan:
    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def run(
        self, tensors: Tensors, cache: Cache | None = None, rng_state: Tensor | None = None
    ) -> ForwardResult:
        from ..reference.forward import attention_reference
        from ..reference.gathered import gathered
        from ..reference.sinks import apply_sinks

        problem = self._problem
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, alibi_slopes, *_ = tensors
        if problem.page_size or problem.cache_batch_idx or problem.leftpad_k:
            k, v, cu_seqlens_k = gathered(problem, tensors)
            seqused_k = None
        out, softmax_lse, s_dmask = attention_reference(
            q,
            k,
            v,
            softmax_scale=problem.softmax_scale,
            causal=problem.causal,
            window_size=(problem.window_left, problem.window_right),
            attention_chunk=problem.attention_chunk,
            softcap=problem.softcap,
            alibi_slopes=alibi_slopes,
            dropout_p=problem.dropout_p,
            rng_state=rng_state,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            seqused_q=seqused_q,
            seqused_k=seqused_k,
            max_seqlen_q=problem.seqlen_q,
            max_seqlen_k=problem.seqlen_k,
            return_lse=problem.return_lse or problem.sink,
            return_softmax=problem.return_softmax,
        )
        if tensors.s_aux is not None and softmax_lse is not None:
            out, softmax_lse = apply_sinks(out, softmax_lse, tensors.s_aux)
        return out, softmax_lse if problem.return_lse else None, s_dmask

    def describe(self) -> str:
        return (
            "PyTorch operations (flash_attn_interface/reference/forward.py); materialises the "
            "score matrix"
        )


class _ReferenceCachePlan:
    """PyTorch operations (`reference/kvcache.py`). Reads lengths and tables to the host."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def run(
        self, tensors: Tensors, cache: Cache | None = None, rng_state: Tensor | None = None
    ) -> ForwardResult:
        from ..reference.kvcache import cache_reference
        from ..reference.sinks import apply_sinks

        forward, append = self._problem, self._problem.append
        assert cache is not None and append is not None
        q, k_cache, v_cache = tensors[:3]
        cache_seqlens = cache.seqlens
        if isinstance(cache_seqlens, int):
            cache_seqlens = q.new_full((forward.batch,), cache_seqlens, dtype=torch.int32)
        out, softmax_lse = cache_reference(
            q,
            k_cache,
            v_cache,
            *cache[:3],
            rotary_cos=cache.rotary_cos,
            rotary_sin=cache.rotary_sin,
            cache_seqlens=cache_seqlens,
            cache_batch_idx=tensors.cache_batch_idx,
            cache_leftpad=tensors.leftpad_k,
            page_table=tensors.page_table,
            cu_seqlens_q=tensors.cu_seqlens_q,
            cu_seqlens_k_new=cache.cu_seqlens_k_new,
            rotary_seqlens=cache.rotary_seqlens,
            softmax_scale=forward.softmax_scale,
            causal=forward.causal,
            window_size=(forward.window_left, forward.window_right),
            attention_chunk=forward.attention_chunk,
            softcap=forward.softcap,
            rotary_interleaved=append.rotary_interleaved,
            rotary_per_row=append.rotary_per_row,
            alibi_slopes=tensors.alibi_slopes,
        )
        if tensors.s_aux is not None:
            out, softmax_lse = apply_sinks(out, softmax_lse, tensors.s_aux)
        return out, softmax_lse if forward.return_lse else None, None

    def describe(self) -> str:
        return (
            "PyTorch operations (flash_attn_interface/reference/kvcache.py), a sequence at a time; "
            "lengths and tables are read to the host"
        )


class _ReferenceBackwardPlan:
    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def run(self, tensors: Tensors, backward: Backward) -> Tensor:
        from ..reference.backward import reference_backward

        return reference_backward(self._problem, tensors, backward)

    def describe(self) -> str:
        return "PyTorch operations (flash_attn_interface/reference/backward.py)"


class EmptyPlan:
    """Problems without a query or without a key: answered without a launch, on any device."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def run(
        self, tensors: Tensors, cache: Cache | None = None, rng_state: Tensor | None = None
    ) -> ForwardResult:
        """out = 0 and softmax_lse = -inf, or the sink, of which there may be no rows."""
        q, s_aux, problem = tensors.q, tensors.s_aux, self._problem
        out = new_out(q, problem.head_dim_v).zero_()
        lse = s_dmask = None
        if problem.return_lse:
            lse = q.new_full(problem.lse_shape, float("-inf"), dtype=torch.float32)
            if s_aux is not None:
                lse.copy_(s_aux[:, None])
        if problem.return_softmax:
            s_dmask = q.new_zeros(s_dmask_shape(problem))
        return out, lse, s_dmask

    def describe(self) -> str:
        return "no query or no key: zeros without a launch"


class EmptyBackwardPlan:
    """The backward of problems without a query or without a key: all gradients are zero."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def run(self, tensors: Tensors, backward: Backward) -> Tensor:
        for gradient in (backward.dq, backward.dk, backward.dv):
            gradient.zero_()
        return tensors.q.new_zeros(softmax_d_shape(self._problem), dtype=torch.float32)

    def describe(self) -> str:
        return "no query or no key: zeros without a launch"


def softmax_d_shape(problem: Problem) -> tuple[int, ...]:
    """FlashAttention-2's padding: rows rounded up to 128, or 128 more for each packed sequence."""
    if problem.varlen_q:
        return problem.num_heads_q, problem.total_q + 128 * problem.batch
    return problem.batch, problem.num_heads_q, -(-problem.seqlen_q // 128) * 128


def s_dmask_shape(problem: Problem) -> tuple[int, int, int, int]:
    """FlashAttention-2's shape of the returned softmax: lengths rounded up to 128."""
    rows, columns = (-(-n // 128) * 128 for n in (problem.seqlen_q, problem.seqlen_k))
    return problem.batch, problem.num_heads_q, rows, columns


REFERENCE = ReferenceBackend()


@functools.cache
def flash2() -> Backend:
    """The Ampere tree, which serves sm_80 and everything newer."""
    from .._flash2 import BACKEND

    return BACKEND


def entry_points(group: str) -> list[metadata.EntryPoint]:
    """Those of the Hopper distribution alone: to read all distributions' takes 10 ms and more."""
    try:
        found = metadata.distribution(HOPPER_DISTRIBUTION).entry_points
    except metadata.PackageNotFoundError:
        return []
    return [entry for entry in found if entry.group == group]


HOPPER_NOT_INSTALLED = "the Hopper tree is not installed: cd hopper && pip install ."


@functools.cache
def hopper() -> Backend | None:
    """The Hopper tree, or None if its distribution is not installed.

    Raises:
        ImportError: it is installed but of another release than this distribution, or broken. That
            is never a silent fallback to slower kernels.
    """
    found = [entry for entry in entry_points(group=ENTRY_POINT_GROUP) if entry.name == "hopper"]
    if not found:
        return None
    entry = found[0]
    owner = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
    fix = "Reinstall it from the same checkout (cd hopper && pip install .) or remove it."
    try:
        backend: Backend = entry.load()
    except Exception as error:
        raise ImportError(
            f"flash_attn_interface: the Hopper kernels ({owner}) are installed but their import "
            f"failed: {error}. {fix}"
        ) from error
    release = getattr(backend, "release", "unknown")
    if release != RELEASE:
        raise ImportError(
            f"flash_attn_interface: the Hopper kernels ({owner}) are of release {release}, this "
            f"package is {RELEASE}. {fix}"
        )
    return backend
