"""Exact attention with head dims (64, 128) and unequal head counts, on whatever this machine has.

With a GPU (compute capability 8.0 or newer) our kernel runs on it. Without one the call is served
by the PyTorch reference, and then the very same kernel runs once more in the CPU simulator. Either
way the result is compared with attention written out in float64.

    python examples/demo.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

import flash_attn_interface
from flash_attn_interface import flash_attn_func

BATCH, NUM_HEADS_Q, NUM_HEADS_K, NUM_HEADS_V = 2, 8, 2, 4
HEAD_DIM_QK, HEAD_DIM_V = 64, 128


def attention_float64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim_qk)) v with causal masking, the textbook way."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k = k.repeat_interleave(NUM_HEADS_Q // NUM_HEADS_K, dim=1)
    v = v.repeat_interleave(NUM_HEADS_Q // NUM_HEADS_V, dim=1)
    scores = q @ k.transpose(-1, -2) * HEAD_DIM_QK**-0.5
    seqlen = scores.shape[-1]
    visible = torch.ones(seqlen, seqlen, dtype=torch.bool, device=q.device).tril()
    return (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def report(where: str, call: Callable[[], Tensor], expected: Tensor) -> bool:
    """Runs the call twice (the first may compile), prints time and error; True if it is right."""
    started = time.perf_counter()
    call()
    first = time.perf_counter() - started
    started = time.perf_counter()
    out = call()
    if out.is_cuda:
        torch.cuda.synchronize()
    again = time.perf_counter() - started
    error = (out.double() - expected).abs().max().item()
    # Rounding the exact result to bfloat16 is already off by this much; a kernel also rounds P.
    rounding = (expected.to(out.dtype).double() - expected).abs().max().item()
    good = error <= 4 * rounding
    print(f"  {where:<34} first call {first:6.2f} s, next {again * 1e3:9.3f} ms, ", end="")
    print(f"largest error {error:.1e} {'ok' if good else 'WRONG'} (bf16 rounding {rounding:.1e})")
    return good


def main() -> int:
    gpu = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
    device, seqlen = ("cuda", 4096) if gpu else ("cpu", 192)
    torch.manual_seed(0)

    def draw(num_heads: int, head_dim: int) -> Tensor:
        return torch.randn(BATCH, seqlen, num_heads, head_dim, device=device, dtype=torch.bfloat16)

    q, k = draw(NUM_HEADS_Q, HEAD_DIM_QK), draw(NUM_HEADS_K, HEAD_DIM_QK)
    v = draw(NUM_HEADS_V, HEAD_DIM_V)
    expected = attention_float64(q, k, v)

    def attend() -> Tensor:
        return flash_attn_func(q, k, v, causal=True)

    print("\nflash_attn_func(q, k, v, causal=True), bfloat16")
    for name, x in (("q", q), ("k", k), ("v", v)):
        print(f"  {name} {tuple(x.shape)}  (batch, seqlen, heads, head_dim)")
    if gpu:
        good = report(f"our kernel on {torch.cuda.get_device_name()}", attend, expected)
    else:
        good = report("PyTorch reference on the CPU", attend, expected)
        with flash_attn_interface.simulate("sm_80"):
            good &= report("our Ampere kernel, simulated", attend, expected)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
