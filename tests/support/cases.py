"""Named attention problems of the tests.

A Case says what is asked in plain numbers and prints as its id, such as
bf16-qk64-v128-causal-gqa4-varlen. inputs.py makes its tensors, oracle.py its bounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

NAMED_PAIRS = [(32, 64), (64, 128), (96, 192), (128, 256), (192, 128)]
EQUAL_PAIRS = [(dim, dim) for dim in (32, 64, 96, 128, 192, 256)]
ODD_PAIRS = [(40, 40), (59, 59), (111, 111), (59, 111), (8, 256), (1, 1), (256, 8)]


@dataclass(frozen=True)
class Case:
    """One forward call. Sizes default to something the simulator finishes in about a second."""

    dtype: str = "bf16"
    head_dim_qk: int = 32
    head_dim_v: int = 64
    num_heads_q: int = 2
    num_heads_k: int = 2
    num_heads_v: int = 2
    batch: int = 2
    seqlen_q: int = 67
    seqlen_k: int = 83
    lengths_q: tuple[int, ...] = ()  # not empty: varlen, in place of batch and seqlen_q
    lengths_k: tuple[int, ...] = ()
    seqused_q: tuple[int, ...] = ()  # only with varlen
    seqused_k: tuple[int, ...] = ()
    tail: int = 0  # rows of the packed buffers past cu_seqlens[-1]
    max_seqlen: str = "exact"  # what the caller claims: "exact" | "small" (half) | "large" (triple)
    softmax_scale: float | None = None
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    attention_chunk: int = 0
    softcap: float = 0.0
    alibi: str = ""  # "" | "heads" | "batched"
    dropout_p: float = 0.0
    q_factor: float = 1.0  # multiplies q, to reach large scores
    layout: str = "contiguous"  # "contiguous" | "bhsd" | "gaps" | "fused" | "offset"
    align_bytes: int = 16  # of pointers and strides in the layouts "gaps" and "offset"
    only_gpu: bool = False  # too large for the simulator
    slow: bool = False

    @property
    def varlen(self) -> bool:
        return bool(self.lengths_q)

    @property
    def sequences(self) -> int:
        return len(self.lengths_q) if self.varlen else self.batch

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def id(self) -> str:
        parts = [self.dtype, f"qk{self.head_dim_qk}", f"v{self.head_dim_v}"]
        heads = (self.num_heads_q, self.num_heads_k, self.num_heads_v)
        if heads[1] != heads[2]:
            parts.append("heads" + "x".join(map(str, heads)))
        elif heads[0] != heads[1]:
            parts.append("mqa" if heads[1] == 1 else f"gqa{heads[0] // heads[1]}")
        if self.varlen:
            parts.append("varlen" + "x".join([_short(self.lengths_q), _short(self.lengths_k)]))
        else:
            parts.append(f"b{self.batch}-{self.seqlen_q}x{self.seqlen_k}")
        flags: dict[str, object] = {
            "scale": self.softmax_scale is not None and self.softmax_scale,
            "causal": self.causal,
            "window": self.window_size != (-1, -1) and "_".join(map(str, self.window_size)),
            "chunk": self.attention_chunk,
            "softcap": self.softcap and f"{self.softcap:g}",
            "alibi": self.alibi,
            "dropout": self.dropout_p,
            "usedq": _short(self.seqused_q),
            "usedk": _short(self.seqused_k),
            "tail": self.tail,
            "max": self.max_seqlen != "exact" and self.max_seqlen,
            "qx": self.q_factor != 1.0 and f"{self.q_factor:g}",
            "": self.layout != "contiguous" and self.layout,
            "align": self.align_bytes != 16 and self.align_bytes,
        }
        parts += [
            name if value is True else f"{name}{value}" for name, value in flags.items() if value
        ]
        return "-".join(parts)

    def but(self, **changes: Any) -> Case:
        return replace(self, **changes)

    def with_dims(self, head_dim_qk: int, head_dim_v: int) -> Case:
        return replace(self, head_dim_qk=head_dim_qk, head_dim_v=head_dim_v)

    def with_heads(self, num_heads_q: int, num_heads_k: int, num_heads_v: int) -> Case:
        return replace(
            self, num_heads_q=num_heads_q, num_heads_k=num_heads_k, num_heads_v=num_heads_v
        )


def _short(lengths: Sequence[int]) -> str:
    return "_".join(map(str, lengths)) if len(lengths) <= 5 else f"{len(lengths)}seqs"


def on_both(cases: Iterable[Case]) -> pytest.MarkDecorator:
    """Parametrises (runner, case): each case on the simulator and on the GPU, where it fits."""
    params = []
    for case in cases:
        marks = [pytest.mark.slow] if case.slow else []
        if not case.only_gpu:
            params.append(
                pytest.param("sim", case, id=f"sim-{case.id}", marks=[*marks, pytest.mark.sim])
            )
        params.append(
            pytest.param("gpu", case, id=f"gpu-{case.id}", marks=[*marks, pytest.mark.gpu])
        )
    assert len({param.id for param in params}) == len(params), "a case is listed twice"
    return pytest.mark.parametrize(("runner", "case"), params, indirect=["runner"])


# The lists. Each distinct kernel costs a compilation, so cases share kernels where they can.

_BASE = Case()
_CAUSAL = Case(causal=True)

HEAD_DIMS = [
    *[
        base.with_dims(*pair).but(dtype=dtype)
        for base in (_BASE, _CAUSAL)
        for pair in NAMED_PAIRS
        for dtype in DTYPES
    ],
    *[_BASE.with_dims(*pair).but(dtype="bf16") for pair in EQUAL_PAIRS + ODD_PAIRS],
    *[_CAUSAL.with_dims(*pair).but(dtype="fp16") for pair in EQUAL_PAIRS + ODD_PAIRS],
]

# Both kernels of one pair over all the lengths; many heads where few rows would make the error rule
# a coin toss.
LENGTHS = [
    Case(
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        causal=causal,
        batch=batch,
        num_heads_q=4,
        num_heads_k=4,
        num_heads_v=4,
    )
    for seqlen_q, seqlen_k, batch in [
        (1, 1, 4),
        (1, 3, 4),
        (3, 1, 4),
        (3, 130, 3),
        (113, 203, 1),
        (203, 113, 1),
        (128, 217, 1),
        (128, 128, 1),
    ]
    for causal in (False, True)
] + [
    base.with_dims(128, 256).but(seqlen_q=seqlen_q, seqlen_k=seqlen_k, batch=1)
    for base in (_BASE, _CAUSAL)
    for seqlen_q, seqlen_k in [(113, 203), (203, 113), (128, 217)]
]

HEADS = [
    base.with_heads(*heads).but(batch=1, seqlen_q=33, seqlen_k=35)
    for base in (_BASE, _CAUSAL)
    for heads in [(6, 2, 2), (4, 1, 1), (8, 2, 4), (8, 4, 2), (12, 4, 6), (32, 4, 16)]
]

MASKS = [
    *[
        Case(window_size=window, seqlen_q=seqlen_q, seqlen_k=seqlen_k, batch=1)
        for window, seqlen_q, seqlen_k in [
            ((17, 9), 67, 83),
            ((17, 9), 140, 60),
            ((0, 0), 70, 70),
            ((23, -1), 140, 60),
            ((-1, 5), 140, 60),
            ((-1, 70), 140, 60),
            ((300, -1), 140, 60),
            ((-1, 11), 60, 140),
            ((40, 0), 75, 140),
            ((500, 500), 67, 83),
            ((-7, -3), 67, 83),
            # Wide enough for key tiles that need no mask between the two edges.
            ((230, 15), 140, 470),
            ((200, -1), 140, 470),
            ((-1, 20), 140, 470),
            ((170, 150), 300, 300),
        ]
    ],
    Case(causal=True, window_size=(20, 50)),
    Case(causal=True, seqlen_q=140, seqlen_k=40),
    Case(attention_chunk=16),
    Case(attention_chunk=50, seqlen_q=140, seqlen_k=60),
    Case(attention_chunk=24, causal=True),
    Case(attention_chunk=48, window_size=(9, 9)),
    Case(attention_chunk=275, seqlen_q=140, seqlen_k=470, batch=1),
]

SCORES = [
    Case(softcap=1.5),
    Case(softcap=30.0),
    Case(softcap=4.0, q_factor=2.0, window_size=(40, 20)),
    Case(softcap=30.0, q_factor=20.0, causal=True, dtype="fp16"),
    Case(alibi="heads"),
    Case(alibi="batched", causal=True, batch=2),
    Case(alibi="batched", window_size=(31, -1)),
    Case(softcap=1.5, alibi="heads", causal=True),
    Case(softmax_scale=0.3),
    Case(softmax_scale=0.0, causal=True),
    Case(q_factor=60.0),
]

# For `test_softcap.check`, which takes only these two from a case.
SOFTCAPS = [
    Case(softcap=30.0, softmax_scale=0.125),
    Case(softcap=1.5, softmax_scale=3.0),
    Case(softcap=50.0, softmax_scale=-0.02),
    Case(softcap=1e4, softmax_scale=0.125),
    Case(softcap=1e7, softmax_scale=0.001),
    Case(softcap=1e-6, softmax_scale=1.0),
]

DROPOUT = [
    Case(dropout_p=0.17),
    Case(dropout_p=0.5, causal=True, seqlen_q=130, seqlen_k=70, dtype="fp16"),
    Case(dropout_p=0.3, alibi="heads", window_size=(25, 7)),
    Case(dropout_p=0.17, lengths_q=(37, 0, 65), lengths_k=(41, 12, 90)),
    Case(dropout_p=0.17).with_dims(128, 256),
]

_VARLEN = Case(lengths_q=(37, 0, 65, 1), lengths_k=(41, 12, 30, 70))
VARLEN = [
    _VARLEN,
    _VARLEN.but(causal=True, tail=9),
    _VARLEN.but(causal=True, lengths_k=(41, 0, 0, 70), dtype="fp16").with_heads(4, 2, 1),
    _VARLEN.but(window_size=(13, 5), tail=3),
    _VARLEN.but(max_seqlen="small", only_gpu=True),  # lengths in CPU memory are checked
    _VARLEN.but(max_seqlen="small", only_gpu=True, causal=True, tail=9),
    _VARLEN.but(max_seqlen="large", causal=True),
    _VARLEN.but(alibi="batched", causal=True),
    _VARLEN.but(softcap=1.5, causal=True),
    _VARLEN.but(seqused_q=(37, 0, 11, 0), seqused_k=(5, 12, 0, 33)),
    _VARLEN.but(seqused_k=(41, 0, 17, 70), causal=True, tail=5),
    _VARLEN.but(attention_chunk=16, seqused_q=(20, 0, 64, 1)),
    _VARLEN.with_dims(128, 256),
    _VARLEN.but(lengths_q=(0, 0), lengths_k=(5, 0)),
    _VARLEN.but(lengths_q=(5, 3), lengths_k=(0, 0), tail=2),
]

LAYOUTS = [
    *[
        Case(layout=layout, seqlen_q=50, seqlen_k=50, causal=True)
        for layout in ("bhsd", "gaps", "fused")
    ],
    *[
        Case(layout=layout, align_bytes=align_bytes, seqlen_q=50, seqlen_k=50, dtype="fp16")
        for align_bytes in (8, 4, 2)
        for layout in ("offset", "gaps")
    ],
    Case(layout="gaps", head_dim_qk=59, head_dim_v=40, align_bytes=2),
    _VARLEN.but(layout="gaps", causal=True),
    _VARLEN.but(layout="bhsd"),
]

_MASKS_AND_SCORES: list[dict[str, Any]] = [
    {"window_size": (21, 9)},
    {"softcap": 1.5, "causal": True},
    {"alibi": "batched", "window_size": (31, -1)},
    {"attention_chunk": 40, "causal": True},
]

# Features where tiles are of another shape than those of the lists above.
COMBINATIONS = [
    base.with_dims(*pair).but(**options)
    for pair in [(96, 192), (128, 256), (192, 128)]
    for base, options in [
        *[(_BASE, options) for options in _MASKS_AND_SCORES],
        (_VARLEN, {"causal": True, "tail": 3}),
        (_VARLEN, {"window_size": (13, 5), "seqused_k": (40, 12, 0, 9)}),
    ]
]

# GPU only: sizes of many tiles.
LARGE = [
    Case(seqlen_q=seqlen_q, seqlen_k=seqlen_k, only_gpu=True, dtype=dtype, **options)
    .with_dims(*dims)
    .with_heads(6, 3, 2)
    for dims in NAMED_PAIRS + EQUAL_PAIRS + ODD_PAIRS
    for dtype in DTYPES
    for options in [{}, {"causal": True}, *_MASKS_AND_SCORES]
    for seqlen_q, seqlen_k in [(1023, 1024), (1, 2049), (600, 257)]
    if dims in NAMED_PAIRS
    or (dtype == "bf16") != ("causal" in options)
    and "softcap" not in options
]
