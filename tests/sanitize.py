"""compute-sanitizer over a representative set of our kernels, on the current GPU.

    python tests/sanitize.py [memcheck] [racecheck] [synccheck]     default: all three
    python tests/sanitize.py --cases                                 only the calls, unchecked

Not collected by pytest: it needs a GPU and compute-sanitizer (of a CUDA toolkit), and minutes.
Exit status 0: clean. Results are not compared here; the tests do that.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "synccheck")
# Sequences of the packed cases: empty ones, one row, tails behind the last one.
LENGTHS_Q, LENGTHS_K, TAIL = (0, 70, 1, 129), (33, 200, 0, 64), 5


def run_cases(backward: bool = True) -> None:
    """Every kernel feature once, at sizes of a few tiles with ragged ends."""
    import torch

    import flash_attn

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_(backward)

    def dense(dims: tuple[int, int], heads: tuple[int, int, int], dtype=torch.bfloat16, **options):
        (qk, v), (hq, hk, hv) = dims, heads
        q = tensor(1, 150, hq, qk, dtype=dtype)
        k, v_ = tensor(1, 217, hk, qk, dtype=dtype), tensor(1, 217, hv, v, dtype=dtype)
        finish(flash_attn.flash_attn_func(q, k, v_, **options), (q, k, v_))

    def packed(dims: tuple[int, int], **options):
        q = tensor(sum(LENGTHS_Q) + TAIL, 4, dims[0])
        k, v = tensor(sum(LENGTHS_K) + TAIL, 2, dims[0]), tensor(sum(LENGTHS_K) + TAIL, 1, dims[1])
        cu_q, cu_k = (
            torch.tensor((0, *lengths), device="cuda").cumsum(0, dtype=torch.int32)
            for lengths in (LENGTHS_Q, LENGTHS_K)
        )
        longest = (max(LENGTHS_Q), max(LENGTHS_K))
        out = flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, *longest, **options)
        finish(out, (q, k, v))

    def finish(out: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
        if backward:
            torch.autograd.grad(out, inputs, torch.randn_like(out))
        torch.cuda.synchronize()

    for dims in ((32, 64), (64, 128), (96, 192), (128, 256), (192, 128), (64, 64), (256, 256)):
        dense(dims, (2, 2, 2), causal=dims[0] != 64)
    dense((40, 59), (4, 1, 2), window_size=(30, 10))
    dense((59, 40), (2, 2, 2), dtype=torch.float16, causal=True)  # rows at 2-byte alignment
    dense((64, 64), (2, 1, 1), softcap=15.0, causal=True)
    dense((64, 128), (2, 2, 2), alibi_slopes=torch.rand(2, device="cuda"))
    dense((64, 64), (2, 2, 2), dropout_p=0.2)
    dense((128, 256), (2, 2, 2), dropout_p=0.2, causal=True)
    packed((64, 128), causal=True)
    packed((128, 64), window_size=(40, -1))
    print("all cases ran")


def main(arguments: list[str]) -> int:
    if arguments == ["--cases"]:
        run_cases()
        return 0
    unknown = set(arguments) - set(TOOLS)
    if unknown:
        print(f"unknown tool {sorted(unknown)}; known: {', '.join(TOOLS)}", file=sys.stderr)
        return 2
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not on the PATH", file=sys.stderr)
        return 2
    # Without torch's caching allocator each tensor is an allocation whose ends memcheck knows.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = []
    for tool in arguments or TOOLS:
        command = [sanitizer, "--tool", tool, "--kernel-name", "regex=flash2|hopper"]
        if tool == "memcheck":  # the bindings look for symbols that this driver need not have
            command += ["--report-api-errors", "no"]
        command += ["--error-exitcode", "1", sys.executable, str(Path(__file__)), "--cases"]
        status = subprocess.run(command, env=environment, check=False).returncode
        print(f"{tool}: {'clean' if status == 0 else f'FAILED ({status})'}", flush=True)
        failed += [tool] * (status != 0)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
