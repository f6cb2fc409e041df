"""Which row of the rotary tables each token gets, and the user errors on the way there.

Called by rotary.py for each public function. Nothing here reads device memory, so nothing waits for
the device: values of offsets and cu_seqlens are trusted, and a position beyond the tables becomes
the identity, cos = 1 and sin = 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._common.ask.check_tensors import require_device, require_floating, require_tensor
from .._common.ask.check_values import non_negative


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
    of: str = "x",
) -> tuple[Tensor, Tensor]:
    """The rows of cos and sin for the tokens of x, in `compute_dtype`, broadcasting over heads.

    Args:
        x: (batch, seqlen, ..., head_dim), or (total, num_heads, head_dim) with cu_seqlens.
        cos, sin, seqlen_offsets, cu_seqlens, max_seqlen: as in `rotary.apply_rotary_emb`.
        suffix: of the tables' names in messages. of: the name of x in messages.

    Returns: (seqlen or total, 1, ..., rotary_dim / 2), or with a dim for the batch in front, twice.
    """
    check_tables(x, cos, sin, suffix, of)
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
    offsets = _checked_offsets(seqlen_offsets, batch, x, of if cu_seqlens is None else "cu_seqlens")

    seqlen_ro = cos.shape[0]
    first = 0 if isinstance(offsets, Tensor) else offsets
    if first + seqlen > seqlen_ro:
        raise ValueError(
            f"cos{suffix} and sin{suffix} have {seqlen_ro} rows, too few for {seqlen} tokens per "
            f"sequence ({of if cu_seqlens is None else 'max_seqlen'}) from position {first} "
            "(seqlen_offsets) on"
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


def check_layout(name: str, x: Any, *layouts: tuple[str | int, ...], why: str = "") -> None:
    """A floating tensor in one of the layouts, which give a dim's size or, if it is free, name.
    why: ends the message."""
    require_floating(name, x)
    for layout in layouts:
        if x.ndim == len(layout) and all(
            isinstance(expected, str) or expected == size
            for expected, size in zip(layout, x.shape, strict=True)
        ):
            return
    shown = " or ".join("(" + ", ".join(map(str, layout)) + ")" for layout in layouts)
    raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {shown}{why}")


def check_tables(x: Tensor, cos: Any, sin: Any, suffix: str = "", of: str = "x") -> None:
    """Two floating tensors of one shape (..., rotary_dim / 2), on the device of x, the argument
    `of`."""
    for name, table in ((f"cos{suffix}", cos), (f"sin{suffix}", sin)):
        require_floating(name, table)
        require_device(name, table, x.device, of)
    if cos.shape != sin.shape or cos.ndim == 0:
        raise ValueError(
            f"cos{suffix} has shape {tuple(cos.shape)}, sin{suffix} {tuple(sin.shape)}: "
            "expected one shape, (seqlen_ro, rotary_dim / 2)"
        )
    if 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(
            f"cos{suffix} and sin{suffix} have {cos.shape[-1]} columns, so rotary_dim is "
            f"{2 * cos.shape[-1]}: expected at most the head_dim of {of}, {x.shape[-1]}"
        )


def _check_cu_seqlens(cu_seqlens: Any, x: Tensor) -> int:
    """The number of sequences."""
    require_tensor("cu_seqlens", cu_seqlens, "an int32 torch.Tensor")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}: expected int32")
    require_device("cu_seqlens", cu_seqlens, x.device, "x")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}: expected (batch + 1,)")
    return len(cu_seqlens) - 1


def _checked_max_seqlen(max_seqlen: Any) -> int:
    """0 for a tensor, which is not read."""
    if max_seqlen is None:
        raise ValueError("max_seqlen is None: cu_seqlens needs it")
    return 0 if isinstance(max_seqlen, Tensor) else non_negative("max_seqlen", max_seqlen)


def _checked_offsets(offsets: Any, batch: int, x: Tensor, of: str) -> int | Tensor:
    if not isinstance(offsets, Tensor):
        return non_negative("seqlen_offsets", offsets)
    require_tensor("seqlen_offsets", offsets)
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"seqlen_offsets has dtype {offsets.dtype}: expected int32 or int64")
    require_device("seqlen_offsets", offsets, x.device, of)
    if offsets.shape != (batch,):
        raise ValueError(
            f"seqlen_offsets has shape {tuple(offsets.shape)}: expected (batch,), ({batch},) by "
            f"the sequences of {of}"
        )
    return offsets
