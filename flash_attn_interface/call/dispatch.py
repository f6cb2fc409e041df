"""From checked arguments to a running plan, and the memory of earlier plans.

Called by `autograd.py`, `ops.py` and `fa2_ops.py`. `forward` is the hot path: a warm call on a
GPU builds one flat key, finds its plan and runs it. A key seen for the first time goes through
`checks.py` (errors), `selection.py` (which backend) and the backend's planner. `backward` likewise.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from .._common.ask import checks
from .._common.ask.backward_problem import BackwardProblem
from .._common.ask.check_backward import BackwardTensors, check_backward
from .._common.ask.check_tensors import check_qkv_kind
from .._common.ask.check_values import flag, is_unlimited, window_pair
from .._common.ask.checks import ForwardCall
from .._common.ask.problem import Problem
from . import backends
from .backends import BackwardPlan, Plan
from .plans import Slot, layout_of, plans
from .selection import Decision, device_of, select, select_backward
from .selection import Device as Device
from .selection import decide as decide
from .selection import target_for as target_for

ForwardState = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""(out, softmax_lse, s_dmask, rng_state); None where the call does not ask for it."""

_ADDRESS_BITS = 15  # an address matters up to 16-byte alignment


def make_plan(problem: Problem, decision: Decision) -> Plan:
    """The plan of the chosen backend, or the one that launches nothing."""
    if decision.target is None:
        return backends.REFERENCE.plan_forward(problem, None)
    if problem.empty:
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


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    attention_chunk: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    return_lse: bool,
    return_softmax: bool,
    page_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    sm_margin: int = 0,
    pack_gqa: bool | None = None,
) -> ForwardState:
    """Attention forward without autograd. Arguments as in `ForwardCall`; q, k, v are tensors.

    page_table, leftpad_k: only with cu_seqlens.
    """
    try:
        q_strides, k_strides, v_strides = q.stride(), k.stride(), v.stride()
        addresses = q.data_ptr() | k.data_ptr() | v.data_ptr()
        gaps = q_strides[-1] != 1 or k_strides[-1] != 1 or v_strides[-1] != 1
    except IndexError:  # no dimensions, which the checks will name
        gaps = True
    except (AttributeError, RuntimeError):  # no tensor, or one without strides or address
        check_qkv_kind(q, k, v)
        raise
    if gaps:
        q, k, v = (checks.last_dim_contiguous(tensor) for tensor in (q, k, v))
        q_strides, k_strides, v_strides = q.stride(), k.stride(), v.stride()
        addresses = q.data_ptr() | k.data_ptr() | v.data_ptr()
    if not is_unlimited(window_size):
        window_size = window_pair(window_size)
    ragged = None
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        max_seqlen_q = checks.host_max_seqlen(max_seqlen_q, q)
        max_seqlen_k = checks.host_max_seqlen(max_seqlen_k, k)
        ragged = (
            max_seqlen_q, max_seqlen_k, layout_of(cu_seqlens_q), layout_of(cu_seqlens_k),
            None if page_table is None else layout_of(page_table),
            None if leftpad_k is None else layout_of(leftpad_k),
        )  # fmt: skip

    key = plan = slot = None
    device = q.get_device()
    if device >= 0:
        key = (  # flat, since hashing nested tuples is slower
            "forward", q.shape, k.shape, v.shape, q_strides, k_strides, v_strides, q.dtype,
            k.dtype, v.dtype, device, k.get_device(), v.get_device(),
            addresses & _ADDRESS_BITS,
            softmax_scale, causal, window_size, attention_chunk, softcap, dropout_p,
            return_lse, return_softmax, ragged, sm_margin, pack_gqa,
            None if seqused_q is None else layout_of(seqused_q),
            None if seqused_k is None else layout_of(seqused_k),
            None if alibi_slopes is None else layout_of(alibi_slopes),
        )  # fmt: skip
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
        call = ForwardCall(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k,
            softmax_scale, causal, window_size, attention_chunk, softcap, alibi_slopes, dropout_p,
            return_lse, return_softmax, page_table, leftpad_k, sm_margin, pack_gqa,
        )  # fmt: skip
        slot, plan = _plan_for(call, key)

    assert slot is not None
    rng_state = None
    try:
        if dropout_p > 0.0:  # drawn on the device: CUDA graphs replay, torch.manual_seed repeats it
            rng_state = torch.randint(0, 2**62, (2,), dtype=torch.int64, device=q.device)
        out, softmax_lse, s_dmask = plan.run(
            q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, alibi_slopes, rng_state,
            page_table, None, leftpad_k,
        )  # fmt: skip
    finally:
        slot.idle.append(plan)
    return out, softmax_lse, s_dmask, rng_state


def _plan_for(call: ForwardCall, key: Hashable | None) -> tuple[Slot, Plan]:
    """Check the call, choose a backend, and take a plan out of the table.

    key: None to remember it by problem, as for CPU tensors, whose lengths can be read and so are
    checked in every call.
    """
    problem = checks.check_forward(call)
    if call.q.device.type == "cpu":
        checks.check_lengths(call, problem)
    decision = select(problem, device_of(call.q))
    if key is None:
        key = (problem, decision.target)
    return plans.take(key, lambda: make_plan(problem, decision))


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    attention_chunk: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    rng_state: Tensor | None,
    deterministic: bool,
    dlse: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention backward without autograd: writes dq, dk and dv, which may have any strides.

    Args:
        out, softmax_lse: of the forward, or merged over more keys than k has.
        rng_state: what the forward returned; only with dropout.
        dlse: gradient of softmax_lse.
        backend: the tree that has to serve it, if kernels do; None to choose.
        Others as in `forward`.

    Returns:
        softmax_d, see `backends.BackwardPlan`.
    """
    dout, q, k, v, out = map(checks.last_dim_contiguous, (dout, q, k, v, out))
    results = (dq, dk, dv)
    dq, dk, dv = map(checks.last_dim_contiguous, results)
    if not is_unlimited(window_size):
        window_size = window_pair(window_size)
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        max_seqlen_q = checks.host_max_seqlen(max_seqlen_q, q)
        max_seqlen_k = checks.host_max_seqlen(max_seqlen_k, k)

    key = plan = slot = None
    if q.is_cuda:
        addresses = q.data_ptr() | k.data_ptr() | v.data_ptr() | dout.data_ptr() | out.data_ptr()
        addresses |= dq.data_ptr() | dk.data_ptr() | dv.data_ptr()
        key = (
            "backward", *_layouts(q, k, v, dout, out, softmax_lse, dq, dk, dv),
            addresses & _ADDRESS_BITS, softmax_scale, causal, window_size, attention_chunk,
            softcap, dropout_p, deterministic, backend, max_seqlen_q, max_seqlen_k,
            *_layouts(
                cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, alibi_slopes, rng_state, dlse
            ),
        )  # fmt: skip
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
        call = ForwardCall(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k,
            softmax_scale, causal, window_size, attention_chunk, softcap, alibi_slopes, dropout_p,
            True, False,
        )  # fmt: skip
        tensors = BackwardTensors(dout, out, softmax_lse, dq, dk, dv, rng_state, dlse)
        slot, plan = _backward_plan_for(call, tensors, deterministic, backend, key)
    assert slot is not None
    try:
        softmax_d: Tensor = plan.run(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, seqused_q,
            seqused_k, alibi_slopes, rng_state, dlse,
        )  # fmt: skip
    finally:
        slot.idle.append(plan)
    for asked_for, written in zip(results, (dq, dk, dv), strict=True):
        if written is not asked_for:
            asked_for.copy_(written)
    return softmax_d


def _layouts(*tensors: Tensor | None) -> list[Hashable]:
    """As `layout_of`, of all."""
    found: list[Hashable] = []
    for tensor in tensors:
        if tensor is None:
            found.append(None)
            continue
        try:
            found += tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device()
        except (AttributeError, RuntimeError):  # no tensor, or one without strides
            found.append(layout_of(tensor))
    return found


def _backward_plan_for(
    call: ForwardCall,
    tensors: BackwardTensors,
    deterministic: bool,
    backend: str | None,
    key: Hashable | None,
) -> tuple[Slot, BackwardPlan]:
    """As `_plan_for`."""
    forward_problem = checks.check_forward(call)
    if call.q.device.type == "cpu":
        checks.check_lengths(call, forward_problem)
    check_backward(forward_problem, call.q, call.k, call.v, tensors)
    problem = BackwardProblem.of(
        forward_problem, tensors.dout, call.q, call.k, call.v, tensors.out, tensors.dq, tensors.dk,
        tensors.dv, flag("deterministic", deterministic),
    )  # fmt: skip
    decision = select_backward(problem, device_of(call.q), backend)
    if key is None:
        key = (problem, decision.target)
    return plans.take(key, lambda: make_backward_plan(problem, decision))
