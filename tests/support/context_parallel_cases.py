"""What the ranks of a context-parallel test run: cases, and their comparison with one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

import flash_attn_interface
from flash_attn_interface.context_parallel import Layout, attention, ring
from flash_attn_interface.reference.forward import attention_reference


@dataclass(frozen=True)
class Case:
    """One call. lengths: of packed documents; else a batch of `batch` sequences of `seqlen`."""

    seqlen: int = 0
    batch: int = 1
    lengths: tuple[int, ...] = ()
    heads: tuple[int, int, int] = (4, 2, 2)  # of q, k, v
    head_dims: tuple[int, int] = (8, 8)  # of q and k, of v
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    softmax_scale: float | None = None
    softcap: float = 0.0
    sinks: bool = False
    scheme: str = "zigzag"
    method: str = "ring"
    min_tokens: int = 2
    deterministic: bool = False

    @property
    def total(self) -> int:
        return sum(self.lengths) if self.lengths else self.seqlen

    def layout(self, group: dist.ProcessGroup) -> Layout:
        if self.lengths:
            return Layout(
                group,
                cu_seqlens=[0, *accumulate(self.lengths)],
                scheme=self.scheme,
                min_tokens_per_rank=self.min_tokens,
            )
        return Layout(group, seqlen=self.seqlen, scheme=self.scheme)


LONG_TAILED = (3, 17, 1, 64, 5, 0, 9, 33, 2, 2, 40)
GQA = {"heads": (6, 3, 2), "head_dims": (6, 10)}

CASES = {
    "dense": Case(32),
    "dense-full": Case(32, causal=False),
    "dense-ragged-batch": Case(29, batch=2, **GQA),
    "dense-contiguous": Case(30, batch=2, scheme="contiguous", **GQA),
    "dense-shorter-than-the-world": Case(1, batch=2),
    "dense-few-tokens": Case(5, sinks=True),
    "dense-no-token": Case(0, batch=2),
    "dense-softcap-scale": Case(23, softcap=1.5, softmax_scale=0.7, **GQA),
    "dense-sinks": Case(26, batch=2, sinks=True, **GQA),
    "dense-window": Case(41, batch=2, window=(5, 0), **GQA),
    "dense-window-both": Case(41, window=(4, 3), causal=False, sinks=True),
    "dense-window-wide": Case(41, window=(30, 0), **GQA),
    "dense-window-right": Case(37, window=(-1, 4), causal=False),
    "dense-window-left": Case(37, window=(4, -1), causal=False),
    "dense-window-contiguous": Case(43, batch=2, window=(3, 0), scheme="contiguous"),
    "dense-window-self": Case(20, window=(0, 0)),
    "packed": Case(lengths=LONG_TAILED, **GQA),
    "packed-full": Case(lengths=LONG_TAILED, causal=False),
    "packed-contiguous": Case(lengths=LONG_TAILED, scheme="contiguous", **GQA),
    "packed-sinks-softcap": Case(lengths=LONG_TAILED, sinks=True, softcap=2.0, **GQA),
    "packed-whole-documents": Case(lengths=(7, 6, 8, 7, 7, 6, 8, 7), min_tokens=256),
    "packed-one-token": Case(lengths=(1,)),
    "packed-empty-documents": Case(lengths=(0, 0, 9, 0)),
    "packed-no-token": Case(lengths=(0, 0)),
    "packed-window": Case(lengths=LONG_TAILED, window=(4, 0), **GQA),
    "packed-window-both": Case(lengths=LONG_TAILED, window=(6, 2), causal=False, sinks=True),
    "packed-window-contiguous": Case(lengths=LONG_TAILED, window=(9, 0), scheme="contiguous"),
}


@dataclass(frozen=True)
class Inputs:
    """The whole of a case's tensors, the same on every rank."""

    q: Tensor
    k: Tensor
    v: Tensor
    s_aux: Tensor | None
    dout: Tensor
    dlse: Tensor


def draw(case: Case, seed: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    rows = (case.total,) if case.lengths else (case.batch, case.total)
    (h_q, h_k, h_v), (d, d_v) = case.heads, case.head_dims

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    lse_shape = (*rows[:-1], h_q, rows[-1])
    return Inputs(
        normal(*rows, h_q, d),
        normal(*rows, h_k, d),
        normal(*rows, h_v, d_v),
        normal(h_q).to(torch.promote_types(dtype, torch.float32)) if case.sinks else None,
        normal(*rows, h_q, d_v),
        normal(*lse_shape).to(torch.promote_types(dtype, torch.float32)),
    )


def one_process(
    case: Case, x: Inputs, dtype: torch.dtype, upcast: bool = True
) -> dict[str, Tensor]:
    """The reference on the undivided tensors, and its gradients by autograd."""
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in (x.q, x.k, x.v))
    wide = torch.promote_types(dtype, torch.float32)
    s_aux = None if x.s_aux is None else x.s_aux.to(wide).requires_grad_()
    starts = None
    if case.lengths:
        starts = torch.tensor([0, *accumulate(case.lengths)], dtype=torch.int32)
    out, lse, _ = attention_reference(
        q,
        k,
        v,
        causal=case.causal,
        window_size=case.window,
        softmax_scale=case.softmax_scale,
        softcap=case.softcap,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        upcast=upcast,
    )
    assert lse is not None
    if s_aux is not None:
        weight = torch.sigmoid(lse - s_aux.unsqueeze(-1))
        out = (out * weight.transpose(-1, -2).unsqueeze(-1)).to(dtype)
        lse = torch.logaddexp(lse, s_aux.unsqueeze(-1))
    torch.autograd.backward((out, lse), (x.dout.to(out.dtype), x.dlse.to(lse.dtype)))
    found = {"out": out, "softmax_lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    if s_aux is not None:
        found["ds_aux"] = s_aux.grad
    return {name: t.detach() for name, t in found.items() if t is not None}


def divided(case: Case, x: Inputs, layout: Layout) -> dict[str, Tensor]:
    """What this rank gets, its rows of everything; ds_aux summed over the group."""
    dim = layout.dim
    q, k, v = (layout.shard(t).detach().requires_grad_() for t in (x.q, x.k, x.v))
    s_aux = None if x.s_aux is None else x.s_aux.clone().requires_grad_()
    out, lse = attention(
        q,
        k,
        v,
        layout,
        causal=case.causal,
        window_size=case.window,
        softmax_scale=case.softmax_scale,
        softcap=case.softcap,
        s_aux=s_aux,
        deterministic=case.deterministic,
        method=case.method,
        return_lse=True,
    )
    torch.autograd.backward((out, lse), (layout.shard(x.dout), layout.shard(x.dlse, dim + 1)))
    found = {"out": out, "softmax_lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    if s_aux is not None:
        assert s_aux.grad is not None
        dist.all_reduce(s_aux.grad, group=layout.group)
        found["ds_aux"] = s_aux.grad
    return {name: t.detach() for name, t in found.items() if t is not None}


def compare_exactly(group: dist.ProcessGroup, case: Case, seed: int) -> None:
    """In float64 on the CPU: rounding errors of summation only."""
    x = draw(case, seed, torch.device("cpu"), torch.float64)
    layout = case.layout(group)
    got, want = divided(case, x, layout), one_process(case, x, torch.float64)
    assert got.keys() == want.keys()
    for name, value in got.items():
        expected = want[name]
        if name != "ds_aux":
            expected = layout.shard(expected, layout.dim + (name == "softmax_lse"))
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-10, msg=_named(name))


def compare_rounded(group: dist.ProcessGroup, case: Case, seed: int, device: str) -> None:
    """In bf16: at most 3 times as far from float64 as an honest computation in bf16."""
    where = torch.device(device, dist.get_rank(group)) if device == "cuda" else torch.device("cpu")
    x = draw(case, seed, where, torch.bfloat16)
    layout = case.layout(group)
    got = divided(case, x, layout)
    whole = replace_device(x)
    exact = one_process(case, whole, torch.float64)
    honest = one_process(case, whole, torch.bfloat16, upcast=False)
    for name, value in got.items():
        axis = layout.dim + (name == "softmax_lse")
        want, yardstick = exact[name], honest[name].double()
        bound = 3.0 * float((yardstick - want).abs().max()) + 1e-4 if want.numel() else 0.0
        expected = want if name == "ds_aux" else layout.shard(want, axis)
        error = (value.cpu().double() - expected).abs()
        worst = float(error.max()) if error.numel() else 0.0
        assert worst <= bound, f"{name}: {worst:.3e} > {bound:.3e}"


def replace_device(x: Inputs) -> Inputs:
    moved = {n: None if t is None else t.cpu() for n, t in vars(x).items()}
    return replace(x, **moved)


def _named(name: str):  # type: ignore[no-untyped-def]
    return lambda text: f"{name}: {text}"


def compare_in_two_parts(group: dist.ProcessGroup, case: Case, seed: int) -> None:
    before, ring.SPLIT_FROM = ring.SPLIT_FROM, 1
    try:
        compare_exactly(group, case, seed)
    finally:
        ring.SPLIT_FROM = before


def compare_simulated(group: dist.ProcessGroup, case: Case, seed: int) -> None:
    with flash_attn_interface.simulate("sm_80"):
        compare_rounded(group, case, seed, "cpu")


def check_gathering(group: dist.ProcessGroup, case: Case, seed: int) -> None:
    """Bits, for several dtypes and dims; the gradient is the sum over ranks."""
    layout = case.layout(group)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    generator = torch.Generator().manual_seed(seed)
    for dtype in (torch.bfloat16, torch.float64, torch.int64, torch.bool):
        for dim, shape in ((0, (case.total, 3)), (2, (2, 1, case.total)), (-1, (4, case.total))):
            x = torch.randint(0, 9, shape, generator=generator).to(dtype)
            assert torch.equal(layout.gather(layout.shard(x, dim), dim), x)
    x = torch.randn(2, case.total, dtype=torch.float64, generator=generator, requires_grad=True)
    weights = torch.randn(world, 2, case.total, dtype=torch.float64, generator=generator)
    local = layout.shard(x, 1)
    local.retain_grad()
    (layout.gather(local, 1) * weights[rank]).sum().backward()
    assert local.grad is not None and x.grad is not None
    torch.testing.assert_close(local.grad, layout.shard(weights.sum(0), 1))
    dist.all_reduce(x.grad, group=group)  # every rank holds its part
    torch.testing.assert_close(x.grad, weights.sum(0))


def check_positions(group: dist.ProcessGroup, case: Case) -> None:
    layout = case.layout(group)
    everywhere = torch.cat([torch.arange(n) for n in case.lengths])
    assert torch.equal(layout.positions(), layout.shard(everywhere))
    assert torch.equal(layout.indices(), layout.shard(torch.arange(case.total)))
    assert layout.tokens == len(layout.positions()) and layout.total == case.total


def compare_rounded_in_two_parts(
    group: dist.ProcessGroup, case: Case, seed: int, device: str
) -> None:
    before, ring.SPLIT_FROM = ring.SPLIT_FROM, 1
    try:
        compare_rounded(group, case, seed, device)
    finally:
        ring.SPLIT_FROM = before


def repeat_bits(group: dist.ProcessGroup, case: Case, seed: int, times: int) -> None:
    """Calls on another stream, each followed by one of another layout; all results are kept and
    compared at the end."""
    device = torch.device("cuda", dist.get_rank(group))
    x = draw(case, seed, device, torch.bfloat16)
    layout = case.layout(group)
    other = Case(777, method="ring")
    other_x, other_layout = draw(other, seed, device, torch.bfloat16), other.layout(group)
    torch.cuda.synchronize()
    found = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(times):
            found.append(divided(case, x, layout))
            divided(other, other_x, other_layout)
    torch.cuda.synchronize()
    for again in found[1:]:
        for name, value in again.items():
            assert torch.equal(value, found[0][name]), f"{name} differs between calls"
