"""What a plan may be remembered by: flat keys of calls on a GPU, the hot path of `dispatch.py`.

A key holds all that checks and plans depend on: shapes, strides, dtypes, devices and alignment of
the tensors, and the whole of `Options`, so that no option can be left out. Each function also
returns the call as it will be run, with what has to be copied or converted for that.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from .._common.ask.call import Backward, Cache, Call, Sequences, Tensors
from .._common.ask.check_tensors import check_qkv_kind, last_dim_contiguous
from .._common.ask.check_values import is_unlimited, window_pair
from .._common.ask.checks import host_max_seqlen
from .plans import layout_of

_ADDRESS_BITS = 15  # an address matters up to 16-byte alignment


Keyed = tuple[Call, Hashable | None, int]
"""A call as it will be run; its key, None for tensors that are not on a GPU; and the hash of the
addresses of an append's tensors, which must not overlap, else 0."""


def of_forward(call: Call, keep_lse: bool) -> Keyed:
    """Of a call that is not over a key and value cache."""
    tensors, sequences, _, options = call
    (
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, alibi_slopes, page_table, _,
        leftpad_k, s_aux,
    ) = tensors  # fmt: skip
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
        q, k, v = last_dim_contiguous(q), last_dim_contiguous(k), last_dim_contiguous(v)
        q_strides, k_strides, v_strides = q.stride(), k.stride(), v.stride()
        addresses = q.data_ptr() | k.data_ptr() | v.data_ptr()
        call = Call(Tensors(q, k, v, *tensors[3:]), sequences, None, options)
    if not is_unlimited(options.window_size):
        call = with_window(call)
        options = call.options
    ragged = None
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        if (
            sequences.max_seqlen_q.__class__ is not int
            or sequences.max_seqlen_k.__class__ is not int
        ):
            call = with_host_lengths(call)
            sequences = call.sequences
        ragged = (
            sequences, layout_of(cu_seqlens_q), layout_of(cu_seqlens_k),
            None if page_table is None else layout_of(page_table),
            None if leftpad_k is None else layout_of(leftpad_k),
        )  # fmt: skip
    device = q.get_device()
    if device < 0:
        return call, None, 0
    key = (  # flat but for options, since hashing nested tuples is slower
        "forward", q.shape, k.shape, v.shape, q_strides, k_strides, v_strides, q.dtype,
        k.dtype, v.dtype, device, k.get_device(), v.get_device(),
        addresses & _ADDRESS_BITS, options, keep_lse, ragged,
        None if seqused_q is None else layout_of(seqused_q),
        None if seqused_k is None else layout_of(seqused_k),
        None if alibi_slopes is None else layout_of(alibi_slopes),
        None if s_aux is None else layout_of(s_aux),
    )  # fmt: skip
    return call, key, 0


def of_cache(call: Call) -> Keyed:
    """Of a call over a key and value cache, the hot path of decoding."""
    tensors, sequences, cache, options = call
    assert cache is not None
    (
        q, k_cache, v_cache, cu_seqlens_q, _, _, _, alibi_slopes, page_table, cache_batch_idx,
        cache_leftpad, s_aux,
    ) = tensors  # fmt: skip
    k, v, qv, rotary_cos, rotary_sin, cache_seqlens, cu_seqlens_k_new, rotary_seqlens = cache
    q_layout = q.is_contiguous() or q.stride()  # reading strides takes longer
    if q_layout is not True and q_layout[-1] != 1:
        q = last_dim_contiguous(q)
        q_layout = q.stride()
        call = Call(Tensors(q, *tensors[1:]), sequences, cache, options)
    if not is_unlimited(options.window_size):
        call = with_window(call)
        options = call.options
    new: Hashable = None
    k_address = v_address = qv_address = 0
    ragged = rotary = second_query = None
    if k is not None or v is not None:  # to ask for its type takes longer
        if isinstance(k, Tensor) and isinstance(v, Tensor):
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
        if sequences.max_seqlen_q.__class__ is not int:
            call = with_host_lengths(call)
            sequences = call.sequences
        ragged = (sequences, layout_of(cu_seqlens_q))
    if rotary_cos is not None or rotary_sin is not None:
        rotary = _rotary(cache)
    elif rotary_seqlens is not None:
        rotary_seqlens = None  # without tables it means nothing
    if qv is not None:
        qv = last_dim_contiguous(qv) if isinstance(qv, Tensor) else qv
        qv_address = qv.data_ptr() if isinstance(qv, Tensor) else 0
        second_query = (layout_of(qv), qv_address & _ADDRESS_BITS)
    if (
        k is not cache.k
        or v is not cache.v
        or qv is not cache.qv
        or (rotary_seqlens is not cache.rotary_seqlens)
    ):
        cache = Cache(k, v, qv, *cache[3:7], rotary_seqlens)
        call = Call(call.tensors, call.sequences, cache, options)
    device = q.get_device()
    if device < 0:
        return call, None, 0
    q_address, k_cache_address, v_cache_address = (
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
    )
    key = (
        "cache", q.shape, k_cache.shape, v_cache.shape, q_layout,
        k_cache.is_contiguous() or k_cache.stride(),
        v_cache.is_contiguous() or v_cache.stride(),
        q.dtype, k_cache.dtype, v_cache.dtype, device, k_cache.get_device(),
        v_cache.get_device(),
        (q_address | k_cache_address | v_cache_address) & _ADDRESS_BITS,
        options, new, ragged, rotary, second_query,
        None if cache_seqlens is None else layout_of(cache_seqlens),
        None if page_table is None else layout_of(page_table),
        None if cache_batch_idx is None else layout_of(cache_batch_idx),
        None if cache_leftpad is None else layout_of(cache_leftpad),
        None if s_aux is None else layout_of(s_aux),
        None if alibi_slopes is None else layout_of(alibi_slopes),
    )  # fmt: skip
    if not k_address:
        return call, key, 0
    addresses = (q_address, k_cache_address, v_cache_address, k_address, v_address, qv_address)
    return call, key, hash(addresses)


def _rotary(cache: Cache) -> Hashable:
    cos, sin, seqlens = cache.rotary_cos, cache.rotary_sin, cache.rotary_seqlens
    if not (isinstance(cos, Tensor) and isinstance(sin, Tensor)):
        return layout_of(cos), layout_of(sin)
    return (
        cos.shape, sin.shape, cos.dtype, sin.dtype, cos.get_device(), sin.get_device(),
        cos.is_contiguous() and sin.is_contiguous(),
        None if seqlens is None else layout_of(seqlens),
    )  # fmt: skip


def of_backward(call: Call, backward: Backward) -> Keyed:
    """Of a backward, whose call has contiguous last dims."""
    if not is_unlimited(call.options.window_size):
        call = with_window(call)
    tensors, sequences, _, options = call
    if tensors.cu_seqlens_q is not None or tensors.cu_seqlens_k is not None:
        call = with_host_lengths(call)
        sequences = call.sequences
    q = tensors.q
    if not q.is_cuda:
        return call, None, 0
    dout, out, softmax_lse, dq, dk, dv, *others = backward
    large = (*tensors[:3], dout, out, dq, dk, dv)
    addresses = 0
    for tensor in large:
        addresses |= tensor.data_ptr()
    key = (
        "backward", *_layouts(*large, softmax_lse), addresses & _ADDRESS_BITS, options, sequences,
        *_layouts(*tensors[3:], *others),
    )  # fmt: skip
    return call, key, 0


def with_window(call: Call) -> Call:
    """The call with a window that is a pair of integers."""
    options = call.options
    window = options.window_size
    if window.__class__ is tuple and len(window) == 2:
        if window[0].__class__ is int and window[1].__class__ is int:
            return call
    options = options._replace(window_size=window_pair(window))
    return Call(call.tensors, call.sequences, call.cache, options)


def with_host_lengths(call: Call) -> Call:
    """The call with max_seqlen_q and max_seqlen_k as numbers."""
    tensors, sequences, cache, options = call
    lengths = Sequences(
        host_max_seqlen(sequences.max_seqlen_q, tensors.q),
        host_max_seqlen(sequences.max_seqlen_k, tensors.k),
    )
    return Call(tensors, lengths, cache, options)


def _layouts(*tensors: Any) -> list[Hashable]:
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
