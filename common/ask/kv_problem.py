"""Append: what precedes the attention of one call of flash_attn_with_kvcache, without its data.

Part of the call's `Problem`. Built by `check_kv.py` from checked arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

Strides = tuple[int, int, int]


@dataclass(frozen=True)
class Append:
    """New keys and values are written behind the cached ones (rotated, as q is, if there are rotary
    tables) before the attention, and lengths count the keys before that.

    Of a call that appends and rotates nothing, all fields but the lengths' have their defaults.
    """

    seqlen_new: int = 0  # new keys of each sequence; an upper bound if varlen_new; 0 = no append
    total_new: int = 0  # rows of k_new in memory
    varlen_new: bool = False  # cu_seqlens_k_new given: k_new is (total_new, num_heads_k, ...)
    rotary_dim: int = 0  # lanes of q and of new keys that are rotated; 0 is off
    rotary_interleaved: bool = True  # pairs (0, 1), (2, 3)...; else (t, t + rotary_dim / 2)
    rotary_per_row: bool = False  # row t of q turns by position base + t; else every row by base
    has_rotary_seqlens: bool = False  # the base position; else cache_seqlens is
    has_cache_seqlens: bool = True  # valid keys before the append; else all of the capacity
    one_length: bool = False  # cache_seqlens is an int, that of all sequences; run() gets it
    k_new_strides: Strides = (0, 0, 0)  # as Problem.k_strides
    v_new_strides: Strides = (0, 0, 0)
    rotary_rows: int = 0  # rows of the rotary tables; positions beyond them stay unrotated
    new_vector_bytes: int = 16  # as Problem.vector_bytes, of k_new and v_new

    @property
    def appends(self) -> bool:
        """Whether new keys and values are written to the cache."""
        return self.seqlen_new > 0

    @property
    def rotary(self) -> bool:
        """Whether q and the new keys are rotated."""
        return self.rotary_dim > 0
