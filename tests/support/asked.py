"""Calls from flat arguments, by the names that the public functions have for them."""

from __future__ import annotations

from typing import Any

from flash_attn_interface._common.ask.call import Cache, Call, Options, Sequences, Tensors

_CACHE = {"k": "k", "v": "v", "qv": "qv", "rotary_cos": "rotary_cos", "rotary_sin": "rotary_sin"}
_CACHE |= {"cu_seqlens_k_new": "cu_seqlens_k_new", "rotary_seqlens": "rotary_seqlens"}
_CACHE |= {"cache_seqlens": "seqlens"}
_TENSORS = {"q": "q", "k_cache": "k", "v_cache": "v", "cache_leftpad": "leftpad_k"}
_TENSORS |= {name: name for name in Tensors._fields[3:]}


def _picked(arguments: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names[name]: arguments.pop(name) for name in list(arguments) if name in names}


def forward_call(q: Any, k: Any, v: Any, **arguments: Any) -> Call:
    """Of a function that has no cache."""
    names = {name: name for name in Tensors._fields}
    tensors = Tensors(q, k, v, **_picked(arguments, names))
    lengths = Sequences(**_picked(arguments, {name: name for name in Sequences._fields}))
    return Call(tensors, lengths, None, Options(**arguments))


def cache_call(q: Any, k_cache: Any, v_cache: Any, **arguments: Any) -> Call:
    """Of `flash_attn_with_kvcache`."""
    cache = Cache(**_picked(arguments, _CACHE))
    tensors = Tensors(q, k_cache, v_cache, **_picked(arguments, _TENSORS))
    lengths = Sequences(**_picked(arguments, {name: name for name in Sequences._fields}))
    return Call(tensors, lengths, cache, Options(**arguments))
