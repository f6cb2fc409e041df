"""From a call to a running plan: check, select, plan, run, and the memory of earlier plans.

Called by `autograd.py`, `cached.py` and the operators. `run` is the hot path of every forward and
of decoding: a warm call on a GPU builds one key (`keys.py`), finds its plan and runs it. A key seen
for the first time goes through `common/ask/check.py` (errors), `selection.py` (which backend) and
the backend's planner. `backward` likewise.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from .._common import env
from .._common.ask import check
from .._common.ask.backward_problem import BackwardProblem
from .._common.ask.call import Backward, Cache, Call
from .._common.ask.check_backward import check_backward
from .._common.ask.check_kv import check_cache_length
from .._common.ask.check_overlap import check_outputs
from .._common.ask.check_tensors import last_dim_contiguous
from .._common.ask.check_values import flag
from .._common.ask.problem import Problem
from . import backends, keys
from .backends import BackwardPlan, Plan
from .plans import Slot, plans
from .selection import Decision, device_of, select, select_backward
from .selection import Device as Device
from .selection import decide as decide
from .selection import target_for as target_for

ForwardState = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""(out, softmax_lse, s_dmask, rng_state); None where the call does not ask for it."""


class _Planned(NamedTuple):
    """A plan, and what is needed to use it again."""

    plan: Plan
    problem: Problem
    reads_values: bool  # lengths, indices and tables of a cache are read and checked in every call
    apart: set[int]  # hashes of addresses of tensors that were found not to overlap


def make_plan(problem: Problem, decision: Decision) -> Plan:
    """The plan of the chosen backend, or the one that launches nothing."""
    if decision.target is None:
        return backends.REFERENCE.plan_forward(problem, None)
    if problem.empty and not (problem.append is not None and problem.append.appends):
        return backends.EmptyPlan(problem)
    return decision.backend.plan_forward(problem, decision.target)


def make_backward_plan(problem: BackwardProblem, decision: Decision) -> BackwardPlan:
    """Likewise for the backward."""
    if min(problem.forward.total_q, problem.forward.total_k) == 0:
        return backends.EmptyBackwardPlan(problem.forward)
    if decision.target is None:
        return backends.REFERENCE.plan_backward(problem, None)
    return decision.backend.plan_backward(problem, decision.target)


def forget_plans() -> None:
    """Plan every call anew, in all threads, say after the environment changed."""
    plans.clear()


def run(call: Call, keep_lse: bool = False) -> ForwardState:
    """Attention without autograd; over a cache, new keys and values are appended first.

    keep_lse: softmax_lse is needed, whatever the options say, by a backward.
    """
    if call.cache is None:
        call, key, addresses = keys.of_forward(call, keep_lse)
    else:
        call, key, addresses = keys.of_cache(call)
    planned = slot = None
    if key is not None:
        try:
            slot = plans.find(key)
        except TypeError:  # an unhashable argument, a list say: the checks will name it
            key = None
        if slot is not None:
            slot.used = plans.clock
            try:
                planned = slot.idle.pop()
            except IndexError:  # other threads are running all
                pass
    if planned is None:
        slot, planned = _plan_for(call, key, keep_lse)
    assert slot is not None
    tensors, _, cache, options = call
    rng_state = None
    try:
        if cache is not None:
            cache = _ready(planned, call, cache, addresses)
        elif options.dropout_p > 0.0:  # on the device: CUDA graphs replay, manual_seed repeats it
            device = tensors.q.device
            rng_state = torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)
        out, softmax_lse, s_dmask = planned.plan.run(tensors, cache, rng_state)
    finally:
        slot.idle.append(planned)
    return out, softmax_lse, s_dmask, rng_state


def _plan_for(call: Call, key: Hashable | None, keep_lse: bool) -> tuple[Slot, _Planned]:
    """Check the call, choose a backend, and take a plan out of the table.

    key: None to remember it by problem, as for CPU tensors, whose lengths can be read and so are
    checked in every call.
    """
    if keep_lse:
        call = call._replace(options=call.options._replace(return_lse=True))
    problem = check.check(call)
    q = call.tensors.q
    on_host = q.device.type == "cpu"
    if on_host and call.cache is None:
        check.check_values(call, problem)
    decision = select(problem, device_of(q))
    if key is None:
        key = (problem, decision.target)

    def make() -> _Planned:
        reads = on_host or decision.target is None or env.CHECK_CACHE.get()
        return _Planned(make_plan(problem, decision), problem, reads, set())

    return plans.take(key, make)


def _ready(planned: _Planned, call: Call, cache: Cache, addresses: int) -> Cache:
    """The cache of a call that is about to run, once what changes between calls is checked."""
    problem = planned.problem
    if planned.reads_values:
        check.check_values(call, problem)
    if cache.k is not None and addresses not in planned.apart:
        assert problem.append is not None
        if problem.append.appends:
            _check_apart(planned, addresses, call)
    seqlens = cache.seqlens
    if seqlens is None or isinstance(seqlens, Tensor):
        return cache
    assert problem.append is not None
    room = problem.seqlen_k - problem.append.seqlen_new
    return cache._replace(seqlens=check_cache_length(seqlens, room))


_MAX_APART = 128


def _check_apart(planned: _Planned, addresses: int, call: Call) -> None:
    """That the caches, which are written, overlap neither each other nor what is read.

    addresses: hash of those of these tensors, whose layouts belong to the plan, so that a warm call
        is answered by a look-up; 0 on the CPU, where strides may differ between calls of one plan.
    """
    q, k_cache, v_cache = call.tensors[:3]
    assert call.cache is not None
    k, v, qv = call.cache[:3]
    check_outputs({"k_cache": k_cache, "v_cache": v_cache}, {"q": q, "k": k, "v": v, "qv": qv})
    if not addresses:
        return
    if len(planned.apart) >= _MAX_APART:
        planned.apart.clear()
    planned.apart.add(addresses)


def backward(call: Call, backward: Backward) -> Tensor:
    """Attention backward without autograd: writes dq, dk and dv, which may have any strides.

    call: that of the forward.

    Returns:
        softmax_d, see `backends.BackwardPlan`.
    """
    results = (backward.dq, backward.dk, backward.dv)
    dout, out, softmax_lse, dq, dk, dv, *others = backward
    dout, out, dq, dk, dv = map(last_dim_contiguous, (dout, out, dq, dk, dv))
    backward = Backward(dout, out, softmax_lse, dq, dk, dv, *others)
    tensors = call.tensors
    q, k, v = map(last_dim_contiguous, tensors[:3])
    tensors = type(tensors)(q, k, v, *tensors[3:])
    call, key, _ = keys.of_backward(Call(tensors, call.sequences, None, call.options), backward)
    plan = slot = None
    if key is not None:
        try:
            slot = plans.find(key)
        except TypeError:  # an unhashable argument, a list say: the checks will name it
            key = None
        if slot is not None:
            slot.used = plans.clock
            try:
                plan = slot.idle.pop()
            except IndexError:  # other threads are running all
                pass
    if plan is None:
        slot, plan = _backward_plan_for(call, backward, key)
    assert slot is not None
    try:
        softmax_d: Tensor = plan.run(tensors, backward)
    finally:
        slot.idle.append(plan)
    for asked_for, written in zip(results, (dq, dk, dv), strict=True):
        if written is not asked_for:
            asked_for.copy_(written)
    return softmax_d


def _backward_plan_for(
    call: Call, backward: Backward, key: Hashable | None
) -> tuple[Slot, BackwardPlan]:
    """As `_plan_for`."""
    options = call.options
    call = call._replace(options=options._replace(return_lse=True, return_softmax=False))
    q = call.tensors.q
    forward_problem = check.check(call)
    if q.device.type == "cpu":
        check.check_values(call, forward_problem)
    check_backward(forward_problem, call, backward)
    deterministic = flag("deterministic", options.deterministic)
    problem = BackwardProblem.of(forward_problem, call, backward, deterministic)
    decision = select_backward(problem, device_of(q), options.backward_backend)
    if key is None:
        key = (problem, decision.target)
    return plans.take(key, lambda: make_backward_plan(problem, decision))
