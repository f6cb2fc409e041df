"""How DTensor may shard attention: over the batch and over heads, never along a sequence.

Called by `watched.py`, `paged.py` and `kvcache.py`. Rules are registered with DTensor for the
operators of `ops.py`, `fa2_ops.py` and `kv_ops.py` when the first DTensor arrives, since
the import of torch.distributed.tensor takes longer than that of this package.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Axes(NamedTuple):
    """Which dimension of a tensor is the batch's and which the heads'; None: it has none."""

    batch: int | None
    heads: int | None


_NONE = _Axes(None, None)
_PER_SEQUENCE = _Axes(0, None)

# Of the operators' arguments and results, by name: without cu_seqlens, and with them.
_DENSE = {
    **dict.fromkeys(("q", "k", "v", "qv", "k_cache", "v_cache", "out", "dout"), _Axes(0, 2)),
    **dict.fromkeys(("dq", "dk", "dv"), _Axes(0, 2)),
    **dict.fromkeys(("softmax_lse", "dlse"), _Axes(0, 1)),
    **dict.fromkeys(("seqused_q", "seqused_k", "cache_seqlens", "cache_batch_idx"), _PER_SEQUENCE),
    **dict.fromkeys(("cache_leftpad", "page_table", "rotary_seqlens"), _PER_SEQUENCE),
}
_PACKED = {
    **dict.fromkeys(("q", "k", "v", "qv", "out", "dout", "dq", "dk", "dv"), _Axes(None, 1)),
    **dict.fromkeys(("k_cache", "v_cache"), _Axes(None, 2)),
    **dict.fromkeys(("softmax_lse", "dlse"), _Axes(None, 0)),
}
_KEYS = ("k", "v", "k_cache", "v_cache", "dk", "dv")

_RESULTS = {
    "flash_attn::_flash_attn_forward": ("out", "softmax_lse", "s_dmask", "rng_state"),
    "flash_attn::_flash_attn_varlen_forward": ("out", "softmax_lse", "s_dmask", "rng_state"),
    "flash_attn_interface::attention_forward": ("out", "softmax_lse", "s_dmask", "rng_state"),
    "flash_attn_interface::attention_backward": ("dq", "dk", "dv"),
    "flash_attn_interface::attend_over_cache": ("out", "softmax_lse"),
    "flash_attn_interface::append_and_attend": ("out", "softmax_lse"),
}


def on_one_mesh(tensors: Sequence[Any], dropout_p: float = 0.0) -> tuple[Any, ...]:
    """`tensors` as they are, or, if q is a DTensor, all of them as DTensors.

    Plain ones (lengths, slopes) are taken to be the same on every rank.

    Raises:
        NotImplementedError: q is sharded along its sequence or head dim, or there is dropout.
        TypeError: another tensor is a DTensor while q is not.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return tuple(tensors)
    from torch.distributed.tensor import DTensor, Replicate

    distributed = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    if not distributed:
        return tuple(tensors)
    if not isinstance(tensors[0], DTensor):
        raise TypeError(
            "q is not a DTensor but another argument is: make all of q, k and v DTensors of one "
            "device mesh, or none (to_local())"
        )
    if dropout_p > 0.0:
        raise NotImplementedError(
            "dropout_p > 0 with DTensor: ranks that hold the same rows would drop different "
            "values. Pass dropout_p=0.0, or call it on local tensors (to_local(), local_map)."
        )
    register()
    mesh = tensors[0].device_mesh
    same = [Replicate()] * mesh.ndim
    return tuple(
        DTensor.from_local(tensor, mesh, same, run_check=False)
        if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor)
        else tensor
        for tensor in tensors
    )


def refuse_to_move_caches(q: Any, k_cache: Any, v_cache: Any, k: Any, v: Any) -> None:
    """NotImplementedError where DTensor would have to redistribute a cache, hence append to a copy
    of it, or append the rows of one rank only to a cache that all ranks hold."""
    if not hasattr(q, "placements") or k is None:
        return
    way = _by_heads(q)
    parts = math.prod(q.device_mesh.size(i) for i, part in enumerate(way) if part == "heads")
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
        if _by_heads(tensor) != way:
            raise NotImplementedError(
                f"{name} is placed as {tensor.placements} but q as {q.placements}: with new keys "
                "and values all of q, k_cache, v_cache, k and v must be divided alike, since a "
                "cache that DTensor redistributes is another tensor"
            )
        if tensor.shape[-2] % parts:
            raise NotImplementedError(
                f"{name} has {tensor.shape[-2]} heads, which {parts} parts of the mesh cannot "
                "share: DTensor would redistribute the cache, and a copy be appended to"
            )


def _by_heads(tensor: Any) -> tuple[Any, ...]:
    """Placements, those by heads (whose axis depends on the layout) named so."""
    from torch.distributed.tensor import Shard

    heads = Shard(tensor.ndim - 2)
    return tuple("heads" if placement == heads else placement for placement in tensor.placements)


@functools.cache
def register() -> None:
    """Tells DTensor the rules. NotImplementedError if this torch has no way to."""
    try:
        from torch.distributed.tensor.experimental import register_sharding
    except ImportError as error:
        raise NotImplementedError(
            f"attention of DTensors needs a newer torch ({error}): call it on local tensors "
            "(to_local(), local_map)"
        ) from error
    for name, results in _RESULTS.items():
        namespace, operator = name.split("::")
        overload = getattr(getattr(torch.ops, namespace), operator).default
        register_sharding(overload)(_rule(overload, results))


def _rule(overload: Any, results: tuple[str, ...]) -> Callable[..., list[Any]]:
    """What register_sharding wants: from arguments, in which specs stand for tensors, to pairs of
    (placements of results, placements of arguments) on one dimension of the mesh."""
    names = [argument.name for argument in overload._schema.arguments]

    def acceptable(*values: Any) -> list[Any]:
        given = dict(zip(names, values, strict=False))
        return [
            ([place(name) for name in results], [_placed(place, *item) for item in given.items()])
            for place in _ways(given)
        ]

    return acceptable


def _placed(place: Callable[[str], Any], name: str, value: Any) -> Any:
    return place(name) if hasattr(value, "placements") else None


def _ways(given: dict[str, Any]) -> list[Callable[[str], Any]]:
    """Placements by name, of each way to divide the work. The first of the cheapest is taken."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    axes = _axes(given)
    keys = [name for name in ("k", "v", "k_cache", "v_cache") if hasattr(given.get(name), "mesh")]
    heads = [given[name].shape[axes[name].heads or 0] for name in ("q", *keys)]

    def shard(axis: int | None) -> Any:
        return Replicate() if axis is None else Shard(axis)

    ways: list[Callable[[str], Any]] = [lambda name: Replicate()]
    if axes["q"].batch is not None and _batch_can_be_sharded(given):
        ways.append(lambda name: shard(axes.get(name, _NONE).batch))
    parts = _parts_of_heads(given, axes, ("q", *keys))
    if all(count % parts == 0 for count in heads):
        ways.append(lambda name: shard(axes.get(name, _NONE).heads))
    elif heads[0] % parts == 0 and all(count == 1 for count in heads[1:]):  # multi-query

        def shared_keys(name: str) -> Any:
            if name in ("dk", "dv"):
                return Partial()
            return Replicate() if name in _KEYS else shard(axes.get(name, _NONE).heads)

        ways.append(shared_keys)

    return ways


def _axes(given: dict[str, Any]) -> dict[str, _Axes]:
    """Of every tensor of the call."""
    packed = any(given.get(name) is not None for name in ("cu_seqlens_q", "cu_seqlens_k"))
    axes = dict(_PACKED if packed else _DENSE)
    if given.get("page_table") is not None or given.get("cache_batch_idx") is not None:
        axes["k_cache"] = axes["v_cache"] = _Axes(None, 2)  # sequences share it
    slopes = given.get("alibi_slopes")
    if slopes is not None:
        axes["alibi_slopes"] = _Axes(None, 0) if len(slopes.shape) == 1 else _Axes(0, 1)
    _refuse_other_placements(given, axes)
    return axes


def _batch_can_be_sharded(given: dict[str, Any]) -> bool:
    """Not where every rank would append other rows to what should be one cache."""
    shared = given.get("page_table") is not None or given.get("cache_batch_idx") is not None
    return not (shared and given.get("k") is not None and "k_cache" in given)


def _refuse_other_placements(given: dict[str, Any], axes: dict[str, _Axes]) -> None:
    from torch.distributed.tensor import Replicate, Shard

    for name in ("q", "k", "v", "k_cache", "v_cache"):
        spec: Any = given.get(name)
        if not hasattr(spec, "placements"):
            continue
        allowed = [Replicate(), *(Shard(axis) for axis in axes[name] if axis is not None)]
        for placement in spec.placements:
            if placement not in allowed:
                raise NotImplementedError(_refusal(name, placement, allowed))


def _refusal(name: str, placement: Any, allowed: Sequence[Any]) -> str:
    return (
        f"{name} is a DTensor placed as {placement}: attention is computed per sequence and head, "
        f"so each dimension of the mesh may have one of {', '.join(map(str, allowed))}. "
        "redistribute() it, or shard sequences by ring attention on local tensors."
    )


def _parts_of_heads(given: dict[str, Any], axes: dict[str, _Axes], names: Sequence[str]) -> int:
    """Into how many parts the heads are divided already: dimensions of the mesh that a tensor is
    sharded over by heads. Others never are: the batch or nothing is cheaper there."""
    from torch.distributed.tensor import Shard

    mesh = given["q"].mesh
    dimensions = {
        i
        for name in names
        for i, placement in enumerate(given[name].placements)
        if placement == Shard(axes[name].heads or 0) and axes[name].heads is not None
    }
    return math.prod(mesh.size(i) for i in dimensions)
