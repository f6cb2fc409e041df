"""From the arguments of flash_attn_with_kvcache to a running plan, and the memory of earlier plans.

Called by `kvcache.py`, `fa2_kvcache.py` and the custom operations of `kvcache_ops.py`; for the
plain forward, `dispatch.py` does the same. `attend` is the hot path of decoding: a warm call on a
GPU builds one flat key, finds its plan and runs it.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

from torch import Tensor

from . import backends
from ._common import env
from ._common.cache_problem import CacheProblem
from ._common.check_cache import CacheCall, check_cache, check_cache_length
from ._common.check_cache_values import check_cache_values
from ._common.check_overlap import check_outputs
from ._common.check_values import cache_flags, is_unlimited, window_pair
from ._common.checks import host_max_seqlen, last_dim_contiguous
from .cache_plans import CachePlan, CacheResult, EmptyCachePlan
from .plan_table import Slot, layout_of, plans
from .selection import Decision, device_of, select_cache

_ADDRESS_BITS = 15  # an address matters up to 16-byte alignment


class _Planned(NamedTuple):
    """A plan, and what is needed to use it again."""

    plan: CachePlan
    problem: CacheProblem
    reads_values: bool  # lengths, indices and tables are read and checked in every call
    apart: set[int]  # hashes of addresses of tensors that were found not to overlap


def make_cache_plan(problem: CacheProblem, decision: Decision) -> CachePlan:
    """The plan of the chosen backend, or the one that launches nothing."""
    if decision.target is None:
        return backends.REFERENCE.plan_cache(problem, None)
    if problem.forward.empty and not problem.appends:
        return EmptyCachePlan(problem)
    return decision.backend.plan_cache(problem, decision.target)


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    qv: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    page_table: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k_new: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    rotary_seqlens: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    attention_chunk: int,
    softcap: float,
    rotary_interleaved: bool,
    alibi_slopes: Tensor | None,
    num_splits: int,
    sm_margin: int,
    return_lse: bool,
) -> CacheResult:
    """Append and attend, without autograd. Arguments as in `CacheCall`; the caches are tensors."""
    if not (causal.__class__ is rotary_interleaved.__class__ is return_lse.__class__ is bool):
        causal, rotary_interleaved, return_lse = (  # type: ignore[unreachable]
            cache_flags(causal, rotary_interleaved, return_lse)
        )
    q_layout = q.is_contiguous() or q.stride()  # reading strides takes longer
    if q_layout is not True and q_layout[-1] != 1:
        q = last_dim_contiguous(q)
        q_layout = q.stride()
    if not is_unlimited(window_size):
        window_size = window_pair(window_size)
    new: Hashable = None
    k_address = v_address = qv_address = 0
    rotary: Hashable = None
    ragged = second_query = None
    if k is None and v is None:  # to ask for its type takes longer
        pass
    elif isinstance(k, Tensor) and isinstance(v, Tensor):
        k_layout = k.is_contiguous() or k.stride()
        v_layout = v.is_contiguous() or v.stride()
        if k_layout is not True and k_layout[-1] != 1:
            k = last_dim_contiguous(k)
            k_layout = k.stride()
        if v_layout is not True and v_layout[-1] != 1:
            v = last_dim_contiguous(v)
            v_layout = v.stride()
        k_address, v_address = k.data_ptr(), v.data_ptr()
        new = (
            k.shape, v.shape, k_layout, v_layout, k.dtype, v.dtype, k.get_device(),
            v.get_device(), (k_address | v_address) & _ADDRESS_BITS,
            None if cu_seqlens_k_new is None else layout_of(cu_seqlens_k_new),
        )  # fmt: skip
    else:  # an error, which the checks will name
        new = (type(k), type(v))
    if cu_seqlens_q is not None:
        max_seqlen_q = host_max_seqlen(max_seqlen_q, q)
        ragged = (max_seqlen_q, layout_of(cu_seqlens_q))
    if rotary_cos is None and rotary_sin is None:
        rotary_seqlens = None  # without tables it is not read
    elif isinstance(rotary_cos, Tensor) and isinstance(rotary_sin, Tensor):
        rotary = (
            rotary_interleaved, rotary_cos.shape, rotary_sin.shape, rotary_cos.dtype,
            rotary_sin.dtype, rotary_cos.get_device(), rotary_sin.get_device(),
            rotary_cos.is_contiguous() and rotary_sin.is_contiguous(),
            None if rotary_seqlens is None else layout_of(rotary_seqlens),
        )  # fmt: skip
    else:
        rotary = (layout_of(rotary_cos), layout_of(rotary_sin))
    if qv is not None:
        qv = last_dim_contiguous(qv) if isinstance(qv, Tensor) else qv
        qv_address = qv.data_ptr() if isinstance(qv, Tensor) else 0
        second_query = (layout_of(qv), qv_address & _ADDRESS_BITS)

    key = planned = slot = None
    addresses = 0
    device = q.get_device()
    if device >= 0:
        q_address, k_cache_address = q.data_ptr(), k_cache.data_ptr()
        v_cache_address = v_cache.data_ptr()
        key = (
            "cache", q.shape, k_cache.shape, v_cache.shape, q_layout,
            k_cache.is_contiguous() or k_cache.stride(),
            v_cache.is_contiguous() or v_cache.stride(),
            q.dtype, k_cache.dtype, v_cache.dtype, device, k_cache.get_device(),
            v_cache.get_device(),
            (q_address | k_cache_address | v_cache_address) & _ADDRESS_BITS,
            softmax_scale, causal, window_size, attention_chunk, softcap, num_splits, sm_margin,
            return_lse, new, ragged, rotary, second_query,
            None if cache_seqlens is None else layout_of(cache_seqlens),
            None if page_table is None else layout_of(page_table),
            None if cache_batch_idx is None else layout_of(cache_batch_idx),
            None if cache_leftpad is None else layout_of(cache_leftpad),
            None if alibi_slopes is None else layout_of(alibi_slopes),
        )  # fmt: skip
        if k_address:
            addresses = hash(
                (q_address, k_cache_address, v_cache_address, k_address, v_address, qv_address)
            )
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
    call = None
    if planned is None or planned.reads_values:
        call = CacheCall(
            q, k_cache, v_cache, k, v, qv, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx,
            cache_leftpad, page_table, cu_seqlens_q, cu_seqlens_k_new, max_seqlen_q,
            rotary_seqlens, softmax_scale, causal, window_size, attention_chunk, softcap,
            rotary_interleaved, alibi_slopes, num_splits, sm_margin, return_lse,
        )  # fmt: skip
        if planned is None:
            slot, planned = _plan_for(call, key)
    assert slot is not None
    try:
        if call is not None and planned.reads_values:
            check_cache_values(call, planned.problem)
        if new is not None and addresses not in planned.apart and planned.problem.appends:
            _check_apart(planned, addresses, q, k_cache, v_cache, k, v, qv)
        if cache_seqlens is not None and not isinstance(cache_seqlens, Tensor):
            room = planned.problem.forward.seqlen_k - planned.problem.seqlen_new
            cache_seqlens = check_cache_length(cache_seqlens, room)
        return planned.plan.run(
            q, k_cache, v_cache, k, v, qv, cache_seqlens, cache_batch_idx, cache_leftpad,
            page_table, cu_seqlens_q, cu_seqlens_k_new, rotary_cos, rotary_sin, rotary_seqlens,
            alibi_slopes,
        )  # fmt: skip
    finally:
        slot.idle.append(planned)


def _plan_for(call: CacheCall, key: Hashable | None) -> tuple[Slot, _Planned]:
    """Check the call, choose a backend, and take a plan out of the table.

    key: None to remember it by problem, as for CPU tensors, which are checked in every call.
    """
    problem = check_cache(call)
    decision = select_cache(problem, device_of(call.q))
    if key is None:
        key = (problem, decision.target)
    on_host = call.q.device.type == "cpu" or decision.target is None

    def make() -> _Planned:
        plan = make_cache_plan(problem, decision)
        return _Planned(plan, problem, on_host or env.CHECK_CACHE.get(), set())

    return plans.take(key, make)


_MAX_APART = 128


def _check_apart(
    planned: _Planned,
    addresses: int,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    qv: Tensor | None,
) -> None:
    """That the caches, which are written, overlap neither each other nor what is read.

    addresses: hash of those of these tensors, whose layouts belong to the plan, so that a warm call
        is answered by a look-up; 0 on the CPU, where strides may differ between calls of one plan.
    """
    check_outputs({"k_cache": k_cache, "v_cache": v_cache}, {"q": q, "k": k, "v": v, "qv": qv})
    if not addresses:
        return
    if len(planned.apart) >= _MAX_APART:
        planned.apart.clear()
    planned.apart.add(addresses)
