"""Call: all that one attention call says, from the public function to the kernel and back.

Each public function builds one and hands it to `flash_attn_interface/call/autograd.py`; operators
build one from their flat arguments; the backward gets the one that its forward saved. So an
argument that is added here reaches every layer, and none can forget it. Tensors stand apart from
what can be hashed, which goes as it is into the keys of plans.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Tensors(NamedTuple):
    """What the kernels read. A kernel's plan takes these as they are."""

    q: Tensor
    k: Any  # a Tensor; None in a packed call, see `Options.packing`; the cache in a call over one
    v: Any
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    alibi_slopes: Tensor | None = None
    page_table: Tensor | None = None  # block_table; k and v are then pages
    cache_batch_idx: Tensor | None = None
    leftpad_k: Tensor | None = None
    s_aux: Tensor | None = None  # float32 (num_heads_q,): the sinks, one more logit for each row


class Sequences(NamedTuple):
    """The longest sequences, where cu_seqlens are given: numbers, or tensors that hold one."""

    max_seqlen_q: int | Tensor | None = None
    max_seqlen_k: int | Tensor | None = None


class Cache(NamedTuple):
    """What `flash_attn_with_kvcache` has besides: rows to append, and how far the cache is filled.

    In `Tensors`, k and v are then the caches.
    """

    k: Tensor | None = None
    v: Tensor | None = None
    qv: Tensor | None = None
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    seqlens: int | Tensor | None = None  # cache_seqlens
    cu_seqlens_k_new: Tensor | None = None
    rotary_seqlens: Tensor | None = None


class Options(NamedTuple):
    """Everything that is no tensor. The whole of it is part of a plan's key."""

    softmax_scale: float | None = None
    causal: bool = False
    window_size: Any = (-1, -1)
    attention_chunk: int = 0
    softcap: float = 0.0
    dropout_p: float = 0.0
    return_lse: bool = False  # somebody will see softmax_lse
    return_softmax: bool = False
    deterministic: bool = False
    packing: Any = None  # flash_attn_interface/call/packing.py
    backward_backend: str | None = None  # the tree that has to serve the backward
    sm_margin: int = 0
    pack_gqa: bool | None = None
    num_splits: int = 0
    rotary_interleaved: bool = True
    extra: str = ""  # a feature that is being added: kernels that do not list it refuse the call


class Call(NamedTuple):
    """One call. cache: None but for `flash_attn_with_kvcache`."""

    tensors: Tensors
    sequences: Sequences = Sequences()
    cache: Cache | None = None
    options: Options = Options()


class Backward(NamedTuple):
    """What a backward has besides the Call of its forward."""

    dout: Tensor
    out: Tensor  # of the forward, or merged over more keys than k has
    softmax_lse: Tensor
    dq: Tensor  # to be written; any strides
    dk: Tensor
    dv: Tensor
    rng_state: Tensor | None = None  # what the forward returned; only with dropout
    dlse: Tensor | None = None  # gradient of softmax_lse


DENSE = Sequences()
"""Of calls without cu_seqlens."""


def cache_names(call: Call) -> dict[str, Any]:
    """The arguments of a call over a cache that may be tensors, by the public functions' names."""
    tensors, cache = call.tensors, call.cache or Cache()
    return {
        "q": tensors.q,
        "k_cache": tensors.k,
        "v_cache": tensors.v,
        "k": cache.k,
        "v": cache.v,
        "qv": cache.qv,
        "rotary_cos": cache.rotary_cos,
        "rotary_sin": cache.rotary_sin,
        "cache_seqlens": cache.seqlens,
        "cache_batch_idx": tensors.cache_batch_idx,
        "cache_leftpad": tensors.leftpad_k,
        "page_table": tensors.page_table,
        "cu_seqlens_q": tensors.cu_seqlens_q,
        "cu_seqlens_k_new": cache.cu_seqlens_k_new,
        "rotary_seqlens": cache.rotary_seqlens,
        "alibi_slopes": tensors.alibi_slopes,
    }
