"""What ranks run in tests of errors and of training with context parallelism."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from flash_attn_interface.context_parallel import Layout, attention
from flash_attn_interface.reference.forward import attention_reference

ROOT = Path(__file__).resolve().parents[2]


# ---- errors -------------------------------------------------------------------------------------


def raised(function: Any) -> str:
    """What a call raises, "" if nothing."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def tensors(
    layout: Layout, heads: tuple[int, int, int] = (4, 2, 2), **options: Any
) -> list[Tensor]:
    rows = (1, layout.tokens) if layout.dense else (layout.tokens,)
    return [torch.randn(*rows, h, 8, **options) for h in heads]


def disagree_on_gpus(group: dist.ProcessGroup, odd: int, name: str, value: Any) -> tuple[str, str]:
    device = torch.device("cuda", dist.get_rank(group))
    return disagree(group, odd, name, value, dtype=torch.bfloat16, device=device)


def disagree(
    group: dist.ProcessGroup, odd: int, name: str, value: Any, **of_tensors: Any
) -> tuple[str, str]:
    """Rank `odd` passes another value; (what is raised, and then by a call that is right)."""
    options = {name: value} if dist.get_rank(group) == odd else {}
    layout = Layout(group, seqlen=24)
    q, k, v = tensors(layout, **of_tensors)
    if q.device.type == "cpu":  # compared in every call, on a GPU when they are first used
        attention(q, k, v, layout, causal=True)
    error = raised(lambda: attention(q, k, v, layout, **{"causal": True, **options}))
    return error, raised(lambda: attention(q, k, v, layout, causal=True))


def other_layout(group: dist.ProcessGroup, odd: int, other: dict[str, Any]) -> str:
    options: dict[str, Any] = {"cu_seqlens": [0, 10, 30]}
    if dist.get_rank(group) == odd:
        options |= other
    layout = Layout(group, **options)
    return raised(lambda: attention(*tensors(layout), layout))


def other_tensors(group: dist.ProcessGroup, odd: int, kind: str) -> str:
    """Rank `odd` makes a mistake with its tensors."""
    layout = Layout(group, seqlen=24)
    q, k, v = tensors(layout)
    s_aux: Any = None
    if dist.get_rank(group) == odd:
        if kind == "rows":
            q = torch.cat([q, q], 1)
        elif kind == "heads":
            k, v = k[:, :, :1], v[:, :, :1]
        elif kind == "dtype":
            q, k, v = q.double(), k.double(), v.double()
        elif kind == "integers":
            q = q.int()
        elif kind == "gradients":
            q.requires_grad_()
        elif kind == "batch":
            q, k, v = (torch.cat([x, x]) for x in (q, k, v))
        elif kind == "no tensor":
            v = None  # type: ignore[assignment]
        elif kind == "sinks":
            s_aux = torch.zeros(3)
        else:
            raise AssertionError(kind)
    return raised(lambda: attention(q, k, v, layout, s_aux=s_aux))


def refused_alike(group: dist.ProcessGroup, heads: tuple[int, int, int], options: Any) -> str:
    """What every rank does wrong."""
    layout = Layout(group, seqlen=24)
    return raised(lambda: attention(*tensors(layout, heads), layout, **options))


def misuse(group: dist.ProcessGroup) -> dict[str, str]:
    """Errors of one rank for itself, without communication."""
    layout = Layout(group, seqlen=8)
    q, k, v = tensors(layout)
    outside = dist.new_group([1])  # every rank of the world takes part in making it
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2))
    wrong = {
        "no layout": lambda: attention(q, k, v, group),  # type: ignore[arg-type]
        "two dimensions": lambda: Layout(mesh, seqlen=8),
        "not in it": lambda: Layout(outside, seqlen=8),
        "no group": lambda: Layout(3, seqlen=8),  # type: ignore[arg-type]
        "scheme": lambda: Layout(group, seqlen=8, scheme="striped"),
        "both": lambda: Layout(group, seqlen=8, cu_seqlens=[0, 8]),
        "neither": lambda: Layout(group),
        "negative": lambda: Layout(group, seqlen=-1),
        "starts": lambda: Layout(group, cu_seqlens=[1, 8]),
        "decreasing": lambda: Layout(group, cu_seqlens=[0, 8, 5]),
        "fractions": lambda: Layout(group, cu_seqlens=torch.tensor([0.0, 8.0])),
        "shard": lambda: layout.shard(torch.zeros(1, 9)),
        "dim": lambda: layout.shard(torch.zeros(8), dim=1),
    }
    return {name: raised(call) for name, call in wrong.items()}


def gather_wrong_rows(group: dist.ProcessGroup) -> str:
    layout = Layout(group, seqlen=24)
    rows = layout.tokens + (dist.get_rank(group) == 0)
    return raised(lambda: layout.gather(torch.zeros(1, rows)))


def dtensors_are_refused(group: dist.ProcessGroup) -> str:
    layout = Layout(group, seqlen=24)
    mesh = DeviceMesh("cpu", list(range(dist.get_world_size(group))))
    q, k, v = (DTensor.from_local(x, mesh, [Replicate()]) for x in tensors(layout))
    return raised(lambda: attention(q, k, v, layout))


def differentiate_twice(group: dist.ProcessGroup) -> str:
    layout = Layout(group, seqlen=12)
    q, k, v = (x.requires_grad_() for x in tensors(layout))
    out = attention(q, k, v, layout)
    assert isinstance(out, Tensor)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    return raised(lambda: dq.sum().backward())


def methods_chosen(group: dist.ProcessGroup, calls: list[tuple[int, tuple[int, ...], Any]]) -> Any:
    """What "auto" takes, without running it."""
    from flash_attn_interface.context_parallel import function

    chosen = []
    for seqlen, heads, window in calls:
        layout = Layout(group, seqlen=seqlen)
        rows = (1, layout.tokens)
        q, k, v = (torch.empty(*rows, h, 128, dtype=torch.bfloat16) for h in heads)
        asked = function._Arguments(True, window, None, 0.0, False, "auto", False)
        call = function._checked(q, k, v, layout, None, asked)
        chosen.append(call.method)
    return chosen


# ---- training -----------------------------------------------------------------------------------


def example() -> ModuleType:
    """examples/long_context.py as a module."""
    name = "long_context"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def alone() -> dist.ProcessGroup:
    """A group of this rank only; all ranks of the world have to ask."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return groups[dist.get_rank()]


def train(group: dist.ProcessGroup, wrapper: str, tokens: int, steps: int) -> None:
    """In float32: the losses of the divided training equal those of one process."""
    module = example()
    world = dist.get_world_size(group)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("cp",))
    single_group = alone()
    torch.manual_seed(0)
    model = module.Decoder(module.Config(dtype=torch.float32))
    single = module.Decoder(module.Config(dtype=torch.float32))
    single.load_state_dict(model.state_dict())
    device = torch.device("cpu")
    if wrapper == "ddp":
        model = DistributedDataParallel(model, process_group=group)
    else:
        if wrapper == "fsdp2-checkpoint":
            for layer in model.layers:
                layer.forward = checkpointed(layer.forward)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh["cp"])
        fully_shard(model, mesh=mesh["cp"])
    ours = module.train(model, mesh.get_group("cp"), tokens, steps, device, world)
    theirs = module.train(single, single_group, tokens, steps, device, 1)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=2e-5, atol=2e-5)


def checkpointed(forward: Any) -> Any:
    return lambda *arguments: checkpoint(forward, *arguments, use_reentrant=False)


def heads_and_tokens(group: dist.ProcessGroup) -> None:
    """A mesh of 2 x 2: heads are divided along one dimension, tokens along the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    layout = Layout(mesh["cp"], cu_seqlens=[0, 9, 20, 41], min_tokens_per_rank=4)
    tp = mesh.get_local_rank("tp")
    generator = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(41, h, 8, dtype=torch.float64, generator=generator) for h in (8, 4, 2))
    mine = [x.chunk(2, dim=1)[tp] for x in (q, k, v)]
    for method in ("ring", "all_to_all"):
        if method == "all_to_all":
            mine[2] = mine[2].contiguous()
        out = attention(*map(layout.shard, mine), layout, causal=True, method=method)
        starts = torch.tensor([0, 9, 20, 41], dtype=torch.int32)
        want, _, _ = attention_reference(
            q, k, v, causal=True, cu_seqlens_q=starts, cu_seqlens_k=starts
        )
        torch.testing.assert_close(out, layout.shard(want.chunk(2, dim=1)[tp]))


class Twice(nn.Module):
    """Attention whose activations are checkpointed, of either kind."""

    def __init__(self, layout: Layout, reentrant: bool) -> None:
        super().__init__()
        self.layout, self.reentrant = layout, reentrant

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def once(*x: Tensor) -> Any:
            return attention(*x, self.layout, causal=True, method="ring")

        first = checkpoint(once, q, k, v, use_reentrant=self.reentrant)
        return checkpoint(once, first, k, v, use_reentrant=self.reentrant)


def checkpointing(group: dist.ProcessGroup, reentrant: bool) -> None:
    layout = Layout(group, seqlen=22)
    x = [torch.randn(1, layout.tokens, h, 8, dtype=torch.float64) for h in (4, 2, 2)]
    plain = [t.clone().requires_grad_() for t in x]
    first = attention(*plain, layout, causal=True, method="ring")
    attention(first, *plain[1:], layout, causal=True, method="ring").sum().backward()
    again = [t.clone().requires_grad_() for t in x]
    Twice(layout, reentrant)(*again).sum().backward()
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a.grad, b.grad)


def compiled(group: dist.ProcessGroup) -> str:
    """The same under torch.compile, forward and backward; what fullgraph=True raises."""
    layout = Layout(group, seqlen=22)
    x = [torch.randn(1, layout.tokens, h, 8, dtype=torch.float64) for h in (4, 2, 2)]

    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q * 2, k, v, layout, causal=True, method="ring")
        assert isinstance(out, Tensor)
        return out * 3

    results = []
    for call in (twice, torch.compile(twice, backend="eager")):
        inputs = [t.clone().requires_grad_() for t in x]
        out = call(*inputs)
        out.sum().backward()
        results.append([out, *(t.grad for t in inputs)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    return raised(lambda: torch.compile(twice, backend="eager", fullgraph=True)(*x))


# ---- what is no plain tensor --------------------------------------------------------------------


def broken_tensors(group: dist.ProcessGroup, odd: int) -> dict[str, str]:
    """Rank `odd` passes these as q, the others what is right."""
    layout = Layout(group, seqlen=24)
    q, k, v = tensors(layout)
    broken: dict[str, Any] = {
        "nested": torch.nested.nested_tensor([torch.randn(3, 8)]),
        "sparse": q.to_sparse(),
        "uninitialized": nn.parameter.UninitializedParameter(),
        "no heads": q[:, :, :0],
        "no head_dim": q[..., :0],
        "collective": AsyncCollectiveTensor(q),
    }
    on_it = dist.get_rank(group) == odd
    return {
        name: raised(lambda x=x: attention(x if on_it else q, k, v, layout))  # type: ignore[misc]
        for name, x in broken.items()
    }


def broken_options(group: dist.ProcessGroup, odd: int) -> dict[str, str]:
    """Likewise with options; then `gather` of what is no tensor and along no dim."""
    layout = Layout(group, seqlen=24)
    q, k, v = tensors(layout)
    on_it = dist.get_rank(group) == odd
    options: dict[str, dict[str, Any]] = {
        "method": {"method": np.array(["ring", "auto"])},
        "softcap": {"softcap": 1e-46},
        "sparse sinks": {"s_aux": torch.zeros(4).to_sparse()},
    }
    found = {
        name: raised(lambda o=o: attention(q, k, v, layout, **(o if on_it else {})))  # type: ignore[misc]
        for name, o in options.items()
    }
    nothing: Any = None
    found["gather"] = raised(lambda: layout.gather(nothing if on_it else q))
    found["gather along"] = raised(lambda: layout.gather(q, dim=7 if on_it else None))
    return found


def extreme_scalars(group: dist.ProcessGroup) -> dict[str, bool]:
    """Whether options that change nothing change nothing."""
    layout = Layout(group, seqlen=24)
    q, k, v = tensors(layout)
    want = attention(q, k, v, layout)
    neutral: list[dict[str, Any]] = [
        {"softcap": 1e300},
        {"softcap": -1.0},
        {"window_size": (2**63, 2**64)},
        {"window_size": (24, -(2**70))},
    ]
    return {str(o): torch.equal(want, attention(q, k, v, layout, **o)) for o in neutral}


def gradients_in_disguise(group: dist.ProcessGroup, method: str) -> None:
    """Kernels, for which a stand-in computes, get plain tensors, whatever comes."""
    from fakes import FakeBackend

    from flash_attn_interface import simulate
    from flash_attn_interface.call import backends, dispatch

    kept = backends.flash2
    backends.flash2 = lambda: FakeBackend()  # type: ignore[assignment,return-value]
    dispatch.forget_plans()
    try:
        with simulate("sm_80"):
            layout = Layout(group, seqlen=24)
            q, k, v = (x.requires_grad_() for x in tensors(layout, dtype=torch.bfloat16))
            negated = [torch._neg_view(-x.detach()).requires_grad_() for x in (q, k, v)]
            out = attention(q, k, v, layout, causal=True, method=method)
            same = attention(*negated, layout, causal=True, method=method)
            assert isinstance(out, Tensor) and isinstance(same, Tensor)
            dout = torch.randn_like(out)
            want = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
            for arrival in (torch._neg_view(-dout), AsyncCollectiveTensor(dout)):
                for result, inputs in ((out, (q, k, v)), (same, negated)):
                    got = torch.autograd.grad(result, inputs, arrival, retain_graph=True)
                    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
            zero = torch._efficientzerotensor(dout.shape, dtype=dout.dtype)
            assert not any(x.any() for x in torch.autograd.grad(out, (q, k, v), zero))
    finally:
        backends.flash2 = kept
        dispatch.forget_plans()


def watched(group: dist.ProcessGroup) -> dict[str, str]:
    layout = Layout(group, seqlen=24)
    q, k, v = tensors(layout)

    def of_q(x: Tensor) -> Any:
        return attention(x, k, v, layout)

    def fake() -> None:
        with FakeTensorMode(allow_non_fake_inputs=True):
            of_q(q)

    def dual() -> None:
        with forward_ad.dual_level():
            of_q(forward_ad.make_dual(q, q))

    return {
        "torch.func": raised(lambda: torch.func.grad(lambda x: of_q(x).sum())(q)),
        "torch.func of gather": raised(lambda: torch.vmap(layout.gather)(torch.stack([q, q]))),
        "torch.jit.trace": raised(lambda: torch.jit.trace(of_q, (q,), check_trace=False)),
        "make_fx": raised(lambda: make_fx(of_q)(q)),
        "FakeTensorMode": raised(fake),
        "forward-mode AD": raised(dual),
    }
