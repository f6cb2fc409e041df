"""Generate text with a small transformer whose keys and values live in a paged cache.

The model is randomly initialised and decodes greedily, so the text means nothing; the point is how
flash_attn_with_kvcache is used: the prompt is appended to the cache in one call, then a token a
call, each rotated, stored and attended to by the same function. Head dims (64, 128), 8 query heads,
2 key heads, 4 value heads. Afterwards the whole text goes through the model once more without a
cache, and tokens and logits are compared.

    python examples/generate.py                 GPU if there is one, else PyTorch on the CPU
    python examples/generate.py --simulate      the GPU kernels in the CPU simulator; a few tokens
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import flash_attn_interface
from flash_attn.layers.rotary import apply_rotary_emb
from flash_attn_interface import flash_attn_func, flash_attn_with_kvcache

NUM_HEADS_Q, NUM_HEADS_K, NUM_HEADS_V = 8, 2, 4
HEAD_DIM_QK, HEAD_DIM_V = 64, 128
WIDTH, VOCABULARY, PAGE_SIZE = 256, 512, 16


@dataclass
class PagedCache:
    """Keys and values of all layers, in pages that sequences get in any order.

    A real server hands out pages as sequences grow; here every sequence has all of its own from
    the start. lengths is on the device and shared by all layers, so that nothing has to wait.
    """

    k: Tensor  # (layers, pages, PAGE_SIZE, NUM_HEADS_K, HEAD_DIM_QK)
    v: Tensor  # (layers, pages, PAGE_SIZE, NUM_HEADS_V, HEAD_DIM_V)
    page_table: Tensor  # int32 (batch, pages of a sequence)
    lengths: Tensor  # int32 (batch,): tokens in the cache

    @classmethod
    def make(cls, layers: int, batch: int, tokens: int, like: Tensor) -> PagedCache:
        pages = -(-tokens // PAGE_SIZE)
        shape = (layers, batch * pages, PAGE_SIZE)
        order = torch.randperm(batch * pages, device=like.device, dtype=torch.int32)
        return cls(
            like.new_empty(*shape, NUM_HEADS_K, HEAD_DIM_QK),
            like.new_empty(*shape, NUM_HEADS_V, HEAD_DIM_V),
            order.view(batch, pages),
            torch.zeros(batch, dtype=torch.int32, device=like.device),
        )


class Attention(nn.Module):
    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.q = nn.Linear(WIDTH, NUM_HEADS_Q * HEAD_DIM_QK, bias=False)
        self.k = nn.Linear(WIDTH, NUM_HEADS_K * HEAD_DIM_QK, bias=False)
        self.v = nn.Linear(WIDTH, NUM_HEADS_V * HEAD_DIM_V, bias=False)
        self.out = nn.Linear(NUM_HEADS_Q * HEAD_DIM_V, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: PagedCache | None) -> Tensor:
        q = self.q(x).unflatten(-1, (NUM_HEADS_Q, HEAD_DIM_QK))
        k = self.k(x).unflatten(-1, (NUM_HEADS_K, HEAD_DIM_QK))
        v = self.v(x).unflatten(-1, (NUM_HEADS_V, HEAD_DIM_V))
        if cache is None:
            q, k = (apply_rotary_emb(y, cos, sin) for y in (q, k))
            attended = flash_attn_func(q, k, v, causal=True)
        else:
            attended = flash_attn_with_kvcache(
                q,
                cache.k[self.layer],
                cache.v[self.layer],
                k,
                v,
                rotary_cos=cos,
                rotary_sin=sin,
                rotary_interleaved=False,
                cache_seqlens=cache.lengths,
                page_table=cache.page_table,
                causal=True,
            )
        return self.out(attended.flatten(-2))


class Decoder(nn.Module):
    """Pre-norm transformer. Computes in the dtype of its weights."""

    def __init__(self, layers: int, max_tokens: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.attentions = nn.ModuleList(Attention(layer) for layer in range(layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(WIDTH),
                nn.Linear(WIDTH, 4 * WIDTH),
                nn.GELU(),
                nn.Linear(4 * WIDTH, WIDTH),
            )
            for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        frequencies = 10000.0 ** -(torch.arange(0, HEAD_DIM_QK, 2) / HEAD_DIM_QK)
        angles = torch.outer(torch.arange(-(-max_tokens // PAGE_SIZE) * PAGE_SIZE), frequencies)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Tensor, cache: PagedCache | None = None) -> Tensor:
        """Logits (batch, tokens, VOCABULARY). With a cache, tokens come behind what it holds."""
        x = self.embedding(tokens)
        for norm, attention, mlp in zip(self.norms, self.attentions, self.mlps, strict=True):
            x = x + attention(norm(x), self.cos, self.sin, cache)
            x = x + mlp(x)
        if cache is not None:
            cache.lengths += tokens.shape[1]
        logits: Tensor = self.head(x)
        return logits


def generate(model: Decoder, prompt: Tensor, new_tokens: int) -> tuple[Tensor, Tensor, float]:
    """(tokens with the prompt, logits they were chosen by, seconds of all but two steps)."""
    cache = PagedCache.make(
        len(model.attentions), len(prompt), prompt.shape[1] + new_tokens, model.head.weight
    )
    logits = [model(prompt, cache)[:, -1]]
    tokens = [prompt, logits[-1].argmax(-1, keepdim=True)]
    started = time.perf_counter()
    for step in range(1, new_tokens):
        if step == 2:  # the first one-token step has compiled its kernels
            synchronize(prompt)
            started = time.perf_counter()
        logits.append(model(tokens[-1], cache)[:, -1])
        tokens.append(logits[-1].argmax(-1, keepdim=True))
    synchronize(prompt)
    return torch.cat(tokens, 1), torch.stack(logits, 1), time.perf_counter() - started


def synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def check(model: Decoder, tokens: Tensor, logits: Tensor) -> tuple[int, float]:
    """Recomputes everything without a cache; AssertionError where the two ways disagree.

    Returns how many tokens differ, which only those may whose logits tie up to rounding, and the
    largest difference between logits.
    """
    count = logits.shape[1]
    recomputed = model(tokens[:, :-1])[:, -count:]
    difference = (recomputed - logits).float().abs().amax(-1)
    bound = 0.05 * float(recomputed.float().abs().max())
    assert float(difference.max()) <= bound, f"logits differ by {float(difference.max())}"
    chosen, best = tokens[:, -count:], recomputed.argmax(-1)
    margin = recomputed.amax(-1) - recomputed.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    assert bool(((chosen == best) | (margin <= 2 * difference)).all()), "other tokens are chosen"
    return int((chosen != best).sum()), float(difference.max())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=24, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=None, help="tokens to generate")
    parser.add_argument("--simulate", action="store_true")
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
    device = "cuda" if gpu and not options.simulate else "cpu"
    new_tokens = options.tokens or {"cuda": 200, "cpu": 8 if options.simulate else 48}[device]

    torch.manual_seed(0)
    model = Decoder(options.layers, options.prompt + new_tokens).to(device, torch.bfloat16).eval()
    prompt = torch.randint(VOCABULARY, (options.batch, options.prompt), device=device)
    way = flash_attn_interface.simulate("sm_80") if options.simulate else nullcontext()
    with torch.no_grad(), way:
        tokens, logits, seconds = generate(model, prompt, new_tokens)
        ties, difference = check(model, tokens, logits)
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    kind = "kernels in the simulator" if options.simulate else f"bfloat16 on {where}"
    print(f"{options.batch} sequences, {options.prompt} + {new_tokens} tokens, {kind}")
    if new_tokens > 2:
        print(f"{options.batch * (new_tokens - 2) / seconds:.0f} tokens/s while decoding")
    print(
        f"as without a cache: {tokens.shape[0] * new_tokens - ties} of "
        f"{tokens.shape[0] * new_tokens} tokens ({ties} ties), logits within {difference:.1e}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
