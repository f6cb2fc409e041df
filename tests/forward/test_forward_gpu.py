"""What only a GPU can show: streams, graphs, threads, devices, and sizes beyond 16 and 32 bits."""

from __future__ import annotations

import threading

import calls
import cases
import oracle
import pytest
import torch
from cases import Case
from conftest import Runner
from inputs import make_inputs
from torch import Tensor

from flash_attn import flash_attn_func as flash_attn_2_func
from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

pytestmark = pytest.mark.gpu

# Long enough that a launch that jumped the queue would be seen.
_DELAY_CYCLES = 200_000_000


def random_qkv(
    batch: int, seqlen: int, num_heads: int, head_dim_qk: int = 64, head_dim_v: int = 128
) -> tuple[Tensor, Tensor, Tensor]:
    def tensor(head_dim: int) -> Tensor:
        return torch.randn(batch, seqlen, num_heads, head_dim, dtype=torch.bfloat16, device="cuda")

    return tensor(head_dim_qk), tensor(head_dim_qk), tensor(head_dim_v)


def test_runs_on_the_current_stream(gpu: Runner):
    q, k, v = random_qkv(2, 300, 4)
    expected = flash_attn_func(q, k, v, causal=True)
    source = v.clone()
    v.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(_DELAY_CYCLES)
        v.copy_(source)
        out = flash_attn_func(q, k, v, causal=True)
        out = out.clone()
    stream.synchronize()
    assert torch.equal(out, expected)


def test_cuda_graph(gpu: Runner):
    case = Case(causal=True, seqlen_q=300, seqlen_k=300)
    inputs = make_inputs(case, gpu.device)
    flash_attn_func(inputs.q, inputs.k, inputs.v, causal=True)  # compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flash_attn_func(
            inputs.q, inputs.k, inputs.v, causal=True, return_attn_probs=True
        )
    for _ in range(3):
        inputs.q.normal_()
        inputs.v.normal_()
        out.fill_(float("nan"))
        graph.replay()
        oracle.check(oracle.expect(case, inputs), out, lse)


def test_cuda_graph_draws_new_dropout_at_each_replay(gpu: Runner):
    q, k, v = random_qkv(2, 200, 2)
    flash_attn_2_func(q, k, v, 0.3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_2_func(q, k, v, 0.3)
    replays = []
    for _ in range(3):
        graph.replay()
        replays.append(out.clone())
    assert not torch.equal(replays[0], replays[1])
    assert not torch.equal(replays[1], replays[2])
    torch.manual_seed(3)
    graph.replay()
    first = out.clone()
    torch.manual_seed(3)
    graph.replay()
    assert torch.equal(out, first)


def test_threads_call_at_once(gpu: Runner):
    """First calls from many threads at once, each on its own stream."""
    problems = [
        (random_qkv(1, 64 + 32 * i, 2, dim, 2 * dim), causal)
        for i, dim in enumerate((32, 48, 64))
        for causal in (False, True)
    ]
    results: dict[int, list[Tensor]] = {}
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                results[index] = [
                    flash_attn_func(*qkv, causal=causal)
                    for _ in range(5)
                    for qkv, causal in problems
                ]
                torch.cuda.current_stream().synchronize()
        except BaseException as error:
            errors.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    expected = [flash_attn_func(*qkv, causal=causal) for qkv, causal in problems]
    for outs in results.values():
        assert all(torch.equal(out, want) for out, want in zip(outs, expected * 5, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_device_that_is_not_current(gpu: Runner):
    q, k, v = random_qkv(2, 200, 2)
    expected = flash_attn_func(q, k, v, causal=True)
    out = flash_attn_func(*(x.to("cuda:1") for x in (q, k, v)), causal=True)
    assert out.device.index == 1
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(out.to("cuda:0"), expected)


def test_max_seqlen_may_be_a_device_tensor(gpu: Runner):
    case = cases.VARLEN[1]
    inputs = make_inputs(case, gpu.device)
    out = flash_attn_varlen_func(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.cu_seqlens_q,
        inputs.cu_seqlens_k,
        torch.tensor(inputs.max_seqlen_q, device=gpu.device),
        torch.tensor(inputs.max_seqlen_k, device=gpu.device),
        causal=case.causal,
    )
    oracle.check(oracle.expect(case, inputs), out, None)


def test_a_forward_does_not_synchronise(gpu: Runner):
    case = cases.VARLEN[1]
    inputs = make_inputs(case, gpu.device)
    calls.forward(gpu, case, inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls.forward(gpu, case, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("batch", "num_heads"), [(70_000, 1), (1, 70_000), (300, 300)])
def test_more_units_than_16_bits_count(gpu: Runner, batch: int, num_heads: int):
    """Dao-AILab/flash-attention#1786: batch and heads sat on grid axes limited to 65535."""
    case = Case(batch=batch, seqlen_q=5, seqlen_k=9, causal=True).with_heads(
        num_heads, num_heads, num_heads
    )
    inputs = make_inputs(case, gpu.device)
    out, lse, _ = calls.forward(gpu, case, inputs)
    oracle.check(oracle.expect(case, inputs), out, lse)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "bhsd"])
def test_more_elements_than_32_bits_count(gpu: Runner, layout: str):
    """q, k, v and out of 2^31 + elements each (about 18 GiB); the last sequences are compared."""
    case = Case(
        batch=66, seqlen_q=16_384, seqlen_k=16_384, causal=True, layout=layout, head_dim_qk=128,
        head_dim_v=128,
    ).with_heads(16, 16, 16)  # fmt: skip
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    q, k, v = (
        torch.empty(66, 16_384, 16, 128, dtype=torch.bfloat16, device=gpu.device).normal_()
        for _ in range(3)
    )
    if layout == "bhsd":
        q, k, v = (x.view(66, 16, 16_384, 128).transpose(1, 2) for x in (q, k, v))
    out = flash_attn_func(q, k, v, causal=True)
    rows = slice(16_384 - 64, 16_384)
    last = case.but(batch=1, seqlen_q=64).with_heads(2, 2, 2)
    inputs = make_inputs(last, gpu.device)
    for destination, source in (
        (inputs.q, q[-1:, rows, -2:]),
        (inputs.k, k[-1:, :, -2:]),
        (inputs.v, v[-1:, :, -2:]),
    ):
        destination.copy_(source)
    oracle.check(oracle.expect(last, inputs), out[-1:, rows, -2:], None)


@pytest.mark.slow
def test_a_packed_buffer_of_more_elements_than_32_bits_count(gpu: Runner):
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    rows, lengths = 1_100_000, [1_099_500, 500]
    q, k, v = (
        torch.empty(rows, 16, 128, dtype=torch.bfloat16, device=gpu.device).normal_()
        for _ in range(3)
    )
    ends = torch.tensor([0, lengths[0], rows], dtype=torch.int32, device=gpu.device)
    out = flash_attn_varlen_func(
        q, k, v, ends, ends, max(lengths), max(lengths), window_size=(128, 0)
    )
    case = Case(
        batch=1, seqlen_q=500, seqlen_k=500, window_size=(128, 0), head_dim_qk=128, head_dim_v=128
    )
    case = case.with_heads(16, 16, 16)
    inputs = make_inputs(case, gpu.device)
    for destination, source in ((inputs.q, q), (inputs.k, k), (inputs.v, v)):
        destination.copy_(source[None, lengths[0] :])
    oracle.check(oracle.expect(case, inputs), out[None, lengths[0] :], None)
