"""torch.compile of flash_attn_with_kvcache: one graph, and caches that are updated in place
although the compiler makes programs functional."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cache_cases import CacheCase, CacheTensors, call, make_cache
from conftest import Runner
from test_kvcache import copy
from torch import Tensor
from torch.library import opcheck

import flash_attn
from flash_attn_interface import flash_attn_with_kvcache, simulate
from flash_attn_interface.call import dispatch, kv_ops

NEW = CacheCase(seqlens=(3, 33), seqlen_new=2, seqlen_q=2, causal=True, page_size=16, rotary_dim=16)
CASES = [
    NEW,
    NEW.but(page_size=0, leftpad=(1, 2), batch_idx=True),
    NEW.but(lengths_q=(1, 3), lengths_new=(2, 1)),
    CacheCase(),
    CacheCase(alibi=True, window_size=(9, 0)),
    CacheCase(whole=True, num_splits=2),
    NEW.but(qv=True),
    CacheCase(qv=True),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    dispatch.forget_plans()
    yield
    torch._dynamo.reset()


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def check_compiled(
    function: Callable[..., Any], tensors: CacheTensors, backend: Any = "aot_eager"
) -> None:
    """Results and caches of the compiled function are those of the eager one."""
    eager = copy(tensors)
    want = function(eager)
    got = torch.compile(function, fullgraph=True, backend=backend)(tensors)
    for mine, theirs in zip(got, want, strict=True):
        same(mine, theirs)
    for name in ("k_cache", "v_cache"):
        same(tensors[name], eager[name])


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_one_graph_with_the_eager_results(case: CacheCase):
    check_compiled(lambda t: call(case, t), make_cache(case, "cpu"))


@pytest.mark.parametrize(
    ("case", "operation"), [(NEW, "append_and_attend"), (CacheCase(), "attend_over_cache")]
)
def test_the_operation_in_the_graph(case: CacheCase, operation: str):
    """The one that mutates only where there is something to append."""
    found = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        names = [str(node.target) for node in graph.graph.nodes]
        found.extend(name for name in names if "flash_attn" in name)
        return graph.forward

    check_compiled(lambda t: call(case, t), make_cache(case, "cpu"), keep)
    assert found == [f"flash_attn_interface.{operation}.default"]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_step_of_several_layers(backend: str):
    """Caches are slices of one buffer, read again after the append, by a call and by torch."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("no g++ for inductor")
    case = CacheCase(seqlens=(3, 33), seqlen_new=1, causal=True).with_dims(64, 64)
    tensors = make_cache(case, "cpu")
    caches = torch.stack([tensors.pop("k_cache"), tensors.pop("v_cache")]).nan_to_num()
    caches = torch.stack([caches, caches + 1])  # two layers

    def step(q: Tensor, k: Tensor, v: Tensor, caches: Tensor, lengths: Tensor) -> Any:
        for layer in range(2):
            out = flash_attn_with_kvcache(
                q * 2, caches[layer, 0], caches[layer, 1], k + layer, v,
                cache_seqlens=lengths, causal=True,
            )  # fmt: skip
            q = q + out
        again = flash_attn.flash_attn_with_kvcache(
            q, caches[0, 0], caches[0, 1], cache_seqlens=lengths + 1
        )
        return q, again, caches[:, :, :, 34].float().sum()

    arguments = [tensors[name] for name in ("q", "k", "v")]
    eager_caches = caches.clone()
    want = step(*arguments, eager_caches, tensors["cache_seqlens"])
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    got = compiled(*arguments, caches, tensors["cache_seqlens"])
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.05)
    torch.testing.assert_close(caches, eager_caches, rtol=0.01, atol=0.01)


def test_lengths_as_an_int_that_grows():
    """As a decode loop in a compiled model: no new graph for each length."""
    case = CacheCase(seqlens=(3, 3), seqlen_new=1, causal=True)
    tensors = make_cache(case, "cpu")
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    def step(length: int) -> Tensor:
        return call(case, tensors, cache_seqlens=length)[0]

    compiled = torch.compile(step, fullgraph=True, backend=count)
    for length in range(3, 9):
        want = step(length)
        same(compiled(length), want)
    assert len(graphs) <= 2


@pytest.mark.parametrize("case", [NEW, NEW.but(page_size=0)], ids=["paged", "contiguous"])
def test_operations_pass_torchs_checks(case: CacheCase):
    t = make_cache(case, "cpu")
    for name in ("k_cache", "v_cache"):
        t[name] = t[name].nan_to_num()
    rest = (
        t["cache_seqlens"], None, None, t.get("page_table"), None, 0, None, True, -1, -1, 0, 0.0,
        None, 0, 0,
    )  # fmt: skip
    opcheck(
        kv_ops.append_and_attend,
        (t["q"], t["k_cache"], t["v_cache"], t["k"], t["v"], None, t["rotary_cos"],
         t["rotary_sin"], None, True, None, *rest),
    )  # fmt: skip
    opcheck(kv_ops.attend_over_cache, (t["q"], t["k_cache"], t["v_cache"], None, *rest))


def test_no_gradient_passes_unnoticed():
    case = CacheCase()
    tensors = make_cache(case, "cpu")
    tensors["q"].requires_grad_()
    compiled = torch.compile(lambda t: call(case, t)[0], fullgraph=True, backend="aot_eager")
    with pytest.raises((NotImplementedError, RuntimeError), match="backward|autograd"):
        compiled(tensors).sum().backward()


@pytest.mark.sim
def test_kernels_behind_the_operations():
    case = NEW.but(rotary_dim=32)
    tensors = make_cache(case, "cpu")
    with simulate("sm_80"):
        check_compiled(lambda t: call(case, t), tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_on_a_gpu(gpu: Runner, mode: str):
    case = CacheCase(seqlens=(100, 700), capacity=1024, page_size=16, seqlen_new=1, causal=True)
    tensors = make_cache(case, gpu.device)
    eager = copy(tensors)
    compiled = torch.compile(lambda t: call(case, t), fullgraph=True, mode=mode)
    for _ in range(4):
        want, got = call(case, eager), [x.clone() for x in compiled(tensors)]
        for mine, theirs in zip(got, want, strict=True):
            same(mine, theirs)
        same(tensors["k_cache"], eager["k_cache"])
        for t in (tensors, eager):
            t["cache_seqlens"] += 1
