"""Which row of the rotary tables each token gets, and the user errors on the way there.

Called by rotary.py for each public function. Nothing here reads device memory, so nothing waits for
the device: values of offsets and cu_seqlens are trusted, and a position beyond the tables becomes
the identity, cos = 1 and sin = 0.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What x is rotated in."""
    return torch.promote_types(x.dtype, torch.float32)


def rows_for_tokens(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | Tensor | None = None,
    *,
    suffix: str = "",
) -> tuple[Tensor, Tensor]:
    """The rows of cos and sin for the tokens of x, in `compute_dtype`, broadcasting over heads.

    Args:
        x: (batch, seqlen, ..., head_dim), or (total, num_heads, head_dim) with cu_seqlens.
        cos, sin, seqlen_offsets, cu_seqlens, max_seqlen: as in `rotary.apply_rotary_emb`.
        suffix: of the tables' names in messages.

    Returns: (seqlen or total, 1, ..., rotary_dim / 2), or with a dim for the batch in front, twice.
    """
    check_tables(x, cos, sin, suffix)
    if cos.ndim != 2:
        raise ValueError(
            f"cos{suffix} has shape {tuple(cos.shape)}: expected (seqlen_ro, rotary_dim / 2); "
            "apply_rotary_emb_torch takes a table for each sequence"
        )
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise NotImplementedError(
            f"cos{suffix} or sin{suffix} requires a gradient, which this function does not "
            "compute: use apply_rotary_emb_torch, or detach them"
        )
    batch, seqlen = x.shape[0], x.shape[1]
    if cu_seqlens is not None:
        batch = _check_cu_seqlens(cu_seqlens, x)
        seqlen = _checked_max_seqlen(max_seqlen)
    offsets = _checked_offsets(seqlen_offsets, batch, x)

    seqlen_ro = cos.shape[0]
    first = 0 if isinstance(offsets, Tensor) else offsets
    if first + seqlen > seqlen_ro:
        raise ValueError(
            f"cos{suffix} and sin{suffix} have {seqlen_ro} rows, too few for {seqlen} tokens per "
            f"sequence from position {first} on"
        )
    if cu_seqlens is None and not isinstance(offsets, Tensor):
        rows_cos, rows_sin = (table[offsets : offsets + seqlen] for table in (cos, sin))
    else:
        if seqlen_ro == 0:
            raise ValueError(f"cos{suffix} and sin{suffix} have no rows")
        positions = _positions(x, offsets, cu_seqlens)
        inside = ((positions >= 0) & (positions < seqlen_ro)).unsqueeze(-1)
        positions = positions.clamp(0, seqlen_ro - 1)
        rows_cos = torch.where(inside, cos[positions], 1.0)
        rows_sin = torch.where(inside, sin[positions], 0.0)

    token_dims = 2 if cu_seqlens is None else 1
    over_heads = (..., *[None] * (x.ndim - token_dims - 1), slice(None))
    dtype = compute_dtype(x)
    return rows_cos.to(dtype)[over_heads], rows_sin.to(dtype)[over_heads]


def _positions(x: Tensor, offsets: int | Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Of each token of x: (batch, seqlen), or (total,) with -1 behind the last sequence."""
    if cu_seqlens is None:
        first = offsets.unsqueeze(-1) if isinstance(offsets, Tensor) else offsets
        return first + torch.arange(x.shape[1], device=x.device)
    token = torch.arange(x.shape[0], device=x.device, dtype=cu_seqlens.dtype)
    # Rows behind the last sequence count as sequence number `batch`.
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    first = F.pad(offsets, (0, 1))[sequence] if isinstance(offsets, Tensor) else offsets
    return torch.where(token < cu_seqlens[-1], token - cu_seqlens[sequence] + first, -1)


# ---- checks -------------------------------------------------------------------------------------


def check_floating(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}: expected a torch.Tensor")
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name} is {tensor.dtype}: expected float16, bfloat16, float32 or float64")


def check_layout(name: str, x: Any, *layouts: tuple[str | int, ...]) -> None:
    """A floating tensor in one of the layouts, which give a dim's size or, if it is free, name."""
    check_floating(name, x)
    for layout in layouts:
        if x.ndim == len(layout) and all(
            isinstance(expected, str) or expected == size
            for expected, size in zip(layout, x.shape, strict=True)
        ):
            return
    shown = " or ".join("(" + ", ".join(map(str, layout)) + ")" for layout in layouts)
    raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {shown}")


def check_tables(x: Tensor, cos: Any, sin: Any, suffix: str = "") -> None:
    """Two floating tensors of one shape (..., rotary_dim / 2), on the device of x."""
    for name, table in ((f"cos{suffix}", cos), (f"sin{suffix}", sin)):
        check_floating(name, table)
        _check_tensor(name, table, x)
    if cos.shape != sin.shape or cos.ndim == 0:
        raise ValueError(
            f"cos{suffix} has shape {tuple(cos.shape)}, sin{suffix} {tuple(sin.shape)}: "
            "expected one shape, (seqlen_ro, rotary_dim / 2)"
        )
    if 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(
            f"cos{suffix} has {cos.shape[-1]} columns, so rotary_dim is {2 * cos.shape[-1]}: "
            f"expected at most head_dim, {x.shape[-1]}"
        )


def _check_tensor(name: str, tensor: Any, x: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}: expected a torch.Tensor")
    if tensor.device != x.device:
        raise ValueError(
            f"{name} is on {tensor.device}, the tokens are on {x.device}: expected one device"
        )


def _check_cu_seqlens(cu_seqlens: Any, x: Tensor) -> int:
    """The number of sequences."""
    _check_tensor("cu_seqlens", cu_seqlens, x)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens is {cu_seqlens.dtype}: expected int32")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}: expected (batch + 1,)")
    return len(cu_seqlens) - 1


def _checked_max_seqlen(max_seqlen: Any) -> int:
    """0 for a tensor, which is not read."""
    if max_seqlen is None:
        raise ValueError("max_seqlen is None: cu_seqlens needs it")
    return 0 if isinstance(max_seqlen, Tensor) else _index("max_seqlen", max_seqlen)


def _checked_offsets(offsets: Any, batch: int, x: Tensor) -> int | Tensor:
    if not isinstance(offsets, Tensor):
        return _index("seqlen_offsets", offsets)
    _check_tensor("seqlen_offsets", offsets, x)
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"seqlen_offsets is {offsets.dtype}: expected int32 or int64")
    if offsets.shape != (batch,):
        raise ValueError(
            f"seqlen_offsets has shape {tuple(offsets.shape)}: expected (batch,), ({batch},)"
        )
    return offsets


def _index(name: str, value: Any) -> int:
    """An integer >= 0; one that is symbolic while a compiler traces stays so."""
    if not isinstance(value, (int, torch.SymInt)):
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} is {value!r}: expected an integer or a tensor") from None
    if value < 0:
        raise ValueError(f"{name} is {value}: expected >= 0")
    number: int = value
    return number
