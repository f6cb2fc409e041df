"""Every public function with arguments, and ways to change and watch a call. For test_watchers.py
and test_watched_gradients.py."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from cache_cases import CacheCase, call, make_cache
from test_autograd import CALLS, dense, draw, ends
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flash_attn as fa2
import flash_attn_interface as fa3

BF16 = torch.bfloat16


# ---- every public function ---------------------------------------------------------------------

Made = tuple[Callable[..., Any], dict[str, Any]]
"""(function, all its arguments by name). Results are compared, and the caches after the call."""

NAMES = {"fa2-kvpacked": ("q", "kv"), "fa2-varlen-kvpacked": ("q", "kv")}


def _of_autograd(name: str, device: torch.device) -> Made:
    function, inputs, _, _ = CALLS[name](device)
    names = ("qkv",) if len(inputs) == 1 else NAMES.get(name, ("q", "k", "v"))
    return function.func, dict(zip(names, inputs, strict=True)) | function.keywords


def _f3b2(name: str, device: torch.device) -> Made:
    _, arguments = _of_autograd(name.replace("f3b2", "fa3"), device)
    function = fa3.flash_attn_f3b2_varlen_func if "varlen" in name else fa3.flash_attn_f3b2_func
    return function, arguments


def _paged(device: torch.device) -> Made:
    pages = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32, device=device)
    return fa2.flash_attn_varlen_func, {
        "q": draw(12, 4, 24, device=device),
        "k": draw(4, 16, 2, 24, device=device),
        "v": draw(4, 16, 2, 24, device=device),
        "cu_seqlens_q": ends(0, 5, 12, device=device),
        "cu_seqlens_k": ends(0, 20, 51, device=device),
        "max_seqlen_q": 7,
        "max_seqlen_k": 31,
        "causal": True,
        "block_table": pages,
    }


def cache_call(case: CacheCase, device: torch.device) -> Made:
    return partial(call, case), {"tensors": make_cache(case, str(device))}


def _combine(device: torch.device) -> Made:
    parts = {
        "out_partial": torch.randn(3, 2, 7, 2, 24, device=device),
        "lse_partial": torch.randn(3, 2, 7, 2, device=device),
    }
    return fa3.flash_attn_combine, parts


APPEND = CacheCase(seqlens=(3, 33), seqlen_new=2, seqlen_q=2, causal=True, rotary_dim=16)
FUNCTIONS: dict[str, Callable[[torch.device], Made]] = {
    **{name: partial(_of_autograd, name) for name in CALLS},
    "fa2-alibi": lambda device: (
        fa2.flash_attn_func,
        {
            **dict(zip("qkv", dense(device), strict=True)),
            "alibi_slopes": torch.rand(4, device=device),
        },
    ),
    "f3b2": partial(_f3b2, "f3b2"),
    "f3b2-varlen": partial(_f3b2, "f3b2-varlen"),
    "fa2-paged": _paged,
    "fa3-kvcache": partial(cache_call, CacheCase(seqlens=(3, 33))),
    "fa3-kvcache-append": partial(cache_call, APPEND),
    "fa3-kvcache-ragged-pages": partial(
        cache_call, APPEND.but(lengths_q=(1, 3), lengths_new=(2, 1), page_size=16, qv=True)
    ),
    "fa2-kvcache": partial(cache_call, CacheCase(seqlens=(3, 33), alibi=True)),
    "fa2-kvcache-append": partial(
        cache_call, APPEND.but(alibi=True, leftpad=(1, 2), batch_idx=True)
    ),
    "combine": _combine,
}
every_function = pytest.mark.parametrize("make", FUNCTIONS.values(), ids=FUNCTIONS)


def mapped(change: Callable[[Tensor], Tensor], made: Made) -> Made:
    """With a changed copy of every tensor."""
    function, arguments = made

    def change_one(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: change_one(item) for name, item in value.items()}
        return change(value.clone()) if isinstance(value, Tensor) else value

    return function, change_one(arguments)


def run(made: Made) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Results, and the caches after the call."""
    function, arguments = made
    results = function(**arguments)
    tensors = arguments.get("tensors", {})
    caches = {name: tensors[name] for name in ("k_cache", "v_cache") if name in tensors}
    return [results] if isinstance(results, Tensor) else list(results), caches


def steps(tensor: Tensor) -> list[int]:
    """Strides that matter."""
    return [step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def check_same(made: Made, watched: Made, watching: Any = None) -> None:
    want, caches = run(mapped(lambda tensor: tensor, made))
    with nullcontext() if watching is None else watching:
        got, changed = run(watched)
    for mine, theirs in zip(got, want, strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert steps(mine) == steps(theirs)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    for name, cache in caches.items():
        torch.testing.assert_close(changed[name], cache, rtol=0, atol=0, equal_nan=True)


class Operators(TorchDispatchMode):
    """Remembers whose operators it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if "flash_attn" in str(function):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))
