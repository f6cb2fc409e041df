"""Sums over parts of the keys: results weighed by their softmax_lse, gradients, attention sinks.

Everything is computed in float32 (float64 for float64 inputs). It is also kept so, except where a
row receives one addition only: then the sum is rounded once, at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels
from .steps import Rows


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which sums are computed."""
    return torch.promote_types(dtype, torch.float32)


class Result:
    """(out, softmax_lse) of the rank's queries, put together from launches.

    out: (..., rows, heads, head_dim_v); softmax_lse: (..., heads, rows). `dim` is that of rows in
    out, which is one dimension behind in softmax_lse.
    """

    def __init__(
        self, q: Tensor, head_dim_v: int, dim: int, indices: dict[int, Tensor], merges: int
    ) -> None:
        self.q, self.head_dim_v, self.dim, self.indices = q, head_dim_v, dim, indices
        self.dtype = q.dtype if merges <= 1 else wide(q.dtype)
        self.out: Tensor | None = None
        self.softmax_lse: Tensor | None = None

    def put(self, rows: Rows, out: Tensor, softmax_lse: Tensor) -> None:
        """The first result of these rows."""
        if len(rows) == self.q.shape[self.dim] and rows.index is None:
            self.out, self.softmax_lse = out.to(self.dtype), softmax_lse
            return
        whole_out, whole_lse = self._started()
        put_rows(whole_out, rows, out, self.dim, self.indices)
        put_rows(whole_lse, rows, softmax_lse, self.dim + 1, self.indices)

    def merge(self, rows: Rows, out: Tensor, softmax_lse: Tensor) -> None:
        """Another result of rows that have one, over other keys."""
        whole_out, whole_lse = self._started()
        index = None if rows.index is None else self.indices[id(rows.index)]
        if index is None:
            whole_out = whole_out.narrow(self.dim, rows.start, len(rows))
            whole_lse = whole_lse.narrow(self.dim + 1, rows.start, len(rows))
        if kernels.merge(whole_out, whole_lse, out, softmax_lse, index):
            return
        before, lse_before = whole_out, whole_lse
        if index is not None:
            before = whole_out.index_select(self.dim, index)
            lse_before = whole_lse.index_select(self.dim + 1, index)
        lse = torch.logaddexp(lse_before, softmax_lse)
        # A row that saw no key on either side: both weights are 0, not exp(-inf + inf).
        reference = lse.masked_fill(lse == float("-inf"), 0.0)
        weight_before = torch.exp(lse_before - reference).transpose(-1, -2).unsqueeze(-1)
        weight = torch.exp(softmax_lse - reference).transpose(-1, -2).unsqueeze(-1)
        merged = (before * weight_before).addcmul_(out, weight)
        if index is None:
            before.copy_(merged)
            lse_before.copy_(lse)
        else:
            whole_out.index_copy_(self.dim, index, merged.to(self.dtype))
            whole_lse.index_copy_(self.dim + 1, index, lse)

    def finish(self) -> tuple[Tensor, Tensor]:
        out, softmax_lse = self._started()
        return out.to(self.q.dtype), softmax_lse

    def _started(self) -> tuple[Tensor, Tensor]:
        """Zeros and -inf where no launch comes."""
        if self.out is None or self.softmax_lse is None:
            *batch, rows, heads, _ = self.q.shape
            shape = (*batch, rows, heads, self.head_dim_v)
            self.out = self.q.new_zeros(shape, dtype=self.dtype)
            self.softmax_lse = self.q.new_full(
                (*batch, heads, rows), float("-inf"), dtype=wide(self.q.dtype)
            )
        return self.out, self.softmax_lse


class Sum:
    """A gradient, added up from parts in the order of the calls, the rank's own part last.

    parts: how many additions a row may receive, the first one included.
    """

    def __init__(self, like: Tensor, dim: int, indices: dict[int, Tensor], parts: int) -> None:
        self.like, self.dim, self.indices = like, dim, indices
        self.dtype = like.dtype if parts <= 2 else wide(like.dtype)
        self.sum: Tensor | None = None
        self.waiting: tuple[Rows, Tensor] | None = None  # the first part, in case it has no second

    def add(self, rows: Rows, part: Tensor) -> None:
        """`part` stays as it is until the next call or `finish`."""
        if self.sum is None and self.waiting is None:
            self.waiting = rows, part
            return
        if self.sum is None:
            self.sum = torch.zeros_like(self.like, dtype=self.dtype)
        self._flush(self.sum)
        self._add(self.sum, rows, part)

    def finish(self, own: Tensor | None) -> Tensor:
        """own: of all rows, and may be written to."""
        if self.sum is None:
            total = torch.zeros_like(self.like) if own is None else own.to(self.dtype)
        else:
            total = self.sum if own is None else self.sum.add_(own)
        self._flush(total)
        return total.to(self.like.dtype)

    def _flush(self, total: Tensor) -> None:
        if self.waiting is not None:
            self._add(total, *self.waiting)
            self.waiting = None

    def _add(self, total: Tensor, rows: Rows, part: Tensor) -> None:
        add_rows(total, rows, part, self.dim, self.indices)


def put_rows(total: Tensor, rows: Rows, part: Tensor, dim: int, indices: dict[int, Tensor]) -> None:
    """Writes the rows."""
    if rows.index is None:
        total.narrow(dim, rows.start, len(rows)).copy_(part)
    else:
        total.index_copy_(dim, indices[id(rows.index)], part.to(total.dtype))


def add_rows(total: Tensor, rows: Rows, part: Tensor, dim: int, indices: dict[int, Tensor]) -> None:
    """No row is in an index twice, so that this is reproducible."""
    if rows.index is None:
        total.narrow(dim, rows.start, len(rows)).add_(part)
    else:
        total.index_add_(dim, indices[id(rows.index)], part.to(total.dtype))


def add_sink(out: Tensor, softmax_lse: Tensor, s_aux: Tensor) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse) with one more logit s_aux (heads,) in the softmax's denominator."""
    sink = s_aux.to(softmax_lse.dtype).unsqueeze(-1)
    weight = torch.sigmoid(softmax_lse - sink)
    # -inf - -inf: neither keys nor a sink, a row of zeros
    weight = weight.masked_fill(softmax_lse == float("-inf"), 0.0)
    scaled = (out * weight.transpose(-1, -2).unsqueeze(-1)).to(out.dtype)
    return scaled, torch.logaddexp(softmax_lse, sink)


def sink_gradient(
    dout: Tensor, dlse: Tensor | None, out: Tensor, softmax_lse: Tensor, s_aux: Tensor
) -> Tensor:
    """Of s_aux, from these rows; out and softmax_lse are those with the sink."""
    dtype = softmax_lse.dtype
    inner = (dout.to(dtype) * out.to(dtype)).sum(-1).transpose(-1, -2)
    if dlse is not None:
        inner = inner - dlse
    share = torch.exp(s_aux.to(dtype).unsqueeze(-1) - softmax_lse)
    share = share.masked_fill(softmax_lse == float("-inf"), 0.0)
    by_head = -(share * inner).sum(-1)  # (heads,) or (batch, heads)
    return by_head.reshape(-1, s_aux.shape[0]).sum(0)
