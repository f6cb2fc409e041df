"""PyTorch's registry of flash attention implementations.

    import flash_attn_interface.integrations.torch as ours
    ours.register()
    torch.nn.attention.activate_flash_attention_impl("flash_attn_interface")

Then scaled_dot_product_attention and varlen_attn on CUDA tensors run this package's kernels, until
torch.nn.attention.restore_flash_attention_impl(). docs/integrations/torch.md is the page for users.

`scaled_dot_product_attention` is taken as a whole, since torch chooses its flash operator only for
equal head dims and square causal masks. The operators below it are taken for whoever calls them
directly: varlen_attn, nested tensors, torch's context parallelism.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ..api.fa2 import flash_attn_func
from ..call.fa2_ops import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
)

NAME = "flash_attn_interface"
_WIDEST = 256
_HALF = (torch.float16, torch.bfloat16)
_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)
_OLDEST_MAJOR = 8
_torch: Any = torch  # where torch's own annotations are incomplete


def register() -> None:
    """Makes "flash_attn_interface" known to torch.nn.attention.activate_flash_attention_impl.

    Nothing else changes before that is called. Calling this twice is fine.

    Raises:
        NotImplementedError: this PyTorch has no registry.
    """
    attention = torch.nn.attention
    if not hasattr(attention, "restore_flash_attention_impl"):
        raise NotImplementedError(
            f"PyTorch {torch.__version__} has no registry of flash attention implementations: it "
            "needs torch.nn.attention.restore_flash_attention_impl, of PyTorch 2.11 or newer. "
            "Or call flash_attn_interface.flash_attn_func instead of scaled_dot_product_attention."
        )
    attention.register_flash_attention_impl(NAME, register_fn=Overrides)


class Overrides:
    """Our implementations in torch's dispatcher, from construction to `remove()`.

    device: dispatch key of the tensors that are served; torch's registry passes none.
    """

    def __init__(self, device: str = "CUDA") -> None:
        # Tensors of inference_mode have no autograd key.
        above, below = (
            _torch.library.Library("aten", "IMPL", key) for key in (f"Autograd{device}", device)
        )
        self._libraries: list[Any] = [above, below]
        for library in self._libraries:
            library.impl("scaled_dot_product_attention", scaled_dot_product_attention)
        for name, ours, refuses in (
            ("_flash_attention_forward", flash_forward, _refuses_forward),
            ("_flash_attention_forward_no_dropout_inplace", flash_forward_out, _refuses_out),
            ("_flash_attention_backward", flash_backward, _refuses_backward),
            ("_scaled_dot_product_flash_attention", dense_forward, _refuses_dense),
            ("_scaled_dot_product_flash_attention_backward", dense_backward, _refuses_backward),
        ):
            if hasattr(torch.ops.aten, name):
                below.impl(name, _Choice(name, device, ours, refuses), with_keyset=True)

    def remove(self) -> None:
        """Restores what torch does by itself."""
        for library in self._libraries:
            library._destroy()
        self._libraries = []


class _Choice:
    """Our implementation of one operator, or torch's where ours refuses."""

    def __init__(
        self,
        name: str,
        device: str,
        ours: Callable[..., Any],
        refuses: Callable[..., str | None],
    ) -> None:
        self._name, self._ours, self._refuses = name, ours, refuses
        get_kernel = getattr(torch.library, "get_kernel", None)
        try:
            self._torchs = get_kernel(f"aten::{name}", device) if get_kernel else None
        except RuntimeError:  # torch has none for this device
            self._torchs = None

    def __call__(self, keys: Any, *arguments: Any, **options: Any) -> Any:
        reason = self._refuses(*arguments, **options)
        if reason is None:
            return self._ours(*arguments, **options)
        if self._torchs is None:
            raise NotImplementedError(
                f"aten::{self._name} is not served for {reason}, and PyTorch {torch.__version__} "
                "gives no access to its own. Call torch.nn.attention.restore_flash_attention_impl()"
            )
        _warn(reason)
        return self._torchs.call_boxed(keys, *arguments, **options)


_warned: set[str] = set()


def _warn(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"{NAME} does not serve {reason}: PyTorch's own attention does, here and from now on "
            "without a warning",
            stacklevel=4,
        )


# ---- scaled_dot_product_attention --------------------------------------------------------------


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As torch's; query (batch, heads, seqlen_q, head_dim_qk), value's head dim is free.

    torch's is_causal lets query i see key j when j <= i, whatever the lengths (top-left).
    """
    tensors = (query, key, value)
    reason = None
    # Other subclasses (DTensor) decide about the operators that torch's implementation calls.
    served = _torch.backends.cuda.flash_sdp_enabled() and all(type(x) in _PLAIN for x in tensors)
    if served:
        reason = _refuses_attention(query, key, value, attn_mask, enable_gqa)
    if not served or reason is not None:
        if reason is not None:
            _warn(reason)
        return torch.ops.aten.scaled_dot_product_attention.default.decompose(  # type: ignore[no-any-return]
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    q, k, v = (x.transpose(1, 2) for x in tensors)
    window = (-1, -1)
    if is_causal:
        k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]  # no query sees keys beyond
        # Ours is aligned at the end; by the difference of the lengths it moves to the start.
        window = (-1, q.shape[1] - k.shape[1])
    square = is_causal and window[1] == 0
    out = flash_attn_func(
        q, k, v, dropout_p=dropout_p, softmax_scale=scale, causal=square,
        window_size=(-1, -1) if square else window,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


def _refuses_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> str | None:
    if attn_mask is not None:
        return "an attn_mask"
    if any(x.ndim != 4 for x in (q, k, v)):
        return "tensors of other than 4 dimensions"
    if len({x.shape[0] for x in (q, k, v)}) != 1 or (
        not enable_gqa and len({x.shape[1] for x in (q, k, v)}) != 1
    ):
        return "batches or heads that differ without enable_gqa"
    return _refuses_tensors(q, k, v, heads=1)


def _refuses_tensors(q: Tensor, k: Tensor, v: Tensor, heads: int) -> str | None:
    """heads: the dim of heads."""
    if q.dtype not in _HALF or {k.dtype, v.dtype} != {q.dtype}:
        return "dtypes other than float16 and bfloat16"
    if q.shape[-1] != k.shape[-1] or max(q.shape[-1], v.shape[-1]) > _WIDEST:
        return f"head dims above {_WIDEST}, or unequal ones of query and key"
    if any(x.numel() == 0 for x in (q, k, v)):
        return "empty tensors"
    if q.shape[heads] % k.shape[heads] or q.shape[heads] % v.shape[heads]:
        return "heads of query that are no multiple of those of key and value"
    if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] < _OLDEST_MAJOR:
        return "GPUs older than sm_80"
    return None


# ---- the operators below it --------------------------------------------------------------------


def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, ...]:
    """aten::_flash_attention_forward: (out, logsumexp, rng_state, unused, debug_attn_mask).

    query: (batch, seqlen_q, heads, head_dim_qk), or with cum_seq_q (total_q, ...). num_splits: our
    forward never splits, so that results do not depend on the rest of the batch.
    """
    left = -1 if window_size_left is None else window_size_left
    right = -1 if window_size_right is None else window_size_right
    softmax_scale = query.shape[-1] ** -0.5 if scale is None else scale
    if cum_seq_q is None:
        results = _flash_attn_forward(
            query, key, value, dropout_p, softmax_scale, is_causal, left, right, 0.0, alibi_slopes,
            return_debug_mask,
        )  # fmt: skip
    else:
        if cum_seq_k is None and seqused_k is not None:  # a paged cache
            ends = seqused_k.cumsum(0, dtype=torch.int32)
            cum_seq_k, seqused_k = torch.nn.functional.pad(ends, (1, 0)), None
        results = _flash_attn_varlen_forward(
            query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, softmax_scale,
            is_causal, left, right, 0.0, alibi_slopes, return_debug_mask, block_table, None,
            seqused_k,
        )  # fmt: skip
    out, softmax_lse, debug_mask, rng_state = results
    unused = torch.zeros((), dtype=torch.uint64, device=query.device)
    return out, softmax_lse, rng_state.view(torch.uint64), unused, debug_mask


def flash_forward_out(out: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """aten::_flash_attention_forward_no_dropout_inplace: writes out, returns logsumexp."""
    found, softmax_lse, *_ = flash_forward(*arguments, **options)
    out.copy_(found)
    return softmax_lse


def flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """aten::_flash_attention_backward: (dq, dk, dv), of what `flash_forward` returned."""
    gradients = [torch.empty_like(x) for x in (query, key, value)]
    shared = (
        dropout_p, query.shape[-1] ** -0.5 if scale is None else scale, is_causal,
        -1 if window_size_left is None else window_size_left,
        -1 if window_size_right is None else window_size_right,
        0.0, None, torch.are_deterministic_algorithms_enabled(),
        rng_state.view(torch.int64) if dropout_p > 0.0 else None,
    )  # fmt: skip
    tensors = (grad_out, query, key, value, out, logsumexp, *gradients)
    # Dense calls reach this with None or with empty tensors.
    if cum_seq_q is None or cum_seq_q.numel() == 0:
        _flash_attn_backward(*tensors, *shared)
    else:
        _flash_attn_varlen_backward(
            *tensors, cum_seq_q, cum_seq_k, max_q, max_k, *shared, zero_tensors=True
        )
    dq, dk, dv = gradients
    return dq, dk, dv


def dense_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """aten::_scaled_dot_product_flash_attention: tensors are (batch, heads, seqlen, head_dim)."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, softmax_lse, *others = flash_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], dropout_p, is_causal, return_debug_mask,
        scale=scale,
    )  # fmt: skip
    return out.transpose(1, 2), softmax_lse, None, None, q.shape[1], k.shape[1], *others


def dense_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    *others: Any,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """aten::_scaled_dot_product_flash_attention_backward."""
    dout, q, k, v, o = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    options: Any = others[2:]  # dense: cum_seq_q and cum_seq_k mean nothing
    gradients = flash_backward(dout, q, k, v, o, logsumexp, None, None, *options, scale=scale)
    return tuple(x.transpose(1, 2) for x in gradients)


def _refuses_forward(
    q: Tensor, k: Tensor, v: Tensor, cum_seq_q: Any, cum_seq_k: Any, *others: Any, **options: Any
) -> str | None:
    if cum_seq_q is None and options.get("seqused_k") is not None:
        return "seqused_k without cum_seq_q"
    if cum_seq_q is not None and cum_seq_k is None and options.get("seqused_k") is None:
        return "cum_seq_q without cum_seq_k"
    return _refuses_tensors(q, k, v, heads=-2)


def _refuses_out(out: Tensor, *arguments: Any, **options: Any) -> str | None:
    return _refuses_forward(*arguments, **options)


def _refuses_dense(q: Tensor, k: Tensor, v: Tensor, *others: Any, **options: Any) -> str | None:
    return _refuses_tensors(q, k, v, heads=1)


def _refuses_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *others: Any, **options: Any
) -> str | None:
    """What the forward refuses by its tensors; heads were checked there."""
    if q.dtype not in _HALF or max(q.shape[-1], v.shape[-1]) > _WIDEST:
        return _refuses_tensors(q, k, v, heads=-2)
    return None
