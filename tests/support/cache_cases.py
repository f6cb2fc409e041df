"""Named problems of flash_attn_with_kvcache, their tensors, and what is expected of them.

As `cases.py`, `inputs.py` and `oracle.py` are for the plain forward. Every slot of the cache that
holds no valid key is NaN, and every entry of the page table that is not needed is out of range: a
kernel that looks there shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import inputs
import oracle
import torch
from cases import DTYPES
from oracle import Expected
from torch import Tensor

import flash_attn
import flash_attn_interface
from flash_attn_interface.reference.kvcache import cache_reference

CacheTensors = dict[str, Any]
"""Keyword arguments of flash_attn_with_kvcache, FlashAttention-3's names."""


@dataclass(frozen=True)
class CacheCase:
    """One call. seqlens: valid keys before the append, one for each sequence of the batch."""

    seqlens: tuple[int, ...] = (0, 5, 33, 64)
    dtype: str = "bf16"
    head_dim_qk: int = 32
    head_dim_v: int = 64
    num_heads_q: int = 4
    num_heads_k: int = 2
    num_heads_v: int = 2
    seqlen_q: int = 1
    lengths_q: tuple[int, ...] = ()  # not empty: ragged queries
    seqlen_new: int = 0
    lengths_new: tuple[int, ...] = ()  # not empty: ragged new keys
    capacity: int = 80
    page_size: int = 0
    leftpad: tuple[int, ...] = ()
    batch_idx: bool = False
    whole: bool = False  # no cache_seqlens
    rotary_dim: int = 0
    interleaved: bool = True
    rotary_seqlens: tuple[int, ...] = ()
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    attention_chunk: int = 0
    softcap: float = 0.0
    softmax_scale: float | None = None
    alibi: bool = False
    qv: bool = False
    num_splits: int = 0
    only_gpu: bool = False
    slow: bool = False  # for cases.on_both

    @property
    def id(self) -> str:
        changed = [self.dtype, f"qk{self.head_dim_qk}-v{self.head_dim_v}"]
        default = CacheCase()
        for name, value in vars(self).items():
            if value != getattr(default, name) and not name.startswith("head_dim"):
                text = "_".join(map(str, value)) if isinstance(value, tuple) else value
                changed.append(name if value is True else f"{name}{text}")
        return "-".join(changed)

    def but(self, **changes: Any) -> CacheCase:
        return replace(self, **changes)

    def with_dims(self, head_dim_qk: int, head_dim_v: int) -> CacheCase:
        return replace(self, head_dim_qk=head_dim_qk, head_dim_v=head_dim_v)

    def with_heads(self, *heads: int) -> CacheCase:
        names = ("num_heads_q", "num_heads_k", "num_heads_v")
        return replace(self, **dict(zip(names, heads, strict=True)))

    @property
    def options(self) -> dict[str, Any]:
        """What the call has besides tensors."""
        return {
            "causal": self.causal,
            "window_size": self.window_size,
            "softcap": self.softcap,
            "softmax_scale": self.softmax_scale,
            "rotary_interleaved": self.interleaved,
        } | ({} if self.alibi else {"attention_chunk": self.attention_chunk})


def make_cache(case: CacheCase, device: torch.device | str) -> CacheTensors:
    """Fresh random tensors."""
    seed = inputs.SEEDS.randrange(1 << 62)
    print(f"make_cache({case.id}): generator seed {seed}")
    generator = torch.Generator(device).manual_seed(seed)
    batch = len(case.seqlens)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device)
        return values.to(DTYPES[case.dtype])

    def integers(values: Sequence[int]) -> Tensor | None:
        return torch.tensor(values, dtype=torch.int32, device=device) if values else None

    lengths = [case.capacity] * batch if case.whole else list(case.seqlens)
    rows = list(range(batch))
    spare = 0
    if case.batch_idx:  # every other row, backwards
        rows, spare = [2 * (batch - 1 - b) + 1 for b in range(batch)], batch
    tensors: CacheTensors = {"cache_batch_idx": integers(rows if case.batch_idx else [])}
    places = []
    if case.page_size:
        pages = -(-case.capacity // case.page_size)
        order = torch.randperm((batch + spare) * pages + 3, generator=torch.Generator()).tolist()
        num_pages, page_size = len(order), case.page_size
        table = torch.full((batch + spare, pages + 2), 2**30, dtype=torch.int32)
        table[:, -2:] = -1
        for b, row in enumerate(rows):
            new = case.lengths_new[b] if case.lengths_new else case.seqlen_new
            for page in range(-(-(lengths[b] + new) // page_size)):
                table[row, page] = order.pop()
            first = case.leftpad[b] if case.leftpad else 0
            table[row, : first // page_size] = -7  # before the first key: not needed either
            at = torch.arange(first, lengths[b])
            places.append((table[row, at // page_size].long(), at % page_size))
        shape = (num_pages, page_size)
        tensors["page_table"] = table.to(device)[:, :pages]
    else:
        shape = (batch + spare, case.capacity)
        for b, row in enumerate(rows):
            at = torch.arange(case.leftpad[b] if case.leftpad else 0, lengths[b])
            places.append((torch.full_like(at, row), at))
    heads_dims = {
        "k_cache": (case.num_heads_k, case.head_dim_qk),
        "v_cache": (case.num_heads_v, case.head_dim_v),
    }
    for name, (heads, dim) in heads_dims.items():
        cache = torch.full((*shape, heads, dim), float("nan"), dtype=DTYPES[case.dtype])
        cache = cache.to(device)
        for place in places:
            cache[place[0].to(device), place[1].to(device)] = draw(len(place[0]), heads, dim)
        tensors[name] = cache

    leading_q = (batch, case.seqlen_q)
    if case.lengths_q:
        leading_q = (sum(case.lengths_q) + 2,)
        tensors["cu_seqlens_q"] = integers([0, *accumulate(case.lengths_q)])
        tensors["max_seqlen_q"] = max(case.lengths_q)
    tensors["q"] = draw(*leading_q, case.num_heads_q, case.head_dim_qk)
    if case.qv:
        tensors["qv"] = draw(*leading_q, case.num_heads_q, case.head_dim_v)
    if case.seqlen_new or case.lengths_new:
        leading_new = (batch, case.seqlen_new)
        if case.lengths_new:
            leading_new = (sum(case.lengths_new) + 1,)
            tensors["cu_seqlens_k_new"] = integers([0, *accumulate(case.lengths_new)])
        tensors["k"] = draw(*leading_new, case.num_heads_k, case.head_dim_qk)
        tensors["v"] = draw(*leading_new, case.num_heads_v, case.head_dim_v)
    if case.rotary_dim:
        angles = torch.rand(case.capacity + 60, case.rotary_dim // 2, generator=generator,
                            device=device) * 6.3  # fmt: skip
        dtype = DTYPES[case.dtype]
        tensors |= {"rotary_cos": angles.cos().to(dtype), "rotary_sin": angles.sin().to(dtype)}
        tensors["rotary_seqlens"] = integers(case.rotary_seqlens)
    tensors["cache_seqlens"] = None if case.whole else integers(case.seqlens)
    tensors["cache_leftpad"] = integers(case.leftpad)
    if case.alibi:
        slopes = torch.rand(batch, case.num_heads_q, generator=generator, device=device) * 0.3
        tensors["alibi_slopes"] = slopes
    return {name: value for name, value in tensors.items() if value is not None}


def call(case: CacheCase, tensors: CacheTensors, **changes: Any) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse) of the public function that serves the case."""
    arguments = tensors | case.options | {"num_splits": case.num_splits} | changes
    if not case.alibi:
        function = flash_attn_interface.flash_attn_with_kvcache
        return function(**arguments, return_softmax_lse=True)[:2]
    if "page_table" in arguments:
        arguments["block_table"] = arguments.pop("page_table")
    return flash_attn.flash_attn_with_kvcache(**arguments, return_softmax_lse=True)


def expect(case: CacheCase, tensors: CacheTensors) -> tuple[Expected, Tensor, Tensor]:
    """What `oracle.check` wants, and the caches after the call; `tensors` are left as they are."""
    out, lse, after = _reference(case, tensors)
    yardstick, _, _ = _reference(case, tensors, exact=False)
    rounding = oracle._max_abs(out.to(yardstick.dtype).double() - out)
    error = max(oracle._max_abs(yardstick.double() - out), rounding)
    finite = lse[torch.isfinite(lse)]
    lse_bound = 2e-5 * max(1.0, oracle._max_abs(finite))
    if case.rotary_dim:  # an element on the edge between two 16-bit numbers may go either way
        lse_bound += 2.0 * error
    expected = Expected(out, lse, None, 2.0 * error + 1e-5, lse_bound)
    return expected, after["k_cache"], after["v_cache"]


def expect_caches(case: CacheCase, tensors: CacheTensors) -> tuple[Tensor, Tensor]:
    """The caches alone, which takes little memory: nobody attends."""
    no_queries = dict(tensors)
    if "cu_seqlens_q" in tensors:
        no_queries |= {name: tensors[name][:0] for name in ("q", "qv") if name in tensors}
        no_queries["cu_seqlens_q"] = torch.zeros_like(tensors["cu_seqlens_q"])
    else:
        no_queries |= {name: tensors[name][:, :0] for name in ("q", "qv") if name in tensors}
    _, _, after = _reference(case, no_queries)
    return after["k_cache"], after["v_cache"]


def _reference(
    case: CacheCase, tensors: CacheTensors, exact: bool = True
) -> tuple[Tensor, Tensor, CacheTensors]:
    """(out, softmax_lse, the tensors after the call).

    exact: attention in float64; but rotated rows are those of the contract, float32 results
    rounded to the dtype of the call.
    """
    copies: CacheTensors = {}
    for name, value in tensors.items():
        if isinstance(value, Tensor) and value.is_floating_point() and name != "alibi_slopes":
            copies[name] = value.double() if exact else value.clone()
        elif name != "max_seqlen_q":
            copies[name] = value
    options = {"upcast": exact, "rotated_dtype": DTYPES[case.dtype]}
    out, lse = cache_reference(**copies, **case.options, **options)
    return out, lse, copies


def check_caches(
    case: CacheCase, before: CacheTensors, after: CacheTensors, k_want: Tensor, v_want: Tensor
) -> None:
    """The new rows are there (k up to the rounding of its rotation), and nothing else changed."""
    _same_bits(after["v_cache"], v_want.to(after["v_cache"].dtype))
    k_got, k_before = after["k_cache"], before["k_cache"]
    if not case.rotary_dim:
        _same_bits(k_got, k_want.to(k_got.dtype))
        return
    rotated = (k_want.isnan() != k_before.isnan()).any(-1).any(-1)
    _same_bits(k_got[~rotated], k_before[~rotated])
    torch.testing.assert_close(k_got[rotated].double(), k_want[rotated], rtol=2.0**-7, atol=2.0**-9)
    _same_bits(
        k_got[rotated][..., case.rotary_dim :],
        k_want[rotated][..., case.rotary_dim :].to(k_got.dtype),
    )


def _same_bits(got: Tensor, want: Tensor) -> None:
    different = (got != want) & ~(got.isnan() & want.isnan())
    assert not different.any(), f"the cache differs at {oracle._first(different)}"


_PAGED = CacheCase(page_size=16)
_NEW = CacheCase(seqlen_new=3, seqlens=(0, 5, 33, 61), seqlen_q=3, causal=True)
_ROTARY = _NEW.but(rotary_dim=32)

CASES = [
    CacheCase(),
    CacheCase(dtype="fp16").with_heads(8, 1, 1),
    CacheCase().with_heads(4, 1, 2),
    CacheCase(whole=True, seqlens=(0, 0)),
    CacheCase(whole=True, seqlens=(0, 0), num_splits=1, page_size=16),
    CacheCase(batch_idx=True),
    CacheCase(leftpad=(0, 5, 17, 3)),
    CacheCase(seqlen_q=5, causal=True),
    CacheCase(seqlen_q=40, causal=True, seqlens=(50, 7)),
    CacheCase(seqlen_q=5, window_size=(7, 2)),
    CacheCase(window_size=(20, 0)),
    CacheCase(attention_chunk=16, seqlen_q=2),
    CacheCase(softcap=2.0, softmax_scale=0.4),
    CacheCase(alibi=True, seqlen_q=3, causal=True),
    CacheCase(lengths_q=(1, 0, 4, 2), causal=True),
    *[_PAGED.but(page_size=size) for size in (1, 3, 16, 64, 256)],
    _PAGED.but(batch_idx=True, leftpad=(0, 2, 18, 33), seqlen_q=2, causal=True),
    _PAGED.but(alibi=True),
    _NEW,
    _NEW.but(seqlen_q=1, seqlen_new=1, page_size=16),
    _NEW.but(batch_idx=True, page_size=5, leftpad=(0, 5, 9, 30)),
    _NEW.but(lengths_new=(2, 0, 7, 1), lengths_q=(1, 3, 0, 2), page_size=8),
    _NEW.but(lengths_new=(2, 0, 7, 1), causal=False, window_size=(9, -1)),
    _ROTARY,
    _ROTARY.but(interleaved=False, rotary_dim=16, dtype="fp16"),
    _ROTARY.but(causal=False, page_size=16),
    _ROTARY.but(rotary_seqlens=(7, 0, 40, 3), leftpad=(0, 1, 2, 3), seqlen_q=5),
    _ROTARY.but(
        lengths_new=(2, 0, 7, 1), lengths_q=(4, 0, 1, 1), rotary_seqlens=(3, 1, 33, 0), page_size=7,
        batch_idx=True, interleaved=False,
    ),
    *[CacheCase(num_splits=splits) for splits in (1, 2, 5)],
    _PAGED.but(num_splits=3, seqlen_q=4, causal=True, page_size=4),
    _NEW.but(num_splits=2, rotary_dim=16).with_dims(64, 128),
    CacheCase(seqlens=(9, 70)).with_dims(192, 128).with_heads(16, 1, 1),
    CacheCase(seqlens=(9, 70), num_splits=2).with_dims(128, 256),
    CacheCase(seqlens=(9, 70)).with_dims(59, 40).with_heads(3, 3, 1),
    CacheCase(qv=True, seqlen_q=3, causal=True),
    _ROTARY.but(qv=True, page_size=16, num_splits=2),
]  # fmt: skip

LARGE = [
    CacheCase(seqlens=(4000, 1, 2500), capacity=4096, only_gpu=True, seqlen_new=1, **options)
    .with_dims(*dims)
    .with_heads(*heads)
    for dims in ((128, 128), (64, 128), (192, 128))
    for heads in ((32, 8, 8), (32, 1, 1), (16, 4, 2))
    for options in (
        {"page_size": 64, "rotary_dim": 64},
        {"num_splits": 7, "seqlen_q": 4, "causal": True},
        {"page_size": 256, "num_splits": 1, "window_size": (1000, 0)},
    )
]
