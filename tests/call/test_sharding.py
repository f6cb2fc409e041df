"""Attention of DTensors: divided over the batch and over heads, and nothing else silently.

The rules are tried on meshes of several processes, which compare with the plain call.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

import flash_attn as fa2
import flash_attn_interface as fa3

BF16 = torch.bfloat16
BATCH, HEADS = Shard(0), Shard(2)


@pytest.fixture
def mesh(tmp_path) -> Iterator[Any]:
    """Of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(BF16)


def qkv(heads_k: int = 4) -> list[torch.Tensor]:
    return [draw(4, 9, 4, 16), draw(4, 9, heads_k, 16), draw(4, 9, heads_k, 24)]


def test_lengths_and_slopes_may_be_plain(mesh):
    q, k, v = (distribute_tensor(x[0], mesh, [Shard(1)]) for x in qkv())
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    slopes = torch.rand(4)
    out = fa2.flash_attn_varlen_func(q, k, v, ends, ends, 5, 5, alibi_slopes=slopes)
    assert isinstance(out, DTensor) and out.placements == (Shard(1),)


def test_a_sharded_sequence_is_refused(mesh):
    q, k, v = (distribute_tensor(x, mesh, [Shard(1)]) for x in qkv())
    with pytest.raises(NotImplementedError, match=r"q is a DTensor placed as S.*ring attention"):
        fa2.flash_attn_func(q, k, v)


def test_dropout_is_refused(mesh):
    q, k, v = (distribute_tensor(x, mesh, [HEADS]) for x in qkv())
    with pytest.raises(NotImplementedError, match="dropout_p > 0 with DTensor"):
        fa2.flash_attn_func(q, k, v, dropout_p=0.1)


def test_plain_queries_among_dtensors_are_refused(mesh):
    q, k, v = qkv()
    k, v = (distribute_tensor(x, mesh, [HEADS]) for x in (k, v))
    with pytest.raises(TypeError, match="q is not a DTensor"):
        fa3.flash_attn_func(q, k, v)


def test_a_cache_that_would_move_is_refused(mesh):
    q, k, v = qkv()
    q = distribute_tensor(q, mesh, [HEADS])
    k_cache, v_cache, k, v = (distribute_tensor(x, mesh, [Replicate()]) for x in (k, v, k, v))
    lengths = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="k_cache is placed as"):
        fa3.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths)
    fa3.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths)


def test_pages_are_read_by_every_rank(mesh):
    pages = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    q, k, v = draw(2, 1, 4, 16), draw(4, 16, 2, 16), draw(4, 16, 2, 16)
    lengths = torch.tensor([5, 20], dtype=torch.int32)
    want = fa3.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, page_table=pages)
    q, k, v = (distribute_tensor(x, mesh, [HEADS]) for x in (q, k, v))
    got = fa3.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, page_table=pages)
    assert torch.equal(got.full_tensor(), want)
    q, k, v = (distribute_tensor(x.full_tensor(), mesh, [BATCH]) for x in (q, k, v))
    with pytest.raises(NotImplementedError, match="k_cache is a DTensor placed as"):
        fa3.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, page_table=pages)


# ---- on several ranks ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["2", "2,2"])
def test_ranks_agree_with_the_plain_call(tmp_path, shape: str):
    check_ranks(tmp_path, shape, "cpu")


@pytest.mark.gpu
def test_ranks_agree_on_gpus(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    check_ranks(tmp_path, "2", "cuda")


def check_ranks(folder: Path, shape: str, device: str) -> None:
    """Runs this file as a program on every rank."""
    count = math.prod(map(int, shape.split(",")))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1] / "support"),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder / "store"), str(rank), shape, device],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0 and "all right" in output, output


def _main(store: str, rank: int, shape: str, device: str) -> None:
    sizes = tuple(int(size) for size in shape.split(","))
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=math.prod(map(int, shape.split(","))),
    )
    torch.manual_seed(3)
    torch.set_default_device(device)
    mesh = init_device_mesh(device, sizes)
    same = [Replicate()] * len(sizes)
    _attention(mesh, same, same)
    _attention(mesh, [BATCH] * len(sizes), [BATCH] * len(sizes))
    one_by_heads = [Replicate()] * (len(sizes) - 1) + [HEADS]
    _attention(mesh, one_by_heads, one_by_heads)
    _attention(mesh, one_by_heads, same, heads_k=1)  # multi-query: gradients are partial sums
    _attention(mesh, one_by_heads, same, heads_k=2)
    _attention(mesh, [HEADS] * len(sizes), [HEADS] * len(sizes), heads_k=2)  # 4 parts cannot share
    if len(sizes) == 2:
        _attention(mesh, [BATCH, HEADS], [BATCH, HEADS])
    for placements in (same, [BATCH] * len(sizes), one_by_heads):
        _cache(mesh, placements)
    dist.destroy_process_group()
    print("all right")


def _attention(mesh: Any, of_q: list[Any], of_k: list[Any], heads_k: int = 4) -> None:
    plain = [x.requires_grad_() for x in qkv(heads_k)]
    placements = (of_q, of_k, of_k)
    sharded = [
        distribute_tensor(x.detach(), mesh, placement).requires_grad_()
        for x, placement in zip(plain, placements, strict=True)
    ]
    want = fa2.flash_attn_func(*plain, causal=True, return_attn_probs=True)
    got = fa2.flash_attn_func(*sharded, causal=True, return_attn_probs=True)
    for mine, theirs in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(mine.full_tensor(), theirs)
    dout = torch.randn_like(want[0])
    want[0].backward(dout)
    got[0].backward(distribute_tensor(dout, mesh, got[0].placements))
    for mine, theirs in zip(sharded, plain, strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad, rtol=0.02, atol=0.06)
    divisible = heads_k == 4 or heads_k == 1 or of_q.count(HEADS) < 2
    if of_q == of_k and divisible:
        assert got[0].placements == tuple(of_q)  # nothing was moved


def _cache(mesh: Any, placements: list[Any]) -> None:
    q, k, v = draw(4, 1, 4, 16), draw(4, 1, 2, 16), draw(4, 1, 2, 16)
    k_cache, v_cache = draw(4, 16, 2, 16), draw(4, 16, 2, 16)
    lengths = torch.tensor([3, 4, 5, 6], dtype=torch.int32)
    sharded = [distribute_tensor(x, mesh, placements) for x in (q, k_cache, v_cache, k, v)]
    want = fa3.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths)
    got = fa3.flash_attn_with_kvcache(*sharded, cache_seqlens=lengths)
    torch.testing.assert_close(got.full_tensor(), want)
    assert torch.equal(sharded[1].full_tensor(), k_cache)
    assert torch.equal(sharded[2].full_tensor(), v_cache)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
