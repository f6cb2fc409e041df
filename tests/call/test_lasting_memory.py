"""What outlives a call lies outside the memory pools of CUDA graphs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from conftest import Runner
from torch import Tensor
from torch._subclasses import FakeTensorMode

import flash_attn as fa2
import flash_attn_interface as fa3
from flash_attn_interface._common.launch import lasting_memory, launch_counters
from flash_attn_interface._common.launch.plan_values import template
from flash_attn_interface.call import dispatch

BF16 = torch.bfloat16


def test_it_is_made_in_a_thread_without_modes():
    caller = threading.get_ident()
    with FakeTensorMode(), torch.inference_mode():
        made = lasting_memory._elsewhere(lambda: torch.zeros(2))
        thread = lasting_memory._elsewhere(lambda: torch.tensor(threading.get_ident()))
    assert type(made) is Tensor and not made.is_inference()
    assert int(thread) != caller


def test_errors_reach_the_caller():
    def fail() -> Tensor:
        raise MemoryError("none left")

    with pytest.raises(MemoryError, match="none left"):
        lasting_memory._elsewhere(fail)


def test_templates_share_an_element():
    cpu = torch.device("cpu")
    one, other = template((3, 5), BF16, cpu), template((7,), BF16, cpu)
    assert one.data_ptr() == other.data_ptr() and one.untyped_storage().nbytes() == 2
    made = torch.empty_like(one, memory_format=torch.contiguous_format)
    assert made.shape == (3, 5) and made.is_contiguous()
    assert template((3,), torch.float32, cpu).dtype == torch.float32


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.fixture
def cold(gpu: Runner, monkeypatch) -> Iterator[None]:
    """Nothing is planned or allocated."""
    dispatch.forget_plans()
    lasting_memory.element.cache_clear()
    monkeypatch.setattr(launch_counters, "_pools", {})
    torch._dynamo.reset()
    yield
    dispatch.forget_plans()
    torch._dynamo.reset()


def calls(device: torch.device) -> dict[str, Any]:
    draw = partial(torch.randn, device=device, dtype=BF16)
    q, k, v = (draw(2, 300, 8, 64) for _ in "qkv")
    one = draw(2, 1, 8, 64)
    cache = [draw(2, 4096, 2, 64) for _ in "kv"]
    parts = torch.randn(3, 2, 7, 2, 64, device=device), torch.randn(3, 2, 7, 2, device=device)
    return {
        "forward": lambda: fa3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True),
        "decode": lambda: fa3.flash_attn_with_kvcache(one, *cache, cache_seqlens=4000),
        "combine": lambda: fa3.flash_attn_combine(*parts),
    }


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["forward", "decode", "combine"])
def test_a_cold_call_leaves_nothing_in_a_private_pool(gpu: Runner, cold, name: str):
    call = calls(gpu.device)[name]
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        result = call()
    torch.cuda.synchronize()
    del result
    left = [
        block
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment["segment_pool_id"]) == tuple(pool.id)
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    ]
    assert not left


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["forward", "decode", "combine"])
def test_reduce_overhead_from_a_cold_start(gpu: Runner, cold, name: str):
    """Its first runs allocate from the graph's pool without capturing."""
    call = calls(gpu.device)[name]
    compiled = torch.compile(call, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        got = compiled()
        results = [got] if isinstance(got, Tensor) else list(got)
        results = [result.clone() for result in results]
    want = call()
    for mine, theirs in zip(results, [want] if isinstance(want, Tensor) else want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.gpu
def test_reduce_overhead_trains_from_a_cold_start(gpu: Runner, cold):
    inputs = [torch.randn(2, 300, 8, 64, device=gpu.device, dtype=BF16) for _ in "qkv"]
    leaves = [tensor.requires_grad_() for tensor in inputs]
    compiled = torch.compile(partial(fa2.flash_attn_func, causal=True), mode="reduce-overhead")
    dout = torch.randn_like(inputs[0])
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        found = [g.clone() for g in torch.autograd.grad(compiled(*leaves), leaves, dout)]
    want = torch.autograd.grad(fa2.flash_attn_func(*leaves, causal=True), leaves, dout)
    for mine, theirs in zip(found[1:], want[1:], strict=True):  # dq is summed in any order
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    torch.testing.assert_close(found[0], want[0], rtol=0.02, atol=0.02)


@pytest.mark.gpu
def test_a_plan_made_while_another_thread_captures(gpu: Runner, cold):
    """Memory is allocated although the capture forbids it to threads that do not ask."""
    draw = partial(torch.randn, device=gpu.device, dtype=BF16)
    q, k, v = (draw(1, 64, 2, 64) for _ in "qkv")
    fa3.flash_attn_func(q, k, v)  # loads the kernel
    lasting_memory.element.cache_clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fa3.flash_attn_func(q, k, v)
        lasting_memory.zeros(1 << 20, torch.int32, torch.device(gpu.device.type, 0))
    graph.replay()
    torch.testing.assert_close(out, fa3.flash_attn_func(q, k, v), rtol=0, atol=0)
