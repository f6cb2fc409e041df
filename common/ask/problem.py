"""Problem: what one attention call asks, without its data. Target: the device it asks it of.

Built by `flash_attn_interface/call/dispatch.py` from checked arguments, read by the backends
(`flash2/fwd_tiles.py` turns a Problem into a KernelSpec). Both are frozen and hashable, so that
choices made from them are pure functions. A new feature starts here: a field, then a check, then
backends that refuse or serve it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .kv_problem import Append
from .out_layout import memory_order, strides_in

Strides = tuple[int, int, int]

UNLIMITED = -1
"""A window side without bound."""


@dataclass(frozen=True)
class Target:
    """The device of a call: which machine code it runs and where."""

    arch: str  # "sm_80", "sm_90a": what the kernels are compiled for
    device_index: int  # CUDA ordinal; 0 when simulated
    simulated: bool = False  # CPU tensors under `simulate(arch)`
    gpu: str = ""  # model, for its table of tuned tiles; "" if simulated or unknown

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self.arch}, simulated"
            if self.simulated
            else f"{self.arch}, cuda:{self.device_index}"
        )


@dataclass(frozen=True)
class Problem:
    """One forward call, normalised: calls that mean the same make equal Problems.

    Counts and strides are in elements. Ragged sides ("varlen") have their sequences end to end
    along one token axis, delimited by cu_seqlens on the device; their lengths are not known here,
    only upper bounds.
    """

    dtype: str  # "fp16" | "bf16", of q, k, v and out
    head_dim_qk: int
    head_dim_v: int
    num_heads_q: int
    num_heads_k: int  # divides num_heads_q
    num_heads_v: int  # divides num_heads_q, free of num_heads_k
    batch: int  # sequences, >= 1
    seqlen_q: int  # exact if dense; an upper bound if varlen_q
    seqlen_k: int  # exact if dense; an upper bound if varlen_k
    total_q: int  # rows of q in memory: batch * seqlen_q if dense
    total_k: int
    softmax_scale: float
    varlen_q: bool = False  # cu_seqlens_q given: q is (total_q, num_heads_q, head_dim_qk)
    varlen_k: bool = False
    has_seqused_q: bool = False  # only the first seqused_q[b] rows of sequence b take part
    has_seqused_k: bool = False
    causal: bool = False  # exactly: window (UNLIMITED, 0)
    window_left: int = UNLIMITED
    window_right: int = UNLIMITED  # 0 if causal
    attention_chunk: int = 0  # 0 is off
    softcap: float = 0.0  # 0 is off
    alibi: bool = False
    # (batch, head) of alibi_slopes, those of packed (num_heads_q,) where nothing else matters.
    alibi_strides: tuple[int, int] = (0, 1)
    sink: bool = False  # s_aux: one more logit per query head in the denominator
    dropout_p: float = 0.0
    return_lse: bool = True
    return_softmax: bool = False  # S_dmask wanted; only with dropout
    q_strides: Strides = (
        0,
        0,
        0,
    )  # (batch, row, head); batch is 0 if varlen, and so is any axis of size 1
    k_strides: Strides = (0, 0, 0)
    v_strides: Strides = (0, 0, 0)
    vector_bytes: int = (
        16  # 16 | 8 | 4 | 2: divides every pointer and stride of q, k and v, in bytes
    )
    # Keys and values in a cache: k and v are (cache_slots, rows, heads, head_dim), where a slot
    # holds one sequence or one page, and the batch strides step over slots. seqlen_k is then the
    # capacity of a sequence, and lengths (seqused_k; of pages also cu_seqlens_k, by its
    # differences) count from its first row.
    page_size: int = 0  # rows of a page; 0: not paged
    cache_batch_idx: bool = False  # a sequence's slot, or row of the page table, is given by index
    leftpad_k: bool = False  # first key of each sequence given; masks count from there
    cache_slots: int = 0  # 0: no cache
    # A second query, (batch, seqlen_q, num_heads_q, head_dim_v): its products with v are added to
    # those of q and k. Only with a cache.
    qv: bool = False
    qv_strides: Strides = (0, 0, 0)
    # What precedes the attention of flash_attn_with_kvcache, in which seqlen_k is the capacity of a
    # sequence and has_seqused_k is True. None: a call of another function.
    append: Append | None = None
    num_splits: int = 0  # parts of the keys that are attended to separately; 0 = choose
    extra: str = ""  # a feature that is being added
    # Hints, without influence on the result.
    sm_margin: int = 0  # SMs to leave to others
    pack_gqa: bool | None = None  # rows of heads that share K and V in one tile; None: if it pays

    @property
    def local(self) -> bool:
        """A window other than the causal one."""
        return not self.causal and (self.window_left >= 0 or self.window_right >= 0)

    @property
    def dropout(self) -> bool:
        return self.dropout_p > 0.0

    @property
    def large_softcap(self) -> bool:
        """tanh from exponentials, as the kernels have it, is not precise enough for such a cap."""
        return self.softcap > 1000.0

    @property
    def varlen(self) -> bool:
        return self.varlen_q or self.varlen_k

    @property
    def empty(self) -> bool:
        """No query, or no key: a page table without pages has none, whatever the cache holds."""
        no_room = self.page_size > 0 and self.seqlen_k == 0
        return self.total_q == 0 or self.total_k == 0 or no_room

    @property
    def out_shape(self) -> tuple[int, ...]:
        rows = (self.total_q,) if self.varlen_q else (self.batch, self.seqlen_q)
        return (*rows, self.num_heads_q, self.head_dim_v)

    @property
    def out_order(self) -> tuple[int, ...]:
        """Axes of out but the last, from the outermost to the innermost in memory."""
        strides = self.q_strides[1:] if self.varlen_q else self.q_strides
        return memory_order(self.out_shape[:-1], strides, self.head_dim_qk)

    @property
    def out_strides(self) -> Strides:
        """Of (batch, row, head); batch is 0 if varlen."""
        *batch, row, head = strides_in(self.out_order, self.out_shape[:-1], self.head_dim_v)
        return (batch[0] if batch else 0, row, head)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        if self.varlen_q:
            return self.num_heads_q, self.total_q
        return self.batch, self.num_heads_q, self.seqlen_q

    @property
    def qhead_per_khead(self) -> int:
        return self.num_heads_q // self.num_heads_k

    @property
    def qhead_per_vhead(self) -> int:
        return self.num_heads_q // self.num_heads_v

    def refuses_backward(self) -> str | None:
        """Why no gradients can be had, whatever the backend; None if they can."""
        if self.page_size or self.cache_batch_idx or self.leftpad_k:
            return (
                "gradients reach contiguous keys only: gather pages, or keys behind left padding, "
                "into packed k and v with index_select, which is differentiable"
            )
        return None

    def features(self) -> tuple[str, ...]:
        """Names of everything that is switched on, in a fixed order."""
        named = {
            "causal": self.causal,
            f"window({self.window_left},{self.window_right})": self.local,
            f"attention_chunk={self.attention_chunk}": self.attention_chunk > 0,
            f"softcap={self.softcap:g}": self.softcap > 0,
            "alibi": self.alibi,
            "sink": self.sink,
            f"dropout={self.dropout_p:g}": self.dropout,
            "varlen": self.varlen,
            "seqused": self.has_seqused_q or self.has_seqused_k,
            f"page_size={self.page_size}": self.page_size > 0,
            "cache_batch_idx": self.cache_batch_idx,
            "leftpad": self.leftpad_k,
            "lse": self.return_lse,
            "softmax": self.return_softmax,
            self.extra: bool(self.extra),
        }
        return (*(name for name, on in named.items() if on), *self._cache_features())

    def _cache_features(self) -> Iterator[str]:
        """Those of flash_attn_with_kvcache."""
        if self.append is None:
            return
        new = self.append
        yield "over a cache"
        if new.appends:
            yield f"append {'up to ' if new.varlen_new else ''}{new.seqlen_new}"
        if new.rotary:
            yield f"rotary {new.rotary_dim}"
        if self.qv:
            yield "qv"
        if self.num_splits > 0:
            yield f"num_splits={self.num_splits}"
        if self.sm_margin > 0:
            yield f"sm_margin={self.sm_margin}"

    def describe(self) -> str:
        """One line for people: 'bf16 qk128 v256, heads 8/8/8, batch 2, seqlen 512x512, causal'."""
        heads = f"heads {self.num_heads_q}/{self.num_heads_k}/{self.num_heads_v}"
        size = f"seqlen {self.seqlen_q}x{self.seqlen_k}"
        parts = [
            f"{self.dtype} qk{self.head_dim_qk} v{self.head_dim_v}",
            heads,
            f"batch {self.batch}",
            size,
        ]
        return ", ".join([*parts, *self.features()])


def normalise_window(
    causal: bool, left: int, right: int, seqlen_q: int, seqlen_k: int
) -> tuple[bool, int, int]:
    """(causal, left, right) with the same meaning and fewest bounds.

    Query i sees key j when i + off - left <= j <= i + off + right, off = seqlen_k - seqlen_q.
    Causal forces right = 0. A side that hides nothing becomes UNLIMITED: left >= seqlen_k - 1
    reaches key 0 from the last row, and right >= seqlen_q - 1 reaches the last key from row 0.
    Both hold for any shorter sequence too, so the lengths may be upper bounds (varlen, seqused).
    In particular one query row (decoding) is never causal.
    """
    if causal:
        right = 0
    if left < 0 or left >= seqlen_k - 1:
        left = UNLIMITED
    if right < 0 or right >= seqlen_q - 1:
        right = UNLIMITED
    return left == UNLIMITED and right == 0, left, right
