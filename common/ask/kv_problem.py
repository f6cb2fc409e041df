"""CacheProblem: what one call of flash_attn_with_kvcache asks, without its data.

Built by `check_kv.py` from checked arguments, read by the backends: the attention over the cache
is an ordinary `Problem` (problem.py), and the append before it is described by the fields here.
"""

from __future__ import annotations

from dataclasses import dataclass

from .problem import Problem, Strides


@dataclass(frozen=True)
class CacheProblem:
    """One call over a key and value cache, normalised.

    The steps of a call: write the new keys and values behind the cached ones (rotated, as q is, if
    there are rotary tables), attend over the cache, merge the splits. In `forward`, seqlen_k is the
    capacity of a sequence in the cache, has_seqused_k is True, and k and v are the caches.
    """

    forward: Problem  # the attention over the cache, after the append
    num_splits: int = 0  # parts of the keys that are attended to separately; 0 = choose
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
    sm_margin: int = 0  # SMs that the caller would like to keep for others
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

    def features(self) -> tuple[str, ...]:
        """Names of everything that is switched on besides the features of `forward`."""
        named = {
            f"append {self.seqlen_new}": self.appends and not self.varlen_new,
            f"append up to {self.seqlen_new}": self.appends and self.varlen_new,
            f"rotary {self.rotary_dim}": self.rotary,
            "qv": self.forward.qv,
            f"num_splits={self.num_splits}": self.num_splits > 0,
            f"sm_margin={self.sm_margin}": self.sm_margin > 0,
        }
        return tuple(name for name, on in named.items() if on)

    def describe(self) -> str:
        """One line for people: the forward's, then 'over a cache, append 1, rotary 64'."""
        return ", ".join([self.forward.describe(), "over a cache", *self.features()])
