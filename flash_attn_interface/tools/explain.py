"""explain(...): the way one call would take, without running it. For people and for tests.

It asks the same `check.py`, `dispatch.py` and planners as the call itself; what it answers is in
`explanation.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._common.ask.backward_problem import BackwardProblem
from .._common.ask.call import Backward as AskedBackward
from .._common.ask.call import Cache, Call, Options, Sequences, Tensors
from .._common.ask.check import check
from .._common.ask.check_tensors import check_qkv_kind, last_dim_contiguous, require_tensor
from .._common.ask.check_values import flag
from .._common.ask.problem import Problem, Target
from .._common.runtime.spec import KernelSpec
from ..call import dispatch, selection
from ..call.backends import Plan
from ..call.selection import Decision, Device
from ..call.simulation import capability_of
from .explanation import Backward, Explanation

TensorOrShape = Tensor | Sequence[int]


def explain(
    q: TensorOrShape,
    k: TensorOrShape,
    v: TensorOrShape,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    window_size: Sequence[int] | Tensor = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    alibi_slopes: TensorOrShape | None = None,
    dropout_p: float = 0.0,
    cu_seqlens_q: TensorOrShape | None = None,
    cu_seqlens_k: TensorOrShape | None = None,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    seqused_q: TensorOrShape | None = None,
    seqused_k: TensorOrShape | None = None,
    return_attn_probs: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    arch: str | None = None,
    deterministic: bool = False,
    block_table: TensorOrShape | None = None,
    s_aux: TensorOrShape | None = None,
    verbose: bool = False,
) -> Explanation:
    """Which backend and kernel a call would use, and why. Nothing is compiled or launched.

        print(explain((2, 512, 8, 64), (2, 512, 8, 64), (2, 512, 8, 128), causal=True,
        arch="sm_80"))

    Args:
        q, k, v: as in `flash_attn_func` (with cu_seqlens as in `flash_attn_varlen_func`); tensors
            on any device, meta included, or just their shapes, which then stand for contiguous
            tensors.
        alibi_slopes, dropout_p: as in `flash_attn.flash_attn_func`.
        softmax_scale, causal, window_size, attention_chunk, softcap, cu_seqlens_q, cu_seqlens_k,
            max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, return_attn_probs, s_aux: as in the
            call. Where gradients are recorded, sinks are applied after the kernel.
        block_table: as in `flash_attn.flash_attn_varlen_func`.
        dtype: of q, k and v where shapes are given.
        arch: the architecture to explain for, such as "sm_80", GPU or not. None means the device of
            q; for shapes and meta tensors the current GPU, or a CPU if there is none.
        verbose: print everything, such as strides and constants, in place of five lines.

    Returns:
        An Explanation: print it, or read backend, refused, spec, constants, grid, smem_bytes,
        cache_folder, cache_state, backward; to_dict() has all of it for JSON.

    Raises:
        TypeError, ValueError, NotImplementedError: the errors of arguments, as in the call itself.
            That no backend serves the call is not raised: the Explanation says so.
    """
    tensors = Tensors(
        stand_in(q, dtype),
        stand_in(k, dtype),
        stand_in(v, dtype),
        cu_seqlens_q=stand_in(cu_seqlens_q, torch.int32),
        cu_seqlens_k=stand_in(cu_seqlens_k, torch.int32),
        seqused_q=stand_in(seqused_q, torch.int32),
        seqused_k=stand_in(seqused_k, torch.int32),
        alibi_slopes=stand_in(alibi_slopes, torch.float32),
        page_table=stand_in(block_table, torch.int32),
        s_aux=stand_in(s_aux, torch.float32),
    )
    options = Options(
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        dropout_p=dropout_p,
        return_lse=return_attn_probs,
        return_softmax=return_attn_probs,
    )
    tensors = _contiguous_qkv(on_one_device(tensors))
    call = Call(tensors, Sequences(max_seqlen_q, max_seqlen_k), None, options)
    problem = check(call)
    deterministic = flag("deterministic", deterministic)
    verbose = flag("verbose", verbose)
    device = device_for(tensors.q, arch)
    decision, plan, refusal = planned(problem, device)
    if decision is None or plan is None:
        return Explanation(problem, device, None, "", error=refusal, verbose=verbose)
    backward = _explain_backward(call, problem, device, deterministic)
    spec = getattr(plan, "spec", None)
    if spec is None or decision.target is None:
        return Explanation(
            problem, device, decision, plan.describe(), backward=backward, verbose=verbose
        )
    folder, state = _cache_state(spec, decision.target)
    return Explanation(
        problem,
        device,
        decision,
        plan.describe(),
        spec=spec,
        grid=getattr(plan, "grid", 0),
        cache_folder=folder,
        cache_state=state,
        backward=backward,
        verbose=verbose,
    )


def _explain_backward(
    call: Call, problem: Problem, device: Device, deterministic: bool
) -> Backward:
    """Of a dense dout, without launching anything."""
    q, k, v = call.tensors[:3]
    refusal = problem.refuses_backward()
    if refusal is not None:  # its gradients have no shapes either
        return Backward(None, None, "", refusal)
    out = q.new_empty((*q.shape[:-1], problem.head_dim_v), device="meta")
    dq, dk, dv = (torch.empty_like(tensor, device="meta") for tensor in (q, k, v))
    tensors = AskedBackward(out, out, out, dq, dk, dv)
    backward_problem = BackwardProblem.of(problem, call, tensors, deterministic)
    try:
        decision = selection.select_backward(backward_problem, device)
        plan = dispatch.make_backward_plan(backward_problem, decision)
    except NotImplementedError as error:
        return Backward(backward_problem, None, "", str(error))
    return Backward(backward_problem, decision, plan.describe())


def stand_in(value: Any, dtype: torch.dtype) -> Any:
    """A meta tensor for a shape; everything else goes on to the checks as it is."""
    if isinstance(value, (tuple, list)) and all(isinstance(size, int) for size in value):
        return torch.empty(value, dtype=dtype, device="meta")
    return value


T = TypeVar("T", Tensors, Cache)


def on_one_device(tensors: T, *others: Any) -> T:
    """If a shape or meta tensor stands for one tensor, here or among the others, meta tensors stand
    for all."""
    for name, value in zip(tensors._fields, tensors, strict=True):
        if isinstance(value, Tensor):
            require_tensor(name, value)
    if not any(isinstance(value, Tensor) and value.is_meta for value in (*tensors, *others)):
        return tensors
    moved: Any = (value.to("meta") if isinstance(value, Tensor) else value for value in tensors)
    return type(tensors)(*moved)


def _contiguous_qkv(tensors: Tensors) -> Tensors:
    q, k, v, *others = tensors
    check_qkv_kind(q, k, v)
    return Tensors(*map(last_dim_contiguous, (q, k, v)), *others)


def planned(problem: Problem, device: Device) -> tuple[Decision | None, Plan | None, str]:
    """(decision, plan, ""), or (None, None, why no backend serves the problem)."""
    try:
        decision = selection.select(problem, device)
        return decision, dispatch.make_plan(problem, decision), ""
    except NotImplementedError as error:
        return None, None, str(error)


def device_for(q: Tensor, arch: str | None) -> Device:
    """The device to explain for: of an architecture, or else that of q."""
    if arch is not None:
        return Device(capability_of(arch))
    if q.is_meta and torch.cuda.is_available():
        return selection.device_of(torch.empty(0, device="cuda"))
    return selection.device_of(torch.empty(0) if q.is_meta else q)


def _cache_state(spec: KernelSpec, target: Target) -> tuple[Path | None, str]:
    if target.simulated:
        return None, "the simulator builds it with g++ at the first call and keeps it in the cache"
    from .._common.runtime.cubins import (
        default_kernels,  # reads the kernel's sources and asks NVRTC's version
    )

    image = default_kernels().find(spec)
    if image is not None and image.folder is not None:
        return image.folder, "prebuilt" if image.origin == "prebuilt" else "compiled earlier"
    folder = default_kernels().folder(spec)
    if folder is None:
        return None, "kept in memory only, compiled at the first call of each process"
    return folder, "not compiled yet; the first call does it and keeps it here"
