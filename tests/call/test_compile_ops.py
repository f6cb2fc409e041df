"""torch.compile and torch.export of the public functions: one graph, custom operations, the eager
results and gradients."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import oracle
import pytest
import torch
from conftest import Runner
from gradients import results_and_gradients
from test_autograd import CALLS, draw, ends
from torch import Tensor
from torch.library import opcheck

import flash_attn as fa2
import flash_attn_interface as fa3
from flash_attn_interface import simulate
from flash_attn_interface.call import dispatch, ops

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    dispatch.forget_plans()
    yield
    torch._dynamo.reset()


class Graphs:
    """A compiler for torch.compile that runs aot_eager and keeps the graphs of AOTAutograd."""

    def __init__(self) -> None:
        self.operations: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def keep(part: torch.fx.GraphModule, _: Any) -> Any:
            self.operations += [
                str(node.target) for node in part.graph.nodes if "flash_attn" in str(node.target)
            ]
            return make_boxed_func(part.forward)

        compiled: Callable[..., Any] = aot_autograd(fw_compiler=keep, bw_compiler=keep)(
            graph, inputs
        )
        return compiled


def check_compiled(
    function: Callable[..., Any],
    inputs: list[Tensor],
    weigh_lse: bool = False,
    **compile_options: Any,
) -> None:
    """Results and gradients of the compiled function are those of the eager one."""
    compiled = torch.compile(function, fullgraph=True, **compile_options)
    torch.manual_seed(7)
    want, _, want_grads = results_and_gradients(function, inputs, weigh_lse)
    torch.manual_seed(7)
    got, _, got_grads = results_and_gradients(compiled, inputs, weigh_lse)
    for mine, theirs in zip((*got, *got_grads), (*want, *want_grads), strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        largest = oracle._max_abs(theirs.nan_to_num(neginf=0.0))
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.03 * max(1.0, largest))


# ---- on CPU tensors, whose operations run the reference ----------------------------------------


@pytest.mark.parametrize("weigh_lse", [False, True], ids=["out", "lse"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_function_is_one_graph(call: Any, weigh_lse: bool):
    function, inputs, _, _ = call("cpu")
    if weigh_lse:
        function = partial(function, return_attn_probs=True)
    check_compiled(function, inputs, weigh_lse, backend="aot_eager")


@pytest.mark.parametrize(
    ("name", "forward"),
    {
        "fa2": "flash_attn._flash_attn_forward.default",
        "fa2-qkvpacked": "flash_attn._flash_attn_forward.default",
        "fa2-varlen": "flash_attn._flash_attn_varlen_forward.default",
        "fa3-qkvpacked": "flash_attn._flash_attn_forward.default",
        "fa3": "flash_attn_interface.attention_forward.default",  # attention_chunk
        "fa3-varlen": "flash_attn_interface.attention_forward.default",  # seqused_q
    }.items(),
)
def test_the_operations_in_the_graph(name: str, forward: str):
    """Checkpointing policies list FlashAttention-2's operations by name."""
    function, inputs, _, _ = CALLS[name]("cpu")
    graphs = Graphs()
    results_and_gradients(torch.compile(function, fullgraph=True, backend=graphs), inputs)
    assert graphs.operations == [forward, "flash_attn_interface.attention_backward.default"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ for inductor")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ["fa2", "fa2-qkvpacked", "fa2-varlen-kvpacked"])
def test_inductor(name: str, dynamic: bool):
    function, inputs, _, _ = CALLS[name]("cpu")

    def between(*tensors: Tensor) -> Tensor:  # something to fuse on both sides
        return function(*(tensor * 2 for tensor in tensors)) + 1

    check_compiled(between, inputs, dynamic=dynamic)


def test_no_gradients_are_prepared_without_need():
    q, k, v = (draw(1, 9, 2, 16) for _ in range(3))
    graphs = Graphs()
    compiled = torch.compile(fa3.flash_attn_func, fullgraph=True, backend=graphs)
    out = compiled(q, k, v, causal=True)
    torch.testing.assert_close(out, fa3.flash_attn_func(q, k, v, causal=True))
    assert graphs.operations == ["flash_attn._flash_attn_forward.default"]


def test_lengths_may_change_without_recompiling():
    compiled = torch.compile(fa3.flash_attn_func, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seqlen in (9, 14, 33):
            q, k, v = (draw(2, seqlen, 2, 16).requires_grad_() for _ in range(3))
            compiled(q, k, v).sum().backward()
            assert q.grad is not None and q.grad.shape == q.shape


def test_max_seqlen_may_be_a_tensor():
    q, k, v = (draw(12, 2, 16) for _ in range(3))
    lengths = {"cu_seqlens_q": ends(0, 5, 12), "cu_seqlens_k": ends(0, 5, 12)}

    def function(q: Tensor, k: Tensor, v: Tensor, longest: Any) -> Any:
        return fa2.flash_attn_varlen_func(
            q, k, v, **lengths, max_seqlen_q=longest, max_seqlen_k=longest
        )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    want = function(q, k, v, 7)
    torch.testing.assert_close(compiled(q, k, v, torch.tensor(7)), want)
    torch.testing.assert_close(compiled(q, k, v, 7), want)


def test_one_tensor_in_several_places():
    lengths = {"cu_seqlens_q": ends(0, 5, 12), "max_seqlen_q": 7, "max_seqlen_k": 7}
    lengths["cu_seqlens_k"] = lengths["cu_seqlens_q"]

    def function(x: Tensor) -> Any:
        return fa3.flash_attn_varlen_func(x, x, x, **lengths)

    check_compiled(function, [draw(12, 2, 16)], backend="aot_eager")


def test_f3b2_keeps_its_backward():
    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return fa3.flash_attn_f3b2_func(q, k, v, causal=True)

    check_compiled(function, [draw(1, 9, 2, 16) for _ in range(3)], backend="aot_eager")


def test_dropout_in_a_graph():
    """Two calls draw two masks, and the backward replays each."""
    q, k, v = (draw(1, 40, 2, 16) for _ in range(3))

    def twice(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return fa2.flash_attn_func(q, k, v, 0.5), fa2.flash_attn_func(q, k, v, 0.5)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    first, second = compiled(q, k, v)
    assert not torch.equal(first, second)
    dropout = partial(fa2.flash_attn_func, dropout_p=0.5, return_attn_probs=True)
    check_compiled(lambda *qkv: dropout(*qkv)[:2], [q, k, v], True, backend="aot_eager")
    compiled = torch.compile(dropout, fullgraph=True, backend="aot_eager")
    assert compiled(q, k, v)[2].shape == (1, 2, 128, 128)


def test_checkpointing_in_a_graph():
    from torch.utils.checkpoint import checkpoint

    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return checkpoint(fa3.flash_attn_func, q * 2, k, v, use_reentrant=False)

    check_compiled(function, [draw(1, 9, 2, 16) for _ in range(3)], backend="aot_eager")


def test_a_checkpoint_repeats_its_dropout():
    """out is linear in v, so sums of dout * out and dv * v agree if both have the same mask."""
    from torch.utils.checkpoint import checkpoint

    q, k, v = (draw(1, 40, 2, 16).requires_grad_() for _ in range(3))
    dropout = partial(fa2.flash_attn_func, dropout_p=0.5)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return checkpoint(dropout, q, k, v, use_reentrant=False)

    out = torch.compile(function, fullgraph=True, backend="aot_eager")(q, k, v)
    dout = torch.randn(out.shape).to(BF16)
    (dv,) = torch.autograd.grad(out, v, dout)
    got, want = ((a.double() * b.double()).sum(1) for a, b in ((dv, v), (dout, out)))
    torch.testing.assert_close(got, want, rtol=0.0, atol=0.2)


def test_export():
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
            return fa3.flash_attn_func(q, k, v, causal=True)

    inputs = tuple(draw(1, 9, 2, 16) for _ in range(3))
    exported = torch.export.export(Attention(), inputs)
    torch.testing.assert_close(exported.module()(*inputs), Attention()(*inputs))


# ---- kernels -----------------------------------------------------------------------------------


@contextlib.contextmanager
def kernels(runner: Runner) -> Iterator[None]:
    """Without NaN in fresh memory: that switch is not for compiled code."""
    with simulate(runner.arch) if runner.name == "sim" else contextlib.nullcontext():
        yield


RUNNERS = [pytest.param("sim", marks=pytest.mark.sim), pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("runner", RUNNERS, indirect=True)
@pytest.mark.parametrize("name", ["fa2", "fa2-qkvpacked", "fa2-varlen", "fa3-varlen"])
def test_compiled_kernels(runner: Runner, name: str):
    function, inputs, _, _ = CALLS[name](runner.device)
    with kernels(runner):
        check_compiled(partial(function, deterministic=True), inputs, backend="aot_eager")
        if runner.name == "gpu":
            check_compiled(function, inputs)


@pytest.mark.parametrize("runner", RUNNERS, indirect=True)
def test_opcheck_of_the_general_operations(runner: Runner):
    q = draw(1, 9, 4, 24, device=runner.device)
    kv = draw(1, 11, 2, 2, 24, device=runner.device)
    k, v = kv.unbind(2)
    lengths = (None, None, 0, 0)
    with kernels(runner):
        arguments = (q, k, v, *lengths, None, None, 0.3, True, -1, 0, 5, 0.0, None, 0.0, False)
        opcheck(ops.attention_forward, arguments)
        out, lse, _, _ = ops.attention_forward(*arguments)
        dlse = torch.randn_like(lse)
        opcheck(
            ops.attention_backward,
            (out, dlse, q, kv, None, 2, [], out, lse, None, None, None, None, None, None, 0, 0,
             0.3, True, -1, 0, 5, 0.0, 0.0, True, None),
        )  # fmt: skip


@pytest.mark.parametrize("module", [fa2, fa3])
def test_a_sequence_without_keys_trains(module: Any):
    q, k, v = draw(24, 4, 16), draw(13, 2, 16), draw(13, 2, 32)
    function = partial(
        module.flash_attn_varlen_func,
        cu_seqlens_q=ends(0, 9, 17, 24),
        cu_seqlens_k=ends(0, 7, 7, 13),
        max_seqlen_q=9,
        max_seqlen_k=7,
        causal=True,
    )
    check_compiled(function, [q, k, v], backend="aot_eager")
