"""What a feature costs: problems of bench_forward.py --features, each beside a plainer one.

A rate is FLOPs of the visible scores over time, so a feature that costs nothing has the rate of the
problem beside it: masks beside the full square, grouped heads beside equal ones, packed sequences
beside a dense batch of as many tokens and FLOPs, and head dims that were not tuned beside the next
larger named pair.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import harness
import peers
import torch
import torch.nn.functional as F
from harness import Contestant
from peers import Implementation, Unavailable, pad_to
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

TOKENS = 16384
HIDDEN = 2048
DIMS = ((64, 64), (128, 128), (64, 128), (256, 256))
NAMED_PAIRS = ((64, 64), (128, 128), (256, 256), (32, 64), (64, 128), (96, 192), (128, 256),
               (192, 128))  # fmt: skip
ODD_PAIRS = ((80, 80), (112, 48), (160, 224), (40, 72))
SEED = 7  # of the dropout call whose result is checked
ROWS_CHECKED = 64  # at the beginning, in the middle and at the end of a sequence
PACKED_SEQUENCES, SHORTEST, LONGEST = 64, 128, 8192
BESIDE = "beside"  # name of the contestant that computes the plainer problem


@dataclass(frozen=True)
class Problem:
    """One forward call. lengths: of the sequences, all alike unless packed."""

    head_dim_qk: int
    head_dim_v: int
    num_heads: tuple[int, int, int]  # q, k, v
    lengths: tuple[int, ...]
    packed: bool = False
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    dropout_p: float = 0.0

    @property
    def visible(self) -> int:
        """Pairs of a query and a key that it sees, over all sequences, for one head."""
        left, right = self.window[0], 0 if self.causal else self.window[1]
        total = 0
        for n in self.lengths:
            row = torch.arange(n)
            first = torch.zeros_like(row) if left < 0 else (row - left).clamp_min(0)
            last = torch.full_like(row, n - 1) if right < 0 else (row + right).clamp_max(n - 1)
            total += int((last - first + 1).sum())
        return total

    @property
    def flops(self) -> float:
        return 2.0 * self.visible * self.num_heads[0] * (self.head_dim_qk + self.head_dim_v)


@dataclass(frozen=True)
class Row:
    """A problem, and the plainer one that its rate is held against."""

    feature: str
    problem: Problem
    beside: Problem | None = None
    beside_name: str = ""


def plain(head_dim_qk: int, head_dim_v: int, **changes: Any) -> Problem:
    """One sequence of 16k tokens, heads of 2048 in all, every key visible."""
    heads = max(1, HIDDEN // head_dim_qk)
    return replace(Problem(head_dim_qk, head_dim_v, (heads, heads, heads), (TOKENS,)), **changes)


def long_tailed_lengths() -> tuple[int, ...]:
    """As many sequences between 128 and 256 tokens as between 4096 and 8192, in random order."""
    last = PACKED_SEQUENCES - 1
    lengths = [
        round(SHORTEST * (LONGEST / SHORTEST) ** (i / last)) for i in range(PACKED_SEQUENCES)
    ]
    random.Random(0).shuffle(lengths)
    return tuple(lengths)


def dense_like(packed: Problem) -> Problem:
    """As many tokens and FLOPs in sequences of one length, nearly."""
    squares = sum(n * n for n in packed.lengths)
    length = round(squares / sum(packed.lengths) / 128) * 128
    return replace(packed, packed=False, lengths=(length,) * round(squares / length**2))


def next_named_pair(head_dim_qk: int, head_dim_v: int) -> tuple[int, int]:
    """The smallest named pair with room for this one."""
    fitting = [p for p in NAMED_PAIRS if p[0] >= head_dim_qk and p[1] >= head_dim_v]
    return min(fitting, key=lambda p: (sum(p), p))


def make_rows(dims: Sequence[tuple[int, int]], odd: Sequence[tuple[int, int]]) -> Iterator[Row]:
    for pair in dims:
        full = plain(*pair)
        heads = full.num_heads[0]
        yield Row("plain", full)
        for name, changes in (
            ("causal", {"causal": True}),
            ("window (1023,0)", {"window": (1023, 0)}),
            ("window (512,512)", {"window": (512, 512)}),
            ("softcap 30", {"softcap": 30.0}),
            ("ALiBi", {"alibi": True}),
            ("dropout 0.1", {"dropout_p": 0.1}),
            ("GQA 4:1", {"num_heads": (heads, heads // 4, heads // 4)}),
            ("MQA", {"num_heads": (heads, 1, 1)}),
        ):
            yield Row(name, replace(full, **changes), full, "plain")
        equal = replace(full, num_heads=(32, 32, 32))
        yield Row("heads 32,4,16", replace(full, num_heads=(32, 4, 16)), equal, "32 equal heads")
        for causal in (False, True):
            packed = replace(full, lengths=long_tailed_lengths(), packed=True, causal=causal)
            dense = dense_like(packed)
            name = f"{len(dense.lengths)} x {dense.lengths[0]}"
            yield Row("packed causal" if causal else "packed", packed, dense, name)
    for pair in odd:
        named = next_named_pair(*pair)
        for causal in (False, True):
            larger = plain(*named, causal=causal)
            name = "odd pair causal" if causal else "odd pair"
            yield Row(name, plain(*pair, causal=causal), larger, f"({named[0]},{named[1]})")


@dataclass(frozen=True)
class Inputs:
    """Tensors of a problem: (batch, seqlen, heads, dim), packed (tokens, heads, dim)."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor | None
    alibi_slopes: Tensor | None


def draw(problem: Problem, dtype: torch.dtype) -> Inputs:
    lengths = problem.lengths
    leading = (sum(lengths),) if problem.packed else (len(lengths), lengths[0])
    dims = (problem.head_dim_qk, problem.head_dim_qk, problem.head_dim_v)
    q, k, v = (
        torch.randn(*leading, heads, dim, device="cuda", dtype=dtype)
        for heads, dim in zip(problem.num_heads, dims, strict=True)
    )
    cu_seqlens = slopes = None
    if problem.packed:
        ends = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        cu_seqlens = ends.to(q.device)
    if problem.alibi:  # of the paper, for a power of two of heads
        heads = torch.arange(1, problem.num_heads[0] + 1, device=q.device, dtype=torch.float32)
        slopes = torch.exp2(-8 * heads / problem.num_heads[0])
    return Inputs(q, k, v, cu_seqlens, slopes)


# Implementations. Each returns what to call, or raises Unavailable.


def make_ours(problem: Problem, x: Inputs) -> Contestant:
    import flash_attn
    import flash_attn_interface

    options: dict[str, Any] = {
        "causal": problem.causal,
        "window_size": problem.window,
        "softcap": problem.softcap,
    }
    module: Any = flash_attn_interface
    if problem.alibi or problem.dropout_p:
        module = flash_attn
        options |= {"alibi_slopes": x.alibi_slopes, "dropout_p": problem.dropout_p}
    arguments: list[Any] = [x.q, x.k, x.v]
    function = module.flash_attn_func
    if problem.packed:
        longest = max(problem.lengths)
        function = module.flash_attn_varlen_func
        arguments += [x.cu_seqlens, x.cu_seqlens, longest, longest]
    return Contestant("ours", partial(function, *arguments, **options))


def _widened(problem: Problem, x: Inputs) -> Callable[[], list[Tensor]]:
    """q, k, v padded to equal head dims, when called: the users of equal kernels pay for it."""
    width = max(problem.head_dim_qk, problem.head_dim_v)
    return lambda: [pad_to(width, tensor) for tensor in (x.q, x.k, x.v)]


def make_fa3(problem: Problem, x: Inputs) -> Contestant:
    peers.load_fa3()
    if torch.cuda.get_device_capability() != (9, 0):
        raise Unavailable("FA3 needs compute capability 9.0")
    _lacks(problem, "alibi", "dropout_p")
    if problem.num_heads[1] != problem.num_heads[2]:
        raise Unavailable("FA3 needs as many heads of k as of v")
    widened, forward = _widened(problem, x), torch.ops.flash_attn_3.fwd
    options: dict[str, Any] = {
        "softmax_scale": problem.head_dim_qk**-0.5,
        "is_causal": problem.causal,
        "window_size_left": problem.window[0],
        "window_size_right": problem.window[1],
        "softcap": problem.softcap,
        "num_splits": 1,
    }
    if problem.packed:
        longest = max(problem.lengths)
        options |= {"cu_seqlens_q": x.cu_seqlens, "cu_seqlens_k": x.cu_seqlens}
        options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
    return Contestant("fa3", lambda: forward(*widened(), **options)[0][..., : problem.head_dim_v])


def make_sdpa_flash(problem: Problem, x: Inputs) -> Contestant:
    """torch's FlashAttention-2; packed sequences through its varlen_attn."""
    _lacks(problem, "softcap", "alibi")
    if problem.num_heads[1] != problem.num_heads[2]:
        raise Unavailable("torch needs as many heads of k as of v")
    widened, scale = _widened(problem, x), problem.head_dim_qk**-0.5
    grouped = problem.num_heads[0] != problem.num_heads[1]
    if problem.packed:
        from torch.nn.attention.varlen import varlen_attn

        longest = max(problem.lengths)
        lengths = (x.cu_seqlens, x.cu_seqlens, longest, longest)
        options = {"scale": scale, "window_size": (-1, 0) if problem.causal else (-1, -1)}
        return Contestant(
            "sdpa_flash",
            lambda: varlen_attn(*widened(), *lengths, **options)[..., : problem.head_dim_v],
        )
    _lacks(problem, "window")

    def dense() -> Tensor:
        views = (tensor.transpose(1, 2) for tensor in widened())
        out = F.scaled_dot_product_attention(
            *views, is_causal=problem.causal, scale=scale, dropout_p=problem.dropout_p,
            enable_gqa=grouped,
        )  # fmt: skip
        return out.transpose(1, 2)[..., : problem.head_dim_v]

    return Contestant("sdpa_flash", dense, partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION))


def make_sdpa_cudnn(problem: Problem, x: Inputs) -> Contestant:
    _lacks(problem, "softcap", "alibi", "window", "packed", "dropout_p")
    if len(set(problem.num_heads)) > 1:
        raise Unavailable("grouped heads")
    return peers.make_sdpa_cudnn(x.q, x.k, x.v, problem.causal)


def _lacks(problem: Problem, *features: str) -> None:
    for name in features:
        if getattr(problem, name) not in (0, False, (-1, -1)):
            raise Unavailable(f"no {name}")


Make = Callable[[Problem, Inputs], Contestant]
IMPLEMENTATIONS: dict[str, tuple[Implementation, Make]] = {
    "ours": (peers.OURS, make_ours),
    "sdpa_flash": (peers.SDPA_FLASH, make_sdpa_flash),
    "sdpa_cudnn": (peers.SDPA_CUDNN, make_sdpa_cudnn),
    "fa3": (peers.FA3, make_fa3),
}


class Oracle:
    """float32 attention of some rows of a few heads of the first and of the longest sequence."""

    def __init__(self, problem: Problem, x: Inputs) -> None:
        self.problem = problem
        lengths, (heads, heads_k, heads_v) = problem.lengths, problem.num_heads
        self.samples: list[tuple[int, int, Tensor]] = []
        self.expected: list[Tensor] = []
        self.pytorch_error = 0.0
        sequences = sorted({0, lengths.index(max(lengths))})
        for b in sequences:
            for head in sorted({0, heads // 2, heads - 1}):
                rows = _checked_rows(lengths[b], x.q.device, bool(problem.dropout_p))
                q = self._sequence(x.q, b)[rows, head]
                k = self._sequence(x.k, b)[:, head // (heads // heads_k)]
                v = self._sequence(x.v, b)[:, head // (heads // heads_v)]
                change = partial(self._change, b, head, rows, x)
                exact = _attention(q.float(), k.float(), v.float(), change)
                rounded = _attention(q, k, v, change).float()
                self.samples.append((b, head, rows))
                self.expected.append(exact)
                self.pytorch_error = max(self.pytorch_error, harness.largest(rounded - exact))

    def _sequence(self, tensor: Tensor, b: int) -> Tensor:
        if not self.problem.packed:
            return tensor[b]
        start = sum(self.problem.lengths[:b])
        return tensor[start : start + self.problem.lengths[b]]

    def _change(
        self, b: int, head: int, rows: Tensor, x: Inputs, scores: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Scores as the softmax gets them, and the kept probabilities times what is to be added."""
        problem, keys = self.problem, torch.arange(scores.shape[1], device=scores.device)
        distance = keys - rows[:, None]
        if problem.softcap:
            scores = problem.softcap * torch.tanh(scores / problem.softcap)
        if x.alibi_slopes is not None:
            scores = scores - (x.alibi_slopes[head] * distance.abs()).to(scores.dtype)
        left, right = problem.window[0], 0 if problem.causal else problem.window[1]
        if left >= 0:
            scores = scores.masked_fill(distance < -left, float("-inf"))
        if right >= 0:
            scores = scores.masked_fill(distance > right, float("-inf"))
        if not problem.dropout_p:
            return scores, None
        from flash_attn_interface._common.launch.philox import keep_mask

        torch.manual_seed(SEED)  # what the call draws after the same seed
        state = torch.randint(0, 2**62, (2,), dtype=torch.int64, device=scores.device)
        row_count, first = int(rows[-1]) + 1, b * problem.num_heads[0] + head
        kept = keep_mask(state, problem.dropout_p, 1, 1, row_count, len(keys), first)[0, 0, rows]
        return scores, kept.to(scores.dtype) / (1 - problem.dropout_p)

    def check(self, out: Tensor) -> harness.Accuracy:
        """Non-finite anywhere counts as wrong."""
        errors = [
            harness.largest(self._sequence(out, b)[rows, head].float() - exact)
            for (b, head, rows), exact in zip(self.samples, self.expected, strict=True)
        ]
        finite = bool(torch.isfinite(out).all())
        return harness.Accuracy(max(errors) if finite else float("inf"), self.pytorch_error)


def _checked_rows(length: int, device: torch.device, beginning: bool) -> Tensor:
    """beginning: only there, for dropout masks, which take memory from the first row on."""
    starts = (0,) if beginning else (0, (length - ROWS_CHECKED) // 2, length - ROWS_CHECKED)
    rows = {max(0, start) + i for start in starts for i in range(min(ROWS_CHECKED, length))}
    return torch.tensor(sorted(rows), device=device)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, change: Callable[[Tensor], tuple[Tensor, Tensor | None]]
) -> Tensor:
    scores, factors = change((q @ k.T) * q.shape[-1] ** -0.5)
    probabilities = torch.softmax(scores, -1)
    return (probabilities if factors is None else probabilities * factors) @ v
