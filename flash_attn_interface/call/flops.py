"""What torch.utils.flop_counter counts for attention: a formula for each registered operator.

Registered on import of the package, since a FlopCounterMode knows the formulas of its creation.
As for torch's own attention, masks are not subtracted: every query is counted with every key of its
sequence. forward 2 * queries * keys * heads * (head_dim_qk + head_dim_v); backward
2 * queries * keys * heads * (3 * head_dim_qk + 2 * head_dim_v), scores computed again included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

_FORWARDS = (
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::_flash_attn_forward",
    "flash_attn_interface::attention_forward",
)
_BACKWARDS = (
    "flash_attn::_flash_attn_backward",
    "flash_attn::_flash_attn_varlen_backward",
    "flash_attn_3::_flash_attn_backward",
    "flash_attn_interface::attention_backward",
)
_CACHES = ("flash_attn_interface::attend_over_cache", "flash_attn_interface::append_and_attend")


def register() -> None:
    """Enters all formulas. The operators must have been defined."""
    for name in (*_FORWARDS, *_BACKWARDS, *_CACHES):
        namespace, operator = name.split("::")
        packet = getattr(getattr(torch.ops, namespace), operator)
        dims = _backward_dims if name in _BACKWARDS else _forward_dims
        register_flop_formula(packet, get_raw=True)(_formula(packet.default, dims))


def _formula(overload: Any, dims: Callable[[int, int], int]) -> Callable[..., int]:
    arguments = overload._schema.arguments

    def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        given = {argument.name: argument.default_value for argument in arguments}
        given.update(zip(given, args, strict=False))
        given.update(kwargs)
        return _count(given, dims)

    return flops


def _forward_dims(head_dim_qk: int, head_dim_v: int) -> int:
    return head_dim_qk + head_dim_v


def _backward_dims(head_dim_qk: int, head_dim_v: int) -> int:
    return 3 * head_dim_qk + 2 * head_dim_v


def _count(given: dict[str, Any], dims: Callable[[int, int], int]) -> int:
    q, out = given["q"], given.get("out")
    k = _first(given, "k_cache", "k")
    v = _first(given, "v_cache", "v")
    if isinstance(out, Tensor):  # of a backward, whose k and v may be part of q
        num_heads_q, head_dim_v = out.shape[-2:]
    else:
        num_heads_q, head_dim_v = q.shape[-2], v.shape[-1]
    batch = _batch(given, q)
    queries = _lengths(given, "q", q, batch)
    keys = _cache_lengths(given, k, batch) if _is_cache(given) else _lengths(given, "k", k, batch)
    pairs = sum(rows * columns for rows, columns in zip(queries, keys, strict=True))
    both = dims(q.shape[-1], head_dim_v)
    if given.get("qv") is not None:
        both += head_dim_v
    return 2 * pairs * num_heads_q * both


def _first(given: dict[str, Any], *names: str) -> Tensor:
    found: Tensor = _first_or_none(given, *names, "q")
    return found


def _batch(given: dict[str, Any], q: Tensor) -> int:
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        if given.get(name) is not None:
            return int(given[name].shape[0]) - 1
    return int(q.shape[0])


def _is_cache(given: dict[str, Any]) -> bool:
    names = ("k_cache", "page_table", "kv_batch_idx", "k_new", "block_table")
    return any(given.get(name) is not None for name in names)


def _lengths(given: dict[str, Any], side: str, rows: Tensor, batch: int) -> list[int]:
    """Of each sequence's queries or keys; upper bounds where they cannot be read."""
    ends, used = given.get(f"cu_seqlens_{side}"), _values(given.get(f"seqused_{side}"))
    if ends is None:
        lengths = [int(rows.shape[1])] * batch
    elif (starts := _values(ends)) is not None:
        lengths = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    else:
        lengths = [int(given[f"max_seqlen_{side}"])] * batch
    return lengths if used is None else [min(pair) for pair in zip(lengths, used, strict=True)]


def _cache_lengths(given: dict[str, Any], cache: Tensor, batch: int) -> list[int]:
    table = _first_or_none(given, "page_table", "block_table")
    capacity = int(cache.shape[1]) * (1 if table is None else int(table.shape[1]))
    packed = _values(given.get("cu_seqlens_k"))
    if packed is not None:  # of flash_attn_varlen_func(block_table=...)
        return [end - start for start, end in zip(packed, packed[1:], strict=False)]
    lengths = _values(_first_or_none(given, "cache_seqlens", "seqused_k"))
    new = _first_or_none(given, "k_new", "k") if "k_cache" in given else given.get("k_new")
    if lengths is None:
        return [capacity] * batch
    appended = _values(given.get("cu_seqlens_k_new"))
    if appended is not None:
        counts = [end - start for start, end in zip(appended, appended[1:], strict=False)]
    else:
        counts = [0 if new is None else int(new.shape[1])] * batch
    return [min(capacity, sum(pair)) for pair in zip(lengths, counts, strict=True)]


def _first_or_none(given: dict[str, Any], *names: str) -> Any:
    return next((given[name] for name in names if given.get(name) is not None), None)


def _values(tensor: Any) -> list[int] | None:
    """Of a tensor that has any."""
    if not isinstance(tensor, Tensor) or tensor.is_meta or isinstance(tensor, FakeTensor):
        return None
    values: list[int] = tensor.tolist()
    return values
