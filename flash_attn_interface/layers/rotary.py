"""Rotary position embedding: what `flash_attn.layers.rotary` and `flash_attn.ops.triton.rotary`
export as functions. Which row of the tables a token gets is decided in rotary_positions.py; the
module `RotaryEmbedding`, which makes the tables, is in rotary_embedding.py.

Each pair of lanes (x0, x1) of a head turns by an angle that grows with the token's position (Su et
al., RoFormer, arXiv:2104.09864):

    out0 = x0 * cos - x1 * sin        out1 = x0 * sin + x1 * cos

Row p of the tables `cos` and `sin` belongs to position p. Which lanes make a pair:
    interleaved=False   (t, t + rotary_dim / 2), as GPT-NeoX and Llama; the default here
    interleaved=True    (2 t, 2 t + 1), as GPT-J; the default of `flash_attn_with_kvcache`
Lanes from rotary_dim = 2 * cos.shape[-1] on pass through.

Plain PyTorch on any device, in float32 (float64 for float64 tokens), rounded once. Nothing waits
for the device. The gradient is the conjugate rotation and needs the tables only, which is what lets
the in-place functions be differentiable.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._common.ask.check_overlap import check_outputs
from .._common.ask.check_tensors import require_floating, require_tensor
from .._common.ask.check_values import flag, non_negative
from ..call.watchers import transforming
from .rotary_positions import (
    check_layout,
    check_tables,
    compute_dtype,
    rows_for_tokens,
)

DENSE = ("batch", "seqlen", "num_heads", "head_dim")
PACKED = ("total", "num_heads", "head_dim")
QKV = ("batch", "seqlen", 3, "num_heads", "head_dim")
KV = ("batch", "seqlen", 2, "num_heads_k", "head_dim")

_TABLES = ("cos", "sin", "cos_k", "sin_k")

# ---- public functions ---------------------------------------------------------------------------


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """`apply_rotary_emb` with arguments in the order of upstream's Triton function.

    Args:
        conjugate: turn backwards, i.e. by -sin; this undoes a rotation.
        The others: as in `apply_rotary_emb`.

    Returns: as `apply_rotary_emb`; differentiable in x, which upstream's is not.

    Raises: as `apply_rotary_emb`.
    """
    return rotate_tokens(
        "x", x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace, conjugate
    )


def rotate_tokens(
    name: str,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | Tensor | None,
    interleaved: bool,
    inplace: bool,
    conjugate: bool = False,
) -> Tensor:
    """`apply_rotary` of the argument `name`."""
    if cu_seqlens is None:
        check_layout(name, x, DENSE, why="; packed tokens need cu_seqlens")
    else:
        require_tensor("cu_seqlens", cu_seqlens, "an int32 torch.Tensor")
        check_layout(name, x, PACKED, why=" because cu_seqlens is given")
    tables = rows_for_tokens(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, of=name)
    inplace, conjugate = flag("inplace", inplace), flag("conjugate", conjugate)
    plan = _Plan(x.ndim - 2, (x.shape[-2],), flag("interleaved", interleaved), conjugate)
    return _rotate(x, plan, inplace, tables, name)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | Tensor | None = None,
) -> Tensor:
    """Rotates every head of x by the position of its token.

    Args:
        x: (batch, seqlen, num_heads, head_dim), or (total, num_heads, head_dim) with cu_seqlens;
            float16, bfloat16, float32 or float64, any strides; differentiable.
        cos, sin: (seqlen_ro, rotary_dim / 2), any floating dtype, rotary_dim <= head_dim. They get
            no gradient; `apply_rotary_emb_torch` gives them one.
        interleaved: which lanes make a pair, see the top of this file.
        inplace: write the result into x and return x. A leaf that requires a gradient is written
            to as well, as in FlashAttention-2; what is returned then shares its memory.
        seqlen_offsets: position of the first token: an int, or int32 or int64 (batch,). With an
            int, the tables must reach to the last token. With a tensor, which is not read here,
            tokens that lie beyond the tables stay unrotated.
        cu_seqlens: (batch + 1,) int32 or int64, starts of the packed sequences, and total. Rows of
            x from cu_seqlens[-1] on stay unrotated.
        max_seqlen: longest of the packed sequences; required with cu_seqlens. The tables must reach
            so far. Given as a tensor, it is not read, and tokens beyond the tables stay unrotated.

    Returns: the shape and dtype of x; x itself if inplace.

    Raises: TypeError for wrong types and dtypes; ValueError for shapes, devices and lengths that
        disagree, and with inplace for an x that overlaps itself or the tables; NotImplementedError
        for tables that require a gradient.
    """
    return apply_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotates Q and K of a packed qkv in place; V stays.

    Args:
        qkv: (batch, seqlen, 3, num_heads, head_dim), or (batch, seqlen, num_heads_q + 2 *
            num_heads_k, head_dim) with the heads of Q first, then K's, then V's; dtypes as x of
            `apply_rotary_emb`. Differentiable; leaves that require a gradient as there.
        cos, sin: (seqlen_ro, rotary_dim / 2).
        cos_k, sin_k: tables for K where they differ from Q's, as XPos needs; both or neither.
        interleaved, seqlen_offsets: as in `apply_rotary_emb`.
        num_heads_q: required for the 4-dim form; the 5-dim form ignores it.

    Returns: qkv.

    Raises: as `apply_rotary_emb`.
    """
    check_layout("qkv", qkv, QKV, DENSE)
    num_q, num_k = (1, 1) if qkv.ndim == 5 else _head_counts(qkv.shape[2], num_heads_q)
    interleaved = flag("interleaved", interleaved)
    tables: tuple[Tensor, ...] = rows_for_tokens(qkv, cos, sin, seqlen_offsets, of="qkv")
    if cos_k is None and sin_k is None:
        plan = _Plan(axis=2, sizes=(num_q + num_k,), interleaved=interleaved)
    elif cos_k is None or sin_k is None:
        raise ValueError("cos_k and sin_k: expected both or neither")
    else:
        plan = _Plan(axis=2, sizes=(num_q, num_k), interleaved=interleaved)
        tables += rows_for_tokens(qkv, cos_k, sin_k, seqlen_offsets, suffix="_k", of="qkv")
    return _rotate(qkv, plan, True, tables, "qkv")


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """Rotates K of a packed kv in place; V stays.

    Args:
        kv: (batch, seqlen, 2, num_heads_k, head_dim), otherwise as qkv of `apply_rotary_emb_qkv_`.
        cos, sin: (seqlen_ro, rotary_dim / 2).
        interleaved, seqlen_offsets: as in `apply_rotary_emb`.

    Returns: kv.

    Raises: as `apply_rotary_emb`.
    """
    check_layout("kv", kv, KV)
    tables = rows_for_tokens(kv, cos, sin, seqlen_offsets, of="kv")
    plan = _Plan(axis=2, sizes=(1,), interleaved=flag("interleaved", interleaved))
    return _rotate(kv, plan, True, tables, "kv")


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """The formula in a few differentiable operations; also the tables get gradients.

    Args:
        x: (..., num_heads, head_dim), for example (batch, seqlen, num_heads, head_dim).
        cos, sin: (..., rotary_dim / 2), a row per token: (seqlen, rotary_dim / 2), or (batch,
            seqlen, rotary_dim / 2) for positions that differ between sequences.
        interleaved: which lanes make a pair, see the top of this file.

    Returns: the shape and dtype of x.

    Raises: TypeError for wrong types and dtypes; ValueError for shapes and devices that disagree.
    """
    require_floating("x", x)
    interleaved = flag("interleaved", interleaved)
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (..., num_heads, head_dim)")
    check_tables(x, cos, sin)
    tokens, rows = x.shape[:-2], cos.shape[:-1]
    fits = all(row in (1, n) for row, n in zip(reversed(rows), reversed(tokens), strict=False))
    if len(rows) > len(tokens) or not fits:
        raise ValueError(
            f"cos has shape {tuple(cos.shape)}: expected a row for each token of x, whose shape is "
            f"{tuple(x.shape)}"
        )
    cos, sin = (table.to(compute_dtype(x)).unsqueeze(-2) for table in (cos, sin))
    pair = _turned(*_lanes(x, 2 * cos.shape[-1], interleaved), cos, sin)
    rotated = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((rotated.to(x.dtype), x[..., 2 * cos.shape[-1] :]), -1)


# ---- the rotation -------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """What to rotate: the first sizes[0] entries of `axis` by the first pair of tables, the next
    sizes[1] by the second pair, if there is one. The axis counts heads, or q, k and v."""

    axis: int
    sizes: tuple[int, ...]
    interleaved: bool
    conjugate: bool = False


class _Rotation(torch.autograd.Function):
    """Saves the tables' rows and no tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan, inplace: bool, *tables: Tensor) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(*tables)
        if inplace and not x.is_leaf:  # a leaf that requires a gradient autograd would refuse
            ctx.mark_dirty(x)
        return _rotated(x, plan, inplace, tables)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # Not in place: the gradient may belong to others, too.
        tables = ctx.saved_tensors
        plan = ctx.plan._replace(conjugate=not ctx.plan.conjugate)
        return (
            _rotate(grad_output, plan, False, tables, "grad"),
            None,
            None,
            *([None] * len(tables)),
        )


def _rotate(x: Tensor, plan: _Plan, inplace: bool, tables: tuple[Tensor, ...], name: str) -> Tensor:
    """x, the argument `name`, rotated as planned by tables = (cos, sin, ...) from
    `rows_for_tokens`."""
    if inplace and not torch.compiler.is_compiling():
        check_outputs({name: x}, dict(zip(_TABLES, tables, strict=False)))
    # A compiler and torch.func derive the same backward themselves.
    derived = torch.compiler.is_compiling() or transforming()
    if derived or not (torch.is_grad_enabled() and x.requires_grad):
        return _rotated(x, plan, inplace, tables)
    out: Tensor = _Rotation.apply(x, plan, inplace, *tables)  # type: ignore[no-untyped-call]
    return out


def _rotated(x: Tensor, plan: _Plan, inplace: bool, tables: tuple[Tensor, ...]) -> Tensor:
    whole_heads = all(2 * table.shape[-1] == x.shape[-1] for table in tables)
    if inplace:
        out = x
    elif whole_heads and sum(plan.sizes) == x.shape[plan.axis]:
        out = torch.empty_like(x)
    else:
        out = x.clone()
    start = 0
    for size, cos, sin in zip(plan.sizes, tables[::2], tables[1::2], strict=True):
        rotary_dim = 2 * cos.shape[-1]
        source = _lanes(x.narrow(plan.axis, start, size), rotary_dim, plan.interleaved)
        target = _lanes(out.narrow(plan.axis, start, size), rotary_dim, plan.interleaved)
        # Both results exist before the first write, which may be to x.
        out0, out1 = _turned(*source, cos, -sin if plan.conjugate else sin)
        target[0].copy_(out0)
        target[1].copy_(out1)
        start += size
    return out


def _lanes(x: Tensor, rotary_dim: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and of the second lane of each pair."""
    if interleaved:
        return x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
    return x[..., : rotary_dim // 2], x[..., rotary_dim // 2 : rotary_dim]


def _turned(x0: Tensor, x1: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The formula. The tables' dtype, at least as wide as x's, is that of maths and results."""
    return torch.addcmul(x0 * cos, x1, sin, value=-1), torch.addcmul(x0 * sin, x1, cos)


def _head_counts(num_heads: int, num_heads_q: int | None) -> tuple[int, int]:
    """(num_heads_q, num_heads_k) of a qkv with num_heads heads in all."""
    if num_heads_q is None:
        raise ValueError(
            "num_heads_q is None: a qkv of 4 dims needs it, unless it is Q alone beside kv"
        )
    num_heads_q = non_negative("num_heads_q", num_heads_q)
    num_heads_kv = num_heads - num_heads_q
    if num_heads_q < 1 or num_heads_kv < 2 or num_heads_kv % 2:
        raise ValueError(
            f"num_heads_q is {num_heads_q}, but qkv has {num_heads} heads: expected num_heads_q >= "
            "1 and an even number of heads left, half for K, half for V"
        )
    return num_heads_q, num_heads_kv // 2
