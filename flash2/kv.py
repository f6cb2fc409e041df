"""Attention over a key and value cache: append, attend, merge. Called through `backend.py` for
flash_attn_with_kvcache.

The steps are plans of their own: `append.py`, then `fwd.py` or `decode.py` (with the merge of
`combine.py`), all on torch's current stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._common.ask.call import Cache, Tensors
from .._common.ask.out_layout import new_out
from .._common.ask.problem import Problem, Target
from . import decode_tiles, fwd_tiles
from .append import AppendPlan, attention_after_append
from .decode import DecodePlan, chosen_num_splits, num_sms
from .fwd import ForwardPlan

# Packed query rows up to which decode.cu holds all of a unit in one tile, and so reads the cache
# once, where fwd.cu reads it once per query head (from L2, at best).
ONE_TILE_ROWS = 64
# With more rows, the forward serves unless it leaves the machine emptier than this.
FORWARD_MIN_OCCUPANCY = 0.75
LENGTH_BYTES = 4


def attends_by_decode(p: Problem, target: Target) -> bool:
    """Whether decode.cu serves the attention, rather than fwd.cu.

    num_splits 1 is a promise: the bits of flash_attn_func, whatever else is in the batch. More
    splits are an order. 0 leaves the choice to speed. What fwd.cu has not, decode.cu serves, and
    its results too do not depend on what else is in the batch when there is one split.
    """
    if p.qv or p.head_dim_v > fwd_tiles.MAX_HEAD_DIM_V:
        return True
    if p.num_splits > 0:
        return p.num_splits > 1
    if decode_tiles.packed_rows(p) <= ONE_TILE_ROWS:
        return True
    block_m = fwd_tiles.forward_tile(p, target.arch).block_m
    row_tiles = p.num_heads_q * (
        -(-p.total_q // block_m) if p.varlen_q else p.batch * -(-p.seqlen_q // block_m)
    )
    if row_tiles >= FORWARD_MIN_OCCUPANCY * num_sms(target):
        return False
    return chosen_num_splits(p, target) > 1


class CachePlan:
    """One problem over a cache on one target. Not shared between threads; a run compiles."""

    def __init__(self, problem: Problem, target: Target) -> None:
        self.problem = problem
        self.target = target
        self.append: AppendPlan | None = None
        self.decode: DecodePlan | None = None
        self.forward: ForwardPlan | None = None
        self._lengths_offset_bytes = reserved_bytes = 0
        new = problem.append
        if new is not None and (new.appends or new.rotary):
            self.append = AppendPlan(problem, target)
            self._lengths_offset_bytes = -(-self.append.rotated_bytes // 16) * 16
            reserved_bytes = self._lengths_offset_bytes + LENGTH_BYTES * problem.batch
            problem = attention_after_append(problem)
        if problem.total_q == 0:
            return
        if attends_by_decode(problem, target):
            self.decode = DecodePlan(problem, target, reserved_bytes=reserved_bytes)
        else:
            self.forward = ForwardPlan(problem, target)

    def run(
        self, tensors: Tensors, cache: Cache | None = None, rng_state: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, None]:
        """(out, softmax_lse or None, None) of tensors that fit the problem; the caches get the new
        rows."""
        assert cache is not None
        append, decode = self.append, self.decode
        if decode is not None:
            if append is None:
                return *decode.run(tensors, cache), None
            # One allocation: partial results, then the rotated queries, then the lengths.
            q = tensors.q
            scratch = decode.scratch()
            q_rotated = scratch.data_ptr() + decode.reserved_offset_bytes
            seqused_k = q_rotated + self._lengths_offset_bytes
            append.launch(q_rotated, seqused_k, (scratch,), tensors, cache)
            address = q_rotated if append.rotated_bytes else q.data_ptr()
            memory = (q, scratch)
            return *decode.launch(address, seqused_k, memory, scratch, tensors, cache.qv), None
        lengths = cache.seqlens
        if append is not None:
            q, lengths = append.run(tensors, cache)
            tensors = tensors._replace(q=q)
        if self.forward is None:
            return *self._without_queries(tensors.q), None
        if isinstance(lengths, int):
            device = tensors.q.device
            lengths = torch.full((self.problem.batch,), lengths, dtype=torch.int32, device=device)
        out, softmax_lse, _ = self.forward.run(tensors._replace(seqused_k=lengths))
        return out, softmax_lse, None

    def _without_queries(self, q: Tensor) -> tuple[Tensor, Tensor | None]:
        p = self.problem
        lse = q.new_empty(p.lse_shape, dtype=torch.float32) if p.return_lse else None
        return new_out(q, p.head_dim_v), lse

    def describe(self) -> str:
        """Several lines for people: the kernels in their order."""
        steps = [step.describe() for step in (self.append, self.decode, self.forward) if step]
        return "\n".join(steps)
