"""The calls that sanitize.py checks: every kernel of both trees, at sizes of a few tiles.

A group is a list of cases that share a kernel tree and can run alone. Tensors are allocated to
their exact size, so that memcheck knows both ends; results are looked at by the tests only. On CPU
tensors, inside `flash_attn_interface.simulate`, the same calls run in the simulator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import cache_cases
import probes
import torch
from cache_cases import CacheCase
from cases import Case
from torch import Tensor

import flash_attn
import flash_attn_interface
from flash_attn_interface._common.runtime.arch import arch_of
from flash_attn_interface.context_parallel.kernels import merge as merge_results

Run = Callable[[torch.device], None]
Cases = Sequence[tuple[str, Run]]

# Sequences of the packed cases: empty ones, one row, tails behind the last one.
PACKED = Case(lengths_q=(0, 70, 1, 129), lengths_k=(33, 200, 0, 64), tail=5)
DENSE = Case(batch=1, seqlen_q=150, seqlen_k=217)
CACHE = CacheCase(seqlens=(0, 70, 129), capacity=160)


@dataclass(frozen=True)
class Group:
    """backend: the tree that must serve all cases. entries: the kernels that they launch."""

    backend: str
    entries: tuple[str, ...]
    cases: Cases


def attend(
    case: Case, device: torch.device, backward: bool = False, block: int = 0, **options: Any
) -> None:
    """One call of a function of FlashAttention-2, for its dropout and ALiBi, or FlashAttention-3.

    block: page size of keys and values, which are packed then.
    """
    heads_dims = {
        "q": (case.num_heads_q, case.head_dim_qk),
        "k": (case.num_heads_k, case.head_dim_qk),
        "v": (case.num_heads_v, case.head_dim_v),
    }
    rows_q: tuple[int, ...] = (case.batch, case.seqlen_q)
    rows_k: tuple[int, ...] = (case.batch, case.seqlen_k)
    if case.varlen:
        rows_q, rows_k = (sum(case.lengths_q) + case.tail,), (sum(case.lengths_k) + case.tail,)
        options |= {
            "cu_seqlens_q": _integers([0, *accumulate(case.lengths_q)], device),
            "cu_seqlens_k": _integers([0, *accumulate(case.lengths_k)], device),
            "max_seqlen_q": max(case.lengths_q),
            "max_seqlen_k": max(case.lengths_k),
        }
    if block:
        pages = [-(-length // block) for length in case.lengths_k]
        table = torch.full((len(pages), max(pages)), 2**30, dtype=torch.int32)
        for b, (first, count) in enumerate(zip(accumulate([0, *pages]), pages, strict=False)):
            table[b, :count] = torch.arange(first, first + count)
        rows_k = (sum(pages), block)
        options["block_table"] = table.to(device)
    q, k, v = (
        torch.randn(*(rows_q if name == "q" else rows_k), heads, dim, device=device)
        .to(case.torch_dtype)
        .requires_grad_(backward)
        for name, (heads, dim) in heads_dims.items()
    )
    options |= {"causal": case.causal, "window_size": case.window_size, "softcap": case.softcap}
    if case.alibi or case.dropout_p or block:
        module: Any = flash_attn
        options["dropout_p"] = case.dropout_p
        if case.alibi:
            slopes = torch.rand(case.sequences, case.num_heads_q, device=device)
            options["alibi_slopes"] = slopes[0].clone() if case.alibi == "heads" else slopes
    else:
        module = flash_attn_interface
        options["attention_chunk"] = case.attention_chunk
        if case.seqused_k:
            options |= {
                "seqused_q": _integers(case.seqused_q, device),
                "seqused_k": _integers(case.seqused_k, device),
            }
    function = module.flash_attn_varlen_func if case.varlen else module.flash_attn_func
    result = function(q, k, v, **options)
    out = result[0] if isinstance(result, tuple) else result
    if backward:
        # In this thread, not in the one that serves a GPU's backwards: so that threads compile.
        with torch.autograd.set_multithreading_enabled(False):
            torch.autograd.grad(out, (q, k, v), torch.randn_like(out))


def decode(case: CacheCase, device: torch.device) -> None:
    cache_cases.call(case, cache_cases.make_cache(case, device))


def combine(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """shape: (num_splits, batch, seqlen, num_heads, head_dim_v). The first part saw no key."""
    partial_lse = torch.randn(shape[:-1], device=device)
    partial_lse[0] = float("-inf")
    partial_out = torch.randn(shape, device=device)
    flash_attn_interface.flash_attn_combine(partial_out, partial_lse, out_dtype=dtype)


def merge(
    shape: tuple[int, ...], out_dtype: torch.dtype, indexed: bool, device: torch.device
) -> None:
    """shape: (seqlen, num_heads, head_dim_v) of the part; the result has two rows more."""
    seqlen, heads, head_dim_v = shape
    out = torch.randn(seqlen + 2, heads, head_dim_v, device=device).to(out_dtype)
    part = torch.randn(shape, device=device).bfloat16()
    lse, lse_part = (torch.randn(heads, rows, device=device) for rows in (seqlen + 2, seqlen))
    lse_part[0] = float("-inf")
    rows = torch.arange(1, seqlen + 1, device=device) if indexed else None
    if rows is None:
        out, lse = out[2:], lse[:, 2:]
    assert merge_results(out, lse, part, lse_part, rows)


def mistake(which: int, device: torch.device) -> None:
    """Wrong on purpose, so that a clean report means something: see kernels/probe_planted.cu."""
    from flash_attn_interface._common.launch.driver import device_kernel

    arch = arch_of(torch.cuda.get_device_capability(device))
    spec = probes.probe_spec(MISTAKES_ENTRY, arch, num_threads=64, smem_bytes=1024)
    data, out = (torch.zeros(64, device=device, dtype=torch.int32) for _ in range(2))
    block = probes.LAYOUT.block(
        **{"in": data.data_ptr()}, out=out.data_ptr(), aux=None, count=64, which=which
    )
    kernel = device_kernel(spec, torch.cuda.current_device())
    kernel.launch(1, block.kernel_params_address, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()


MISTAKES_ENTRY = "probe_planted"
MISTAKES = {"memcheck": 0, "racecheck": 1, "synccheck": 2}


def _integers(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _attends(cases: Sequence[Case | tuple[Case, Mapping[str, Any]]], backward: bool) -> Cases:
    found: list[tuple[str, Run]] = []
    for entry in cases:
        case, options = entry if isinstance(entry, tuple) else (entry, {})
        name = "-".join([case.id, *(f"{k}{v}" for k, v in options.items())])
        found.append((name, partial(_attend, case, backward, dict(options))))
    return found


def _attend(case: Case, backward: bool, options: dict[str, Any], device: torch.device) -> None:
    attend(case, device, backward, **options)


def _named(make: Callable[..., None], **cases: Any) -> Cases:
    return [(name, partial(make, *arguments)) for name, arguments in cases.items()]


_GQA = DENSE.with_heads(8, 2, 2)
_DROPOUT = DENSE.but(dropout_p=0.2)

FORWARD = [
    *[DENSE.with_dims(*dims).but(causal=dims[0] != 64)
      for dims in ((32, 64), (64, 128), (96, 192), (128, 256), (192, 128), (64, 64), (256, 256))],
    DENSE.with_dims(40, 59).with_heads(4, 1, 2).but(window_size=(30, 10)),
    DENSE.with_dims(59, 40).but(dtype="fp16", causal=True),  # rows at 2-byte alignment
    DENSE.with_dims(255, 249).but(causal=True),  # likewise, and wide
    _GQA.with_dims(128, 128).but(causal=True),
    DENSE.with_dims(64, 64).but(softcap=15.0, causal=True),
    DENSE.with_dims(64, 128).but(alibi="batched"),
    DENSE.but(attention_chunk=40),
    _DROPOUT.with_dims(64, 64),
    (_DROPOUT.with_dims(128, 128).but(causal=True), {"return_attn_probs": True}),
    PACKED.with_dims(64, 128).with_heads(4, 2, 1).but(causal=True),
    PACKED.with_dims(128, 64).but(window_size=(40, -1)),
    PACKED.but(seqused_q=(0, 33, 1, 128), seqused_k=(5, 64, 0, 63), causal=True),
    (PACKED.with_dims(64, 64).but(tail=0, causal=True), {"block": 16}),
    (PACKED.with_dims(64, 64).but(tail=0), {"block": 1}),
]  # fmt: skip

BACKWARD = [
    *[DENSE.with_dims(*dims).but(causal=dims[0] != 64)
      for dims in ((32, 64), (64, 128), (96, 192), (128, 256), (192, 128), (64, 64))],
    *[_GQA.with_dims(dim, dim).but(causal=True) for dim in (128, 256)],  # two roles of warps
    *[(_GQA.with_dims(dim, dim), {"deterministic": True}) for dim in (64, 256)],
    (DENSE.with_dims(64, 128).with_heads(4, 1, 2).but(causal=True), {"deterministic": True}),
    DENSE.with_dims(40, 59).with_heads(4, 1, 2).but(window_size=(30, 10)),
    DENSE.with_dims(59, 40).but(dtype="fp16", causal=True),
    DENSE.with_dims(255, 249).but(causal=True),
    DENSE.with_dims(64, 64).but(softcap=15.0, causal=True),
    DENSE.with_dims(64, 128).but(alibi="heads"),
    _DROPOUT.with_dims(64, 64),
    _DROPOUT.with_dims(128, 256).but(causal=True),
    PACKED.with_dims(64, 128).with_heads(4, 2, 1).but(causal=True),
    PACKED.with_dims(128, 64).but(window_size=(40, -1)),
]  # fmt: skip

_APPEND = CACHE.but(seqlen_new=3, seqlen_q=3, causal=True)
DECODE = [
    CACHE.with_dims(128, 128).with_heads(8, 2, 2),
    CACHE.with_dims(64, 128).with_heads(8, 1, 1).but(num_splits=3),
    CACHE.with_dims(192, 128).with_heads(16, 1, 1).but(num_splits=2, dtype="fp16"),
    CACHE.with_dims(128, 256).with_heads(4, 1, 2).but(num_splits=2),
    CACHE.with_dims(59, 40).with_heads(3, 3, 1),
    CACHE.but(num_splits=1),
    CACHE.but(leftpad=(0, 5, 40), num_splits=2),
    CACHE.but(batch_idx=True, softcap=2.0),
    CACHE.but(lengths_q=(1, 0, 5), causal=True, num_splits=2),
    CACHE.but(seqlen_q=20, causal=True).with_heads(8, 1, 1).with_dims(64, 64),
    CACHE.but(window_size=(20, 0), page_size=16),
    CACHE.but(alibi=True, seqlen_q=3, causal=True),
    *[CACHE.but(page_size=size, num_splits=splits)
      for size in (1, 16, 64) for splits in (1, 3)],
    CACHE.but(page_size=16, leftpad=(0, 2, 33), batch_idx=True),
    *[CACHE.with_dims(64, 512).with_heads(16, 1, 1).but(qv=True, num_splits=2, page_size=size)
      for size in (0, 16)],
    CACHE.with_dims(40, 300).with_heads(20, 1, 1).but(qv=True),
    CACHE.with_dims(64, 512).with_heads(4, 1, 1).but(num_splits=2),
    _APPEND.but(rotary_dim=32, num_splits=2).with_dims(64, 128),
    _APPEND.but(rotary_dim=16, interleaved=False, page_size=16, num_splits=1),
]  # fmt: skip
APPEND = [
    _APPEND,
    _APPEND.but(page_size=1),
    _APPEND.but(page_size=5, batch_idx=True, leftpad=(0, 5, 9)),
    _APPEND.but(lengths_new=(2, 0, 7), lengths_q=(1, 3, 0), page_size=8, rotary_dim=32),
    _APPEND.but(rotary_dim=16, interleaved=False, dtype="fp16"),
    _APPEND.but(rotary_dim=32, rotary_seqlens=(7, 0, 40), causal=False),
    _APPEND.but(rotary_dim=16).with_dims(59, 40).with_heads(3, 3, 1),
    _APPEND.but(seqlens=(0, 129, 157)).with_dims(256, 256),  # up to the last slot
]

HOPPER = [
    *[DENSE.with_dims(*dims).but(causal=dims[0] != 64)
      for dims in ((32, 64), (64, 128), (96, 192), (128, 256), (192, 128), (64, 64), (256, 256))],
    DENSE.with_dims(128, 128).but(seqlen_q=300, seqlen_k=400, causal=True, batch=2),
    DENSE.with_dims(64, 512),
    DENSE.with_dims(512, 512).but(causal=True),
    PACKED.with_dims(576, 320),
    DENSE.with_dims(40, 72).with_heads(4, 1, 2).but(window_size=(30, 10)),
    DENSE.with_dims(128, 128).but(window_size=(64, 0), seqlen_k=400),
    DENSE.with_dims(64, 64).but(softcap=15.0, causal=True, dtype="fp16"),
    DENSE.with_dims(64, 128).but(alibi="batched"),
    DENSE.but(attention_chunk=40),
    _DROPOUT.with_dims(64, 64),
    _DROPOUT.with_dims(128, 256).but(causal=True),
    PACKED.with_dims(64, 128).with_heads(4, 2, 1).but(causal=True),
    PACKED.with_dims(128, 128).but(window_size=(40, -1)),
    PACKED.with_dims(64, 64).but(seqused_q=(0, 33, 1, 128), seqused_k=(5, 64, 0, 63)),
    DENSE.with_dims(128, 128).with_heads(8, 2, 2).but(batch=2, seqlen_q=3, causal=True),  # packed
    PACKED.with_dims(64, 64).with_heads(8, 1, 1).but(lengths_q=(1, 0, 5, 2), causal=True),
    (_GQA.with_dims(64, 64).but(causal=True), {"sm_margin": 8}),
]  # fmt: skip

# Joint and split roles, pairs of CTAs, additions from registers and in bulk, sums by several CTAs.
HOPPER_BACKWARD = [
    *[DENSE.with_dims(*dims).but(causal=dims[0] != 64)
      for dims in ((32, 64), (64, 128), (96, 192), (128, 256), (192, 128), (64, 64), (256, 256))],
    DENSE.with_dims(256, 256),
    DENSE.with_dims(128, 128).but(seqlen_q=300, seqlen_k=400, causal=True, batch=2),
    _GQA.with_dims(128, 128).but(causal=True),
    DENSE.with_dims(64, 128).with_heads(8, 1, 2),
    DENSE.with_dims(40, 72).with_heads(4, 1, 2).but(window_size=(30, 10)),
    DENSE.with_dims(64, 64).but(softcap=15.0, causal=True, dtype="fp16"),
    DENSE.with_dims(64, 128).but(alibi="batched"),
    DENSE.but(attention_chunk=40),
    _DROPOUT.with_dims(64, 64),
    _DROPOUT.with_dims(128, 256).but(causal=True),
    PACKED.with_dims(64, 128).with_heads(4, 2, 1).but(causal=True),
    PACKED.with_dims(192, 128).but(window_size=(40, -1)),
    PACKED.with_dims(64, 64).but(seqused_q=(0, 33, 1, 128), seqused_k=(5, 64, 0, 63)),
]  # fmt: skip

_FLASH2 = ("flash2_fwd",)
_BACKWARD_ENTRIES = (
    *_FLASH2,
    "flash2_bwd_preprocess",
    "flash2_bwd",
    "flash2_bwd_sum",
    "flash2_bwd_convert",
)
_HOPPER_BACKWARD_ENTRIES = (
    "hopper_fwd",
    "flash2_bwd_preprocess",
    "hopper_bwd",
    "flash2_bwd_sum",
    "flash2_bwd_convert",
)
_CACHE_ENTRIES = ("flash2_append", "flash2_decode", "flash2_fwd")
_COMBINES = {
    "few": ((3, 2, 5, 4, 64), torch.bfloat16),
    "one": ((1, 1, 1, 3, 40), torch.float32),
    "many": ((200, 2, 3, 2, 128), torch.float16),
    "wide": ((7, 1, 130, 2, 256), torch.bfloat16),
    "odd": ((5, 3, 7, 1, 59), torch.float32),
}

_MERGES = {
    "rows": ((37, 3, 128), torch.bfloat16, False),
    "indexed": ((37, 3, 128), torch.float32, True),
    "odd": ((5, 1, 59), torch.bfloat16, True),
    "wide": ((130, 2, 512), torch.float32, False),
}

GROUPS: dict[str, Group] = {
    "forward": Group("flash2", _FLASH2, _attends(FORWARD, backward=False)),
    "backward": Group("flash2", _BACKWARD_ENTRIES, _attends(BACKWARD, backward=True)),
    "decode": Group(
        "flash2", _CACHE_ENTRIES, [(case.id, partial(decode, case)) for case in DECODE]
    ),
    "append": Group(
        "flash2", ("flash2_append", "flash2_decode"), [(c.id, partial(decode, c)) for c in APPEND]
    ),
    "combine": Group("flash2", ("flash2_combine",), _named(combine, **_COMBINES)),
    "merge": Group("flash2", ("flash2_merge",), _named(merge, **_MERGES)),
    "hopper": Group("hopper", ("hopper_fwd", "hopper_fwd_wide"), _attends(HOPPER, backward=False)),
    "hopper_backward": Group(
        "hopper", _HOPPER_BACKWARD_ENTRIES, _attends(HOPPER_BACKWARD, backward=True)
    ),
}
