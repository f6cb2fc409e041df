"""`rearrange`, which FlashAttention-2's `flash_attn.bert_padding` takes from einops and which
clients import from there. Tensors and names, parentheses and an ellipsis only; einops has more."""

from __future__ import annotations

import math
import re

from torch import Tensor

from .._common.ask.check_tensors import require_tensor
from .._common.ask.check_values import non_negative, shown

_GROUP = re.compile(r"\(([\w\s]*)\)|(\w+)")


def rearrange(tensor: Tensor, pattern: str, **axes_lengths: int) -> Tensor:
    """Permutes, joins and splits axes: rearrange(x, "b s ... -> (b s) ...").

    Args:
        tensor: any dtype, strides and device. The result is a view where one is possible.
        pattern: the axes before and after; (a b) is one axis, of which b runs faster; an ellipsis
            is all the axes that the left side does not name.
        axes_lengths: sizes of axes in parentheses on the left; one of each group may be left out.

    Raises: TypeError for what is no tensor or text; ValueError for patterns that are not of this
        kind, or do not fit the tensor's shape or the lengths.
    """
    require_tensor("tensor", tensor)
    if not isinstance(pattern, str):
        raise TypeError(
            f"pattern is {shown(pattern)}: expected text such as 'b s ... -> (b s) ...'"
        )
    left, right = _sides(pattern, tensor)
    before = [name for group in left for name in group]
    after = [name for group in right for name in group]
    if sorted(before) != sorted(after) or len(set(before)) < len(before):
        raise ValueError(f"pattern is {pattern!r}: expected the same axes on both sides, once each")
    sizes = {name: non_negative(name, size) for name, size in axes_lengths.items()}
    if not sizes.keys() <= set(before):
        raise ValueError(f"pattern is {pattern!r}: not all of {sorted(sizes)} are axes of it")
    for group, size in zip(left, tensor.shape, strict=True):
        open_axes = [name for name in group if name not in sizes]
        known = math.prod(sizes[name] for name in group if name in sizes)
        if len(open_axes) == 1 and known and size % known == 0:
            sizes[open_axes[0]] = size // known
        elif open_axes or known != size:
            raise ValueError(
                f"tensor has shape {tuple(tensor.shape)}: an axis of {size} is not "
                f"({' '.join(group)}) of pattern {pattern!r} with axes_lengths {axes_lengths}"
            )
    apart = tensor.reshape([sizes[name] for name in before])
    turned = apart.permute([before.index(name) for name in after])
    return turned.reshape([math.prod(sizes[name] for name in group) for group in right])


def _sides(pattern: str, tensor: Tensor) -> tuple[list[list[str]], list[list[str]]]:
    """The axes on either side, each as the names that it joins, without an ellipsis."""
    sides = pattern.split("->")
    if len(sides) != 2 or any(side.count("...") > 1 for side in sides):
        raise ValueError(f"pattern is {pattern!r}: expected left -> right, with one ellipsis each")
    named = len(_GROUP.findall(sides[0]))
    rest = tensor.ndim - named if "..." in sides[0] else 0
    if rest < 0 or named + rest != tensor.ndim:
        raise ValueError(
            f"tensor has shape {tuple(tensor.shape)}: the left side of pattern {pattern!r} has "
            f"{named} axes"
        )
    unnamed = " ".join(f"_{i}" for i in range(rest))
    spelled = [side.replace("...", f" {unnamed} ") for side in sides]
    for side in spelled:
        if _GROUP.sub("", side).strip():
            raise ValueError(
                f"pattern is {pattern!r}: expected names, parentheses that do not nest, and ..."
            )
    left, right = ([(a or b).split() for a, b in _GROUP.findall(side)] for side in spelled)
    return left, right
