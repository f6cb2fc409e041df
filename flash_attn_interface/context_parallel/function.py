"""context_parallel.attention: the public function, its errors, its choice of method, its autograd.

The methods are `ring.py` and `all_to_all.py`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._common.ask import check_values
from .._common.ask.checks import Heads, check_heads
from ..call.simulation import simulated_arch
from ..call.watchers import PLAIN_TYPES
from . import all_to_all, kernels, ring
from .all_to_all import AllToAll, Exchanged
from .kernels import Options
from .layout import Layout
from .merge import add_sink, sink_gradient
from .plain import in_memory, refuse_watchers, require_plain

METHODS = ("ring", "all_to_all", "auto")

# Costs of the methods per token, in keys that a query could see in that time, for as many heads and
# dims of k and v as of q. From benchmarks/simulate_context_parallel.py with the rates of an H200.
RING_STEP = 600  # merging, adding up gradients, starting launches anew
RING_TRANSFER = 1100  # keys and their gradients, which kernels hide if a step takes longer
ALL_TO_ALL = 1200  # exchanging q and out, and the same again for k and v; nothing hides it


class _Arguments(NamedTuple):
    """As the caller passed them."""

    causal: bool
    window_size: Sequence[int]
    softmax_scale: float | None
    softcap: float
    deterministic: bool
    method: str
    return_lse: bool


class _Call(NamedTuple):
    """What a call asks for, besides tensors; the same on every rank."""

    method: str  # "ring" or "all_to_all"
    causal: bool
    window: tuple[int, int]
    options: Options
    return_lse: bool


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
    deterministic: bool = False,
    method: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of sequences that the ranks of a group divide among each other; differentiable.

    Every rank of the layout's group calls it, with its own tokens and otherwise the same
    arguments. The result is what `flash_attn_func` or `flash_attn_varlen_func` gives for the
    undivided tensors, up to rounding.

    torch.compile breaks its graph at the call; fullgraph=True is an error, of torch._dynamo.

    Args:
        q: (batch, tokens, num_heads_q, head_dim_qk) of a dense layout, (tokens, num_heads_q,
            head_dim_qk) of a packed one; tokens is layout.tokens. fp16 or bf16; CPU tensors may
            also be float32 or float64.
        k: likewise with num_heads_k heads, a divisor of num_heads_q.
        v: likewise with num_heads_v heads, a divisor of num_heads_q, and head_dim_v.
        layout: who holds which tokens.
        causal: a token sees itself and earlier ones of its sequence.
        window_size: (left, right); a token sees so many earlier and later ones. Negative is
            unlimited. `causal` makes right 0.
        softmax_scale: None means head_dim_qk ** -0.5.
        softcap: c > 0 replaces the scaled scores s by c * tanh(s / c).
        s_aux: (num_heads_q,), fp32, bf16 or fp16: attention sinks, one more logit of each query
            head in the softmax's denominator, without a value. -inf is no sink. Its gradient is
            this rank's part, as of any parameter that all ranks have: sum it over the group.
        deterministic: gradients are bitwise reproducible too. out and softmax_lse always are.
        method: "ring" keeps queries and sends keys and values, while the kernels run. "all_to_all"
            exchanges tokens for heads and back. "auto" takes all_to_all where there is no window,
            heads can be dealt out evenly, and documents are divided among so many ranks, or have so
            few tokens on each, that the ring costs more; see docs/context_parallel.md.
        return_lse: also return softmax_lse, which is differentiable.

    Returns:
        out, like q with head_dim_v. With return_lse the pair (out, softmax_lse): float32 (batch,
        num_heads_q, tokens), or (num_heads_q, tokens) if packed; with s_aux it includes the sink.

    Raises:
        TypeError, ValueError: an argument is wrong, here or on another rank, or ranks disagree.
            All ranks of the group raise before anything is transferred.
        NotImplementedError: method="all_to_all" with heads that cannot be dealt out.
            Tracing, and the transforms of torch.func.
        RuntimeError: a gradient is differentiated once more.
    """
    if torch.compiler.is_compiling():
        results: Tensor | tuple[Tensor, Tensor] = _outside_of_graphs(
            q, k, v, layout, causal=causal, window_size=window_size, softmax_scale=softmax_scale,
            softcap=softcap, s_aux=s_aux, deterministic=deterministic, method=method,
            return_lse=return_lse,
        )  # fmt: skip
        return results
    if not isinstance(layout, Layout):
        raise TypeError(
            f"layout is {type(layout).__name__}: expected a context_parallel.Layout, which every "
            "rank of the group makes"
        )
    refuse_watchers("context_parallel.attention", q, k, v, s_aux)
    q, k, v = (x.resolve_neg() if type(x) is Tensor and x.is_neg() else x for x in (q, k, v))
    arguments = _Arguments(
        causal, window_size, softmax_scale, softcap, deterministic, method, return_lse
    )
    call = _agreed(q, k, v, layout, s_aux, arguments)
    out, softmax_lse = _Attention.apply(  # type: ignore[no-untyped-call]
        q, k, v, s_aux, layout, call
    )
    return (out, softmax_lse) if return_lse else out


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _outside_of_graphs(*tensors: Any, **options: Any) -> Any:
    """Transfers and their order are no part of a graph: torch.compile breaks it here."""
    return attention(*tensors, **options)


def _agreed(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, s_aux: Tensor | None, arguments: _Arguments
) -> _Call:
    """The call that all ranks make; errors are raised on all of them."""
    key: Hashable = None
    if isinstance(q, Tensor) and q.is_cuda and simulated_arch() is None:
        # All that a check may depend on; a call that passed them once is not looked at again.
        try:
            key = (
                *(_facts_of(tensor) for tensor in (q, k, v, s_aux)),
                arguments,
                torch.is_grad_enabled(),
            )
            known: _Call | None = layout.calls.get(key)
            if known is not None:
                return known
        except (TypeError, RuntimeError):  # an unhashable argument; a nested tensor
            key = None
    call = error = None
    try:
        call = _checked(q, k, v, layout, s_aux, arguments)
    except Exception as refused:  # whatever it is: the other ranks wait for this one
        error = refused
    device = q.device if isinstance(q, Tensor) else torch.device("cpu")
    layout.agree(device, None if call is None else _facts(call, q, k, v, s_aux), error)
    assert call is not None
    if key is not None:
        layout.calls[key] = call
    return call


def _facts_of(tensor: Any) -> Hashable:
    if not isinstance(tensor, Tensor):
        return tensor is None
    return type(tensor), tensor.shape, tensor.dtype, tensor.get_device(), tensor.requires_grad


def _checked(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, s_aux: Tensor | None, asked: _Arguments
) -> _Call:
    """This rank's errors."""
    _check_tensors(q, k, v, layout)
    heads = check_heads(q, k, v, "k", "v")
    if heads.num_heads_q == 0:
        raise ValueError("q has 0 heads: expected at least 1")
    if s_aux is not None:
        _check_sinks(s_aux, q)
    method = asked.method
    if not isinstance(method, str):
        raise TypeError(
            f"method is {check_values.shown(method)}: expected 'ring', 'all_to_all' or 'auto'"
        )
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: expected 'ring', 'all_to_all' or 'auto'")
    causal = check_values.flag("causal", asked.causal)
    left, right = check_values.window_pair(asked.window_size)
    window = _bounded(left, layout), 0 if causal else _bounded(right, layout)
    unable = all_to_all.refusal(
        layout.world, heads.num_heads_q, heads.num_heads_k, heads.num_heads_v
    )
    if method == "all_to_all" and unable is not None:
        raise NotImplementedError(f'method="all_to_all": {unable}; use method="ring"')
    if method == "auto":
        windowed = window[0] >= 0 or (window[1] >= 0 and not causal)
        cheaper = windowed or unable is not None or _ring_is_cheaper(layout, heads)
        method = "ring" if cheaper else "all_to_all"
    scale = check_values.softmax_scale(asked.softmax_scale, heads.head_dim_qk)
    options = Options(
        scale,
        check_values.softcap(asked.softcap, scale),
        check_values.flag("deterministic", asked.deterministic),
        simulated_arch() if q.device.type == "cpu" else None,
    )
    return _Call(method, causal, window, options, check_values.flag("return_lse", asked.return_lse))


def _bounded(side: int, layout: Layout) -> int:
    """A side of the window; -1 where it hides no key, as plans count with 64 bits."""
    return side if 0 <= side < layout.total else -1


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> None:
    expected = (
        f"(batch, {layout.tokens}, heads, head_dim)"
        if layout.dense
        else f"({layout.tokens}, heads, head_dim)"
    )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require_plain(name, tensor)
        if type(tensor) not in PLAIN_TYPES:
            raise TypeError(f"{name} is an AsyncCollectiveTensor: pass what its wait() returns")
        dims = 4 if layout.dense else 3
        if tensor.ndim != dims or tensor.shape[layout.dim] != layout.tokens:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: expected {expected}, the layout's tokens "
                "on this rank (layout.shard gives them)"
            )
        if not kernels.takes(tensor):
            raise TypeError(
                f"{name} has dtype {tensor.dtype}: expected torch.float16 or torch.bfloat16 (CPU "
                "tensors may also be float32 or float64)"
            )
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device} but q {q.dtype} on {q.device}: they "
                "must agree"
            )
        if tensor.shape[: layout.dim] != q.shape[: layout.dim]:
            raise ValueError(f"{name} has batch {tensor.shape[0]} but q {q.shape[0]}")
    if layout.dense and q.shape[0] == 0:
        raise ValueError("q has batch 0: expected at least 1")


def _check_sinks(s_aux: Any, q: Tensor) -> None:
    require_plain("s_aux", s_aux)
    if not s_aux.dtype.is_floating_point or s_aux.dtype.itemsize == 1:
        raise TypeError(f"s_aux has dtype {s_aux.dtype}: expected float32, bfloat16 or float16")
    if s_aux.shape != (q.shape[-2],):
        raise ValueError(
            f"s_aux has shape {tuple(s_aux.shape)}: expected ({q.shape[-2]},), one per query head"
        )
    if s_aux.device != q.device:
        raise ValueError(f"s_aux is on {s_aux.device} but q is on {q.device}: move it there")


def _ring_is_cheaper(layout: Layout, heads: Heads) -> bool:
    """By the costs above, of a mean token of a causal call."""
    division = layout.division
    tokens = max(1, division.total)
    counts = list(zip(division.lengths, division.ranks, strict=True))
    steps = sum(n * (len(ranks) - 1) for n, ranks in counts) / tokens
    rows = sum(n * n / len(ranks) for n, ranks in counts) / tokens  # of a document, on a rank
    of_q = heads.num_heads_q * (heads.head_dim_qk + heads.head_dim_v)
    of_k = heads.num_heads_k * heads.head_dim_qk + heads.num_heads_v * heads.head_dim_v
    ratio = of_k / of_q
    exposed = max(0.0, RING_TRANSFER * ratio - rows / 2)
    exchanged = ALL_TO_ALL * (1 + ratio) * (layout.world - 1) / layout.world
    return steps * (RING_STEP + exposed) <= exchanged


def _facts(call: _Call, q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None) -> dict[str, object]:
    """What all ranks have to agree on."""
    with_gradient = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, s_aux)
    )
    return {
        "call": "attention",
        "batch": q.shape[0] if q.ndim == 4 else None,
        "(heads, head_dim) of q, k, v": tuple(tuple(x.shape[-2:]) for x in (q, k, v)),
        "dtype": str(q.dtype),
        "device": q.device.type,
        "method": call.method,
        "causal": call.causal,
        "window_size": call.window,
        "softmax_scale": call.options.softmax_scale,
        "softcap": call.options.softcap,
        "deterministic": call.options.deterministic,
        "s_aux": None if s_aux is None else str(s_aux.dtype),
        "return_lse": call.return_lse,
        "gradients": with_gradient,
    }


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        s_aux: Tensor | None,
        layout: Layout,
        call: _Call,
    ) -> tuple[Tensor, Tensor]:
        ctx.layout, ctx.call = layout, call
        ctx.set_materialize_grads(False)
        ctx.like = (q.shape, v.shape[-1], q.dtype)
        if call.method == "ring":
            placed = layout.placed(call.causal, call.window, q.device)
            out, lse = ring.forward(placed, layout.group, q, k, v, layout.dim, call.options)
            if s_aux is not None:
                out, lse = add_sink(out, lse, s_aux)
            ctx.save_for_backward(q, k, v, out, lse, s_aux)
        else:
            out, lse, exchanged = _all_to_all(layout, call, q.device).forward(q, k, v, s_aux)
            ctx.heads = (q.shape[-2], k.shape[-2], v.shape[-2])
            ctx.save_for_backward(*exchanged, s_aux)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        layout, call = ctx.layout, ctx.call
        *saved, s_aux = ctx.saved_tensors
        shape, head_dim_v, dtype = ctx.like
        # What arrives may differ between ranks, what is transferred may not.
        if dout is None:
            dout = saved[0].new_zeros((*shape[:-1], head_dim_v), dtype=dtype)
        dout, dlse = in_memory(dout), None if dlse is None else in_memory(dlse)
        if not call.return_lse:
            dlse = None
        elif dlse is None:
            dlse = saved[4].new_zeros((*shape[:-3], shape[-2], shape[-3]))
        ds_aux = None
        if call.method == "ring":
            q, k, v, out, lse = saved
            parts = ring.Saved(dout, dlse, q, k, v, out, lse)
            placed = layout.placed(call.causal, call.window, q.device)
            dq, dk, dv = ring.backward(placed, layout.group, parts, layout.dim, call.options)
            if s_aux is not None:
                ds_aux = sink_gradient(dout, dlse, out, lse, s_aux)
        else:
            exchange = _all_to_all(layout, call, dout.device)
            dq, dk, dv, ds_aux = exchange.backward(dout, dlse, Exchanged(*saved), ctx.heads, s_aux)
        return dq, dk, dv, None if ds_aux is None else ds_aux.to(s_aux.dtype), None, None


def _all_to_all(layout: Layout, call: _Call, device: torch.device) -> AllToAll:
    return AllToAll(
        layout.order(device),
        layout.group,
        layout.rank,
        layout.dim,
        call.causal,
        call.window,
        call.options,
    )
