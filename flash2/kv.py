"""Attention over a key and value cache: append, attend, merge. Called through `backend.py` for
flash_attn_with_kvcache.

The steps are plans of their own: `append.py`, then `fwd.py` or `decode.py` (with the merge of
`combine.py`), all on torch's current stream.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .._common.ask.kv_problem import CacheProblem
from .._common.ask.out_layout import new_out
from .._common.ask.problem import Target
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


def attends_by_decode(problem: CacheProblem, target: Target) -> bool:
    """Whether decode.cu serves the attention, rather than fwd.cu.

    num_splits 1 is a promise: the bits of flash_attn_func, whatever else is in the batch. More
    splits are an order. 0 leaves the choice to speed. What fwd.cu has not, decode.cu serves, and
    its results too do not depend on what else is in the batch when there is one split.
    """
    p = problem.forward
    if p.qv or p.head_dim_v > fwd_tiles.MAX_HEAD_DIM_V:
        return True
    if problem.num_splits > 0:
        return problem.num_splits > 1
    if decode_tiles.packed_rows(p) <= ONE_TILE_ROWS:
        return True
    block_m = fwd_tiles.forward_tile(p, target.arch).block_m
    row_tiles = p.num_heads_q * (
        -(-p.total_q // block_m) if p.varlen_q else p.batch * -(-p.seqlen_q // block_m)
    )
    if row_tiles >= FORWARD_MIN_OCCUPANCY * num_sms(target):
        return False
    return chosen_num_splits(problem, target) > 1


class CachePlan:
    """One CacheProblem on one target. Not shared between threads; compiles nothing before a run."""

    def __init__(self, problem: CacheProblem, target: Target) -> None:
        self.problem = problem
        self.target = target
        self.append: AppendPlan | None = None
        self.decode: DecodePlan | None = None
        self.forward: ForwardPlan | None = None
        self._lengths_offset_bytes = reserved_bytes = 0
        if problem.appends or problem.rotary:
            self.append = AppendPlan(problem, target)
            self._lengths_offset_bytes = -(-self.append.rotated_bytes // 16) * 16
            reserved_bytes = self._lengths_offset_bytes + LENGTH_BYTES * problem.forward.batch
            problem = replace(problem, forward=attention_after_append(problem))
        if problem.forward.total_q == 0:
            return
        if attends_by_decode(problem, target):
            self.decode = DecodePlan(problem, target, reserved_bytes=reserved_bytes)
        else:
            self.forward = ForwardPlan(problem.forward, target)

    def run(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k_new: Tensor | None,
        v_new: Tensor | None,
        qv: Tensor | None,
        cache_seqlens: Tensor | int | None,
        cache_batch_idx: Tensor | None,
        cache_leftpad: Tensor | None,
        page_table: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k_new: Tensor | None,
        rotary_cos: Tensor | None,
        rotary_sin: Tensor | None,
        rotary_seqlens: Tensor | None,
        alibi_slopes: Tensor | None,
        s_aux: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(out, softmax_lse or None) of tensors that fit the problem; k_cache and v_cache get the
        new rows."""
        append, decode = self.append, self.decode
        if decode is not None:
            if append is None:
                return decode.run(
                    q, k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, page_table,
                    cu_seqlens_q, alibi_slopes, qv, s_aux,
                )  # fmt: skip
            # One allocation: partial results, then the rotated queries, then the lengths.
            scratch = decode.scratch()
            q_rotated = scratch.data_ptr() + decode.reserved_offset_bytes
            seqused_k = q_rotated + self._lengths_offset_bytes
            append.launch(
                q_rotated, seqused_k, (scratch,), q, k_cache, v_cache, k_new, v_new, cache_seqlens,
                cache_batch_idx, page_table, cu_seqlens_q, cu_seqlens_k_new, rotary_cos,
                rotary_sin, rotary_seqlens,
            )  # fmt: skip
            return decode.launch(
                q_rotated if append.rotated_bytes else q.data_ptr(), seqused_k, (q, scratch),
                scratch, k_cache, v_cache, cache_batch_idx, cache_leftpad, page_table,
                cu_seqlens_q, alibi_slopes, qv, s_aux,
            )  # fmt: skip
        if append is not None:
            q, cache_seqlens = append.run(
                q, k_cache, v_cache, k_new, v_new, cache_seqlens, cache_batch_idx, page_table,
                cu_seqlens_q, cu_seqlens_k_new, rotary_cos, rotary_sin, rotary_seqlens,
            )  # fmt: skip
        if self.forward is None:
            return self._without_queries(q)
        if isinstance(cache_seqlens, int):
            cache_seqlens = torch.full(
                (self.problem.forward.batch,), cache_seqlens, dtype=torch.int32, device=q.device
            )
        out, softmax_lse, _ = self.forward.run(
            q, k_cache, v_cache, cu_seqlens_q, None, None, cache_seqlens, alibi_slopes, None,
            page_table, cache_batch_idx, cache_leftpad, s_aux,
        )  # fmt: skip
        return out, softmax_lse

    def _without_queries(self, q: Tensor) -> tuple[Tensor, Tensor | None]:
        p = self.problem.forward
        lse = q.new_empty(p.lse_shape, dtype=torch.float32) if p.return_lse else None
        return new_out(q, p.head_dim_v), lse

    def describe(self) -> str:
        """Several lines for people: the kernels in their order."""
        steps = [step.describe() for step in (self.append, self.decode, self.forward) if step]
        return "\n".join(steps)
