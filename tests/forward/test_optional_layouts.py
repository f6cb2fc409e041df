"""Every optional tensor in several memory layouts, one after another in one process: each call
gives what packed copies give, bit for bit, or an error that names the argument. What a plan
remembers of a layout would show in the next call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hopper_tree
import pytest
import torch
from asked import cache_call, forward_call
from conftest import Runner
from torch import Tensor

import flash_attn
import flash_attn_interface
from flash_attn_interface._common.ask.call import Tensors
from flash_attn_interface._common.ask.check import check as check_call
from flash_attn_interface._common.ask.problem import Target
from flash_attn_interface._common.sim.launcher import SimulatorError
from flash_attn_interface._flash2.decode import DecodePlan
from flash_attn_interface.call import backends, dispatch

BATCH, HEADS, DIM = 3, 4, 32
LENGTHS = (40, 0, 67)
TOTAL = sum(LENGTHS)


@pytest.fixture(
    params=[
        pytest.param(("sim", "sm_80"), marks=pytest.mark.sim, id="sim-sm_80"),
        pytest.param(("sim", "sm_90a"), marks=pytest.mark.sim, id="sim-sm_90a"),
        pytest.param(("gpu", ""), marks=pytest.mark.gpu, id="gpu"),
    ]
)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    name, arch = request.param
    if arch == "sm_90a":
        tree: Any = hopper_tree.load().BACKEND
        monkeypatch.setattr(backends, "hopper", lambda: tree)
    dispatch.forget_plans()
    yield Runner(name, torch.device("cuda" if name == "gpu" else "cpu"), arch)
    dispatch.forget_plans()


def buffer_like(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Of values that would be noticed."""
    poison = float("nan") if tensor.is_floating_point() else 2**31 - 1
    return torch.full(tuple(shape), poison, dtype=tensor.dtype, device=tensor.device)


def layouts(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the same shape; the same values but in "expanded"."""
    yield "packed", tensor
    whole = buffer_like(tensor, (*tensor.shape[:-1], tensor.shape[-1] + 5))
    yield "slice", whole[..., 3 : 3 + tensor.shape[-1]].copy_(tensor)
    whole = buffer_like(tensor, (*tensor.shape[:-1], 2 * tensor.shape[-1]))
    yield "every other", whole[..., ::2].copy_(tensor)
    yield "expanded columns", tensor[..., :1].expand(tensor.shape)
    if tensor.ndim == 2:
        yield "transposed", tensor.t().contiguous().t()
        yield "expanded rows", tensor[:1].expand(tensor.shape)
        whole = buffer_like(tensor, (3 * tensor.shape[0], tensor.shape[1]))
        yield "every third row", whole[::3].copy_(tensor)
    yield "packed again", tensor.clone()


def check(
    name: str,
    tensor: Tensor,
    call: Callable[[Tensor], Sequence[Tensor]],
    refused: Sequence[str] = (),
) -> None:
    """refused: the layouts that raise."""
    for layout, given in layouts(tensor):
        if layout in refused:
            with pytest.raises(ValueError, match=rf"{name}.* has stride"):
                call(given)
            continue
        for got, want in zip(call(given), call(given.contiguous()), strict=True):
            assert not got.isnan().any(), layout
            assert torch.equal(got, want), layout


def normal(machine: Runner, *shape: int) -> Tensor:
    return torch.randn(shape, device=machine.device).bfloat16()


def integers(machine: Runner, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=machine.device)


@pytest.mark.parametrize("batched", [False, True])
def test_alibi_slopes(machine: Runner, batched: bool):
    """Forward and backward, dense and packed; each kernel reads both strides."""
    slopes = torch.rand((BATCH, HEADS) if batched else (HEADS,), device=machine.device)
    dense = [normal(machine, BATCH, 140, HEADS, DIM) for _ in range(4)]
    packed = [normal(machine, TOTAL, HEADS, DIM) for _ in range(4)]
    ends = integers(machine, 0, 40, 40, TOTAL)

    def gradients(qkv: Sequence[Tensor], dout: Tensor, function: Any, *rest: Any, **options: Any):
        leaves = [x.detach().requires_grad_() for x in qkv]
        out = function(*leaves, *rest, causal=True, deterministic=True, **options)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    def of_dense(given: Tensor) -> Sequence[Tensor]:
        return machine.call(
            gradients, dense[:3], dense[3], flash_attn.flash_attn_func, alibi_slopes=given
        )

    def of_packed(given: Tensor) -> Sequence[Tensor]:
        lengths = (ends, ends, max(LENGTHS), max(LENGTHS))
        return machine.call(
            gradients, packed[:3], packed[3], flash_attn.flash_attn_varlen_func, *lengths,
            alibi_slopes=given,
        )  # fmt: skip

    check("alibi_slopes", slopes, of_dense)
    check("alibi_slopes", slopes, of_packed)


VECTOR_REFUSED = ("every other", "expanded columns")
TABLE_REFUSED = (*VECTOR_REFUSED, "transposed")


@pytest.mark.parametrize("paged", [False, True])
def test_tensors_of_a_cache(machine: Runner, paged: bool):
    q, k, v = (normal(machine, BATCH, 2, HEADS, DIM) for _ in range(3))
    caches = [normal(machine, 2 * BATCH if not paged else 30, 80 if not paged else 16, HEADS, DIM)
              for _ in range(2)]  # fmt: skip
    table = torch.arange(30, device=machine.device).int().view(6, 5)
    cos, sin = (normal(machine, 80, DIM // 4) for _ in range(2))
    tensors: dict[str, Tensor] = {
        "cache_seqlens": integers(machine, 7, 33, 60),
        "cache_batch_idx": integers(machine, 4, 0, 2),
        "cache_leftpad": integers(machine, 0, 3, 5),
        "rotary_seqlens": integers(machine, 9, 30, 50),
    }

    def call(function: Any = flash_attn_interface.flash_attn_with_kvcache, **given: Any):
        arguments = {**tensors, "page_table": table if paged else None, **given}
        k_cache, v_cache = (cache.clone() for cache in caches)
        if "alibi_slopes" in given:
            renamed = ("cache_seqlens", "cache_batch_idx", "cache_leftpad")
            options = {name: arguments[name] for name in renamed}
            options["block_table"] = arguments["page_table"]
            if paged:  # FlashAttention-2 has no index into a page table
                del options["cache_batch_idx"], options["cache_leftpad"]
                options["block_table"] = table[:BATCH]
            out = machine.call(
                flash_attn.flash_attn_with_kvcache, q, k_cache, v_cache, k, v, causal=True,
                alibi_slopes=given["alibi_slopes"], **options,
            )  # fmt: skip
        else:
            if paged:
                del arguments["cache_leftpad"]
            out = machine.call(
                function, q, k_cache, v_cache, k, v, rotary_cos=cos, rotary_sin=sin, causal=True,
                **arguments,
            )  # fmt: skip
        return out, k_cache, v_cache

    for name, tensor in tensors.items():
        if paged and name == "cache_leftpad":
            continue
        check(name, tensor, lambda given, name=name: call(**{name: given}), VECTOR_REFUSED)
    for slopes in (torch.rand(HEADS), torch.rand(BATCH, HEADS)):
        slopes = slopes.to(machine.device)
        check("alibi_slopes", slopes, lambda given: call(alibi_slopes=given))
    if paged:
        check("page_table", table, lambda given: call(page_table=given), TABLE_REFUSED)


def test_lengths_of_packed_sequences(machine: Runner):
    q, k, v = (normal(machine, TOTAL, HEADS, DIM) for _ in range(3))
    ends = integers(machine, 0, 40, 40, TOTAL)
    used = integers(machine, 33, 0, 64)

    def call(**given: Tensor) -> Sequence[Tensor]:
        lengths = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, **given}
        out, lse = machine.call(
            flash_attn_interface.flash_attn_varlen_func, q, k, v, **lengths,
            max_seqlen_q=max(LENGTHS), max_seqlen_k=max(LENGTHS), causal=True,
            return_attn_probs=True,
        )  # fmt: skip
        return out, lse

    for name, tensor in (
        ("cu_seqlens_q", ends),
        ("cu_seqlens_k", ends),
        ("seqused_q", used),
        ("seqused_k", used),
    ):
        check(name, tensor, lambda given, name=name: call(**{name: given}), VECTOR_REFUSED)


def test_block_table_and_leftpad_of_the_packed_forward(machine: Runner):
    q = normal(machine, TOTAL, HEADS, DIM)
    pages = [normal(machine, 30, 16, HEADS, DIM) for _ in range(2)]
    table = torch.arange(15, device=machine.device).int().view(BATCH, 5)
    ends_q = integers(machine, 0, 40, 40, TOTAL)
    leftpad = integers(machine, 1, 0, 6)

    def call(name: str) -> Callable[[Tensor], Sequence[Tensor]]:
        def with_it(given: Tensor) -> Sequence[Tensor]:
            arguments = {"block_table": table, "leftpad_k": leftpad, name: given}
            out = machine.call(
                torch.ops.flash_attn._flash_attn_varlen_forward, q, *pages, ends_q, ends_q,
                max(LENGTHS), max(LENGTHS), 0.0, DIM**-0.5, True, **arguments,
            )  # fmt: skip
            return [out[0]]

        return with_it

    check("block_table", table, call("block_table"), TABLE_REFUSED)
    check("leftpad_k", leftpad, call("leftpad_k"), VECTOR_REFUSED)


def test_state_of_the_random_numbers_and_lse(machine: Runner):
    """Of the backward, which callers may hand anything that a forward returned."""
    q, k, v, dout = (normal(machine, 2, 40, 2, DIM) for _ in range(4))
    forward = torch.ops.flash_attn._flash_attn_forward
    options: tuple[Any, ...] = (0.3, DIM**-0.5, True, -1, -1, 0.0, None)
    out, lse, _, rng_state = machine.call(forward, q, k, v, *options, False)

    def call(lse: Tensor, rng_state: Tensor) -> Sequence[Tensor]:
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        machine.call(
            torch.ops.flash_attn._flash_attn_backward, dout, q, k, v, out, lse, *gradients,
            *options, True, rng_state,
        )  # fmt: skip
        return gradients

    check("rng_state", rng_state, lambda given: call(lse, given))
    for _, given in layouts(lse.flatten(0, 1)):
        given = given.unflatten(0, lse.shape[:2])
        for got, want in zip(
            call(given, rng_state), call(given.contiguous(), rng_state), strict=True
        ):
            assert torch.equal(got, want)


@pytest.mark.sim
@pytest.mark.parametrize("kind", ["hopper", "decode"])
def test_a_simulated_launch_that_failed_leaves_no_trace_in_its_plan(kind: str):
    """Its counters once stayed where they were, and the next launch left out so many tiles."""
    runner = Runner("sim", torch.device("cpu"), "sm_90a" if kind == "hopper" else "sm_80")
    q, k, v = (normal(runner, BATCH, 300, HEADS, DIM) for _ in range(3))
    target = Target(runner.arch, 0, simulated=True)
    plan: Any
    if kind == "hopper":
        problem = check_call(forward_call(q, k, v, causal=True))
        plan = hopper_tree.load().BACKEND.plan_forward(problem, target)
    else:
        q = q[:, :1]
        plan = DecodePlan(check_call(cache_call(q, k, v, num_splits=3)), target)
        assert plan.merges_in_place
    with runner.active():
        want = plan.run(Tensors(q, k, v))[0]
        with pytest.raises(SimulatorError):
            plan.run(Tensors(q, k[:1], v))
        assert torch.equal(plan.run(Tensors(q, k, v))[0], want)
