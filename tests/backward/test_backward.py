"""Backward plans of flash2 on the simulator and on the GPU, against the float64 reference.

The plan is called as autograd calls it, with out and softmax_lse of the reference, so that a
failure here is the backward's. Inputs, dout and the memory of the gradients lie in NaN.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import cases
import gradients
import oracle
import pytest
import torch
from cases import Case, on_both
from conftest import Runner
from inputs import Inputs, make_inputs
from torch import Tensor

from flash_attn_interface._common.ask import call as ask
from flash_attn_interface._common.ask.backward_problem import BackwardProblem
from flash_attn_interface._common.ask.call import DENSE, Backward, Options, Sequences, Tensors
from flash_attn_interface._common.ask.check import check as check_call
from flash_attn_interface._common.ask.problem import Problem
from flash_attn_interface._flash2 import BACKEND, bwd_tiles
from flash_attn_interface._flash2.bwd import BackwardPlan
from flash_attn_interface._flash2.bwd_tiles import BackwardTile
from flash_attn_interface.reference.forward import attention_reference

NAN, INF = float("nan"), float("inf")
RNG_STATE = (0x0123_4567_89AB_CDEF, 0x0FED_CBA9_8765_4321)

Grads = tuple[Tensor, Tensor, Tensor]


def problem_of(case: Case, inputs: Inputs) -> Problem:
    return check_call(call_of(case, inputs))


def call_of(case: Case, inputs: Inputs) -> Any:
    tensors = Tensors(
        *(x.detach() for x in (inputs.q, inputs.k, inputs.v)),
        inputs.cu_seqlens_q,
        inputs.cu_seqlens_k,
        inputs.seqused_q,
        inputs.seqused_k,
        inputs.alibi_slopes,
    )
    options = Options(
        case.softmax_scale, case.causal, case.window_size, case.attention_chunk, case.softcap,
        case.dropout_p, True,
    )  # fmt: skip
    lengths = Sequences(inputs.max_seqlen_q, inputs.max_seqlen_k) if case.varlen else DENSE
    return ask.Call(tensors, lengths, None, options)


class Call:
    """One backward: inputs, the reference's results, and what the kernels need of both."""

    def __init__(self, case: Case, device: torch.device | str, with_dlse: bool = False) -> None:
        self.case = case
        self.inputs = make_inputs(case, device)
        self.problem = problem_of(case, self.inputs)
        like_out = case.with_dims(case.head_dim_v, case.head_dim_v).but(q_factor=1.0)
        self.dout = make_inputs(like_out, device).q
        self.rng_state = None
        if case.dropout_p > 0.0:
            self.rng_state = torch.tensor(RNG_STATE, dtype=torch.int64, device=device)
        self.arguments = oracle.reference_arguments(case, self.inputs)
        self.arguments["rng_state"] = self.rng_state
        out, lse, _ = attention_reference(*(x.double() for x in self._qkv()), **self.arguments)
        assert lse is not None
        self.out, self.softmax_lse = out.to(case.torch_dtype), lse.float()
        self.dlse = torch.randn_like(self.softmax_lse) if with_dlse else None

    def _qkv(self) -> Grads:
        return self.inputs.q.detach(), self.inputs.k.detach(), self.inputs.v.detach()

    def gradients(
        self, dtype: torch.dtype, upcast: bool = True, dout: Tensor | None = None
    ) -> Grads:
        """dq, dk and dv by autograd of the reference in dtype. dout: another than this call's."""
        dout = self.dout if dout is None else dout
        q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in self._qkv())
        out, lse, _ = attention_reference(q, k, v, **self.arguments, upcast=upcast)
        no_row = self.softmax_lse.transpose(-1, -2) == -INF
        objective = (out * dout.to(dtype).masked_fill(no_row.unsqueeze(-1), 0.0)).sum()
        if self.dlse is not None:
            assert lse is not None
            objective = (
                objective + (lse * self.dlse.to(lse.dtype)).masked_fill(lse == -INF, 0.0).sum()
            )
        grads = torch.autograd.grad(objective, (q, k, v))
        return grads[0], grads[1], grads[2]

    def yardstick(self, exact: Grads) -> tuple[float, ...]:
        """Worst error of dq, dk, dv in the inputs' dtype, an estimate with little luck in it."""
        return gradients.worst_of_several(
            self.dout,
            exact,
            lambda dout: self.gradients(torch.float64, dout=dout),
            lambda dout: self.gradients(self.case.torch_dtype, upcast=False, dout=dout),
        )

    def run(
        self,
        runner: Runner,
        deterministic: bool = False,
        tile: Any = None,
        heads_per_cta: int = 0,
        backend: Any = BACKEND,
        plan_type: Any = None,
    ) -> tuple[Grads, Tensor]:
        """(dq, dk, dv), softmax_d of the kernels; the gradients lie in memory like q, k and v.

        plan_type: makes the plan, whether or not the backend would serve the problem; needed for a
            tile or heads_per_cta of the caller's choice in another tree than flash2."""
        buffers = make_inputs(self.case, runner.device)
        grads = (buffers.q, buffers.k, buffers.v)
        for grad in grads:
            grad.fill_(NAN)
        call = call_of(self.case, self.inputs)
        asked = Backward(self.dout, self.out, self.softmax_lse, *grads, self.rng_state, self.dlse)
        problem = BackwardProblem.of(self.problem, call, asked, deterministic=deterministic)
        target = runner.target(backend.name)
        if plan_type is not None:
            plan = plan_type(problem, target, tile, heads_per_cta)
        elif tile is not None or heads_per_cta:
            plan = BackwardPlan(problem, target, tile, heads_per_cta)
        else:
            assert backend.refuses_backward(problem, target) is None
            plan = backend.plan_backward(problem, target)
        with runner.active():
            softmax_d = plan.run(call.tensors, asked)
        assert_nothing_else_written(grads)
        return grads, softmax_d


def assert_nothing_else_written(grads: Grads) -> None:
    by_storage = {grad.untyped_storage().data_ptr(): grad for grad in grads}
    for address, one in by_storage.items():
        memory = torch.empty(0, dtype=one.dtype, device=one.device).set_(one.untyped_storage())
        owners = [grad for grad in grads if grad.untyped_storage().data_ptr() == address]
        written = sum(grad.numel() for grad in owners)
        assert int(torch.isnan(memory).sum()) == memory.numel() - written, (
            "gaps, or NaN in a gradient"
        )


def check(call: Call, grads: Grads, factor: float = 3.0) -> None:
    """At most `factor` times the error of the reference in the inputs' dtype; zeros where no key
    or query is."""
    exact = call.gradients(torch.float64)
    yardstick = call.yardstick(exact)
    for name, got, want, rough in zip(("dq", "dk", "dv"), grads, exact, yardstick, strict=True):
        rounding = oracle._max_abs(want.to(got.dtype).double() - want)
        oracle._assert_close(name, got.double(), want, factor * max(rough, rounding) + 1e-5)
    empty = call.softmax_lse.transpose(-1, -2) == -INF
    assert torch.count_nonzero(grads[0][empty]) == 0, (
        "dq of a row that sees no key must be exactly 0"
    )
    if call.case.dropout_p == 0.0:
        unseen = (exact[2] == 0).all(dim=-1).all(dim=-1)
        for grad in grads[1:]:
            assert torch.count_nonzero(grad[unseen]) == 0, (
                "keys that no row sees must have exact zeros"
            )


def check_case(runner: Runner, case: Case, with_dlse: bool = False) -> None:
    call = Call(case, runner.device, with_dlse)
    grads, _ = call.run(runner)
    check(call, grads)


SOME_HEAD_DIMS = [case for case in cases.HEAD_DIMS if (case.dtype == "bf16") != case.causal]


@on_both(SOME_HEAD_DIMS)
def test_head_dims(runner: Runner, case: Case):
    check_case(runner, case)


@on_both(cases.LENGTHS)
def test_lengths(runner: Runner, case: Case):
    check_case(runner, case)


@on_both(cases.HEADS)
def test_head_counts(runner: Runner, case: Case):
    check_case(runner, case)


@on_both(cases.MASKS)
def test_masks(runner: Runner, case: Case):
    check_case(runner, case)


@on_both([case for case in cases.SCORES if case.softmax_scale != 0.0])
def test_scores(runner: Runner, case: Case):
    check_case(runner, case)


@on_both(cases.DROPOUT)
def test_dropout(runner: Runner, case: Case):
    check_case(runner, case)


@on_both(cases.VARLEN)
def test_varlen(runner: Runner, case: Case):
    check_case(runner, case)


@on_both(cases.LAYOUTS)
def test_layouts(runner: Runner, case: Case):
    check_case(runner, case)


@on_both([case for case in cases.LARGE if case.softcap == 0.0])
def test_large(runner: Runner, case: Case):
    check_case(runner, case)


@on_both([Case(), Case(causal=True, seqlen_q=140, seqlen_k=40), cases.VARLEN[1], cases.DROPOUT[0]])
def test_gradient_of_softmax_lse(runner: Runner, case: Case):
    check_case(runner, case, with_dlse=True)


@on_both([Case(causal=True, seqlen_q=140, seqlen_k=40)])
def test_an_infinite_lse_of_either_sign_is_an_empty_row(runner: Runner, case: Case):
    call = Call(case, runner.device)
    grads, _ = call.run(runner)
    call.softmax_lse = call.softmax_lse.abs().masked_fill(call.softmax_lse != -INF, 0) + (
        call.softmax_lse.masked_fill(call.softmax_lse == -INF, 0)
    )
    assert (call.softmax_lse == INF).any()
    again, _ = call.run(runner)
    for got, want in zip(again, grads, strict=True):
        assert torch.equal(got, want)


@on_both([Case(seqlen_q=130, seqlen_k=70)])
def test_softmax_d(runner: Runner, case: Case):
    call = Call(case, runner.device)
    _, softmax_d = call.run(runner)
    assert softmax_d.shape == (2, 2, 256)
    expected = (call.out.float() * call.dout.float()).sum(-1).transpose(1, 2)
    torch.testing.assert_close(softmax_d[..., :130], expected, rtol=1e-4, atol=1e-4)
    assert torch.count_nonzero(softmax_d[..., 130:]) == 0


@on_both([Case(seqlen_q=100, seqlen_k=200).with_heads(4, 2, 1)])
def test_parts_of_the_keys_add_up(runner: Runner, case: Case):
    """Ring attention: each part of the keys with the merged out and softmax_lse of all."""
    call = Call(case, runner.device)
    exact = call.gradients(torch.float64)
    inputs, parts = call.inputs, []
    for keys in (slice(0, 96), slice(96, 200)):
        part = Call(case.but(seqlen_k=keys.stop - keys.start), runner.device)
        for mine, whole in ((part.inputs.k, inputs.k), (part.inputs.v, inputs.v)):
            mine.copy_(whole[:, keys])
        part.inputs.q.copy_(inputs.q)
        part.dout, part.out, part.softmax_lse = call.dout, call.out, call.softmax_lse
        parts.append(part.run(runner)[0])
    dq = parts[0][0].double() + parts[1][0].double()
    dk, dv = (torch.cat([part[i].double() for part in parts], 1) for i in (1, 2))
    for name, got, want in zip(("dq", "dk", "dv"), (dq, dk, dv), exact, strict=True):
        oracle._assert_close(name, got, want, 0.02 * float(want.abs().max()))


DETERMINISTIC = [
    Case(seqlen_q=90, seqlen_k=300, batch=1),
    Case(seqlen_q=90, seqlen_k=300, batch=1, causal=True).with_heads(4, 2, 1),
    cases.VARLEN[1],
    cases.DROPOUT[3],
    *[
        Case(seqlen_q=90, seqlen_k=300, batch=1, causal=True, only_gpu=True).with_dims(*dims)
        for dims in [*cases.NAMED_PAIRS, *((dim, dim) for dim in range(8, 257, 8))]
    ],
]


class PlanInOrder(BackwardPlan):
    """Deterministic by additions in a fixed order."""

    def _in_order(self) -> bool:
        return True


class PlanWithCopies(BackwardPlan):
    """Deterministic by copies of dq_accum."""

    def _in_order(self) -> bool:
        return False


@on_both(DETERMINISTIC)
@pytest.mark.parametrize("plan_type", [PlanInOrder, PlanWithCopies])
def test_deterministic(runner: Runner, case: Case, plan_type: type[BackwardPlan]):
    call = Call(case, runner.device)
    first, _ = call.run(runner, deterministic=True, plan_type=plan_type)
    check(call, first)
    for _ in range(1 if runner.name == "sim" else 1000):
        again, _ = call.run(runner, deterministic=True, plan_type=plan_type)
        for got, want in zip(again, first, strict=True):
            assert torch.equal(got, want)


TILES = {
    "own-rows": BackwardTile(64, 128, 4, 4, 4, 2, sub_m=32),
    "own-rows-delayed": BackwardTile(64, 128, 4, 4, 4, 2, 16, 2, 2, 2, k_in_registers=True),
    "own-rows-kept": BackwardTile(
        64, 128, 8, 8, 8, 4, 32, 2, 2, 2, k_in_registers=True, v_in_registers=True
    ),
    "shared": BackwardTile(64, 128, 8, 4, 4, 2, sub_m=32, stages_q=2),
    "shared-halves": BackwardTile(64, 64, 4, 2, 2, 2, sub_m=16, stages_q=2, stages_do=2),
    "three-strips": BackwardTile(64, 96, 8, 2, 2, 2, sub_m=16, stages_q=2),
    "smallest": BackwardTile(32, 32, 4, 2, 2, 2, sub_m=16),
    "roles": BackwardTile(64, 128, 8, 4, 4, 2, 64, 2, 2, 2, split_roles=True),
    "roles-shared": BackwardTile(64, 64, 8, 2, 2, 4, 32, 2, 2, 2, split_roles=True),
}


@on_both([Case(causal=True, seqlen_q=150, seqlen_k=170, batch=1).with_dims(64, 64)])
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("lines", [False, True], ids=["padded", "lines"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_tiles(runner: Runner, case: Case, tile: BackwardTile, lines: bool, dropout_p: float):
    """Every way in which warps may divide the work, and both layouts of Q and dO."""
    call = Call(case.but(dropout_p=dropout_p), runner.device)
    grads, _ = call.run(runner, tile=replace(tile, lines=lines))
    check(call, grads)


@pytest.mark.parametrize("tile", ["own-rows-delayed", "shared", "roles"])
@pytest.mark.sim
def test_four_sums_at_a_time(tile: str):
    """From sm_90 on a lane adds four values of dQ at once, which changes dq_accum's layout."""
    runner = Runner("sim", torch.device("cpu"), arch="sm_90")
    case = Case(causal=True, seqlen_q=150, seqlen_k=170, batch=1).with_dims(64, 64)
    call = Call(case, "cpu")
    grads, _ = call.run(runner, tile=TILES[tile])
    check(call, grads)


@on_both([Case(seqlen_q=70, seqlen_k=100, batch=1).with_dims(64, 64)])
@pytest.mark.parametrize("tile", ["shared", "roles", "roles-shared"])
def test_tiny_probabilities_keep_their_precision(runner: Runner, case: Case, tile: str):
    """As among a million keys. An LSE that is larger by c makes all gradients smaller by exp(c)."""
    call = Call(case, runner.device)
    large, _ = call.run(runner, tile=TILES[tile])
    call.softmax_lse += 20 * math.log(2.0)
    small, _ = call.run(runner, tile=TILES[tile])
    for name, want, got in zip(("dq", "dk", "dv"), large, small, strict=True):
        error = (got.float() * 2.0**20 - want.float()).abs().max()
        assert error <= 2.0**-7 * want.float().abs().max(), name


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 5), (3, 0)])
@pytest.mark.sim
def test_no_queries_or_no_keys(seqlen_q: int, seqlen_k: int):
    runner = Runner("sim", torch.device("cpu"))
    call = Call(Case(seqlen_q=seqlen_q, seqlen_k=seqlen_k), "cpu")
    grads, _ = call.run(runner)
    assert all(torch.count_nonzero(grad) == 0 for grad in grads)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_120"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_every_pair_of_head_dims_has_a_tile_on_every_arch(arch: str, dropout_p: float):
    """Planning only; validate() checks shared memory and threads against the arch."""
    strides = (1, 1, 1)
    for head_dim_qk in range(16, 257, 16):
        for head_dim_v in range(16, 257, 16):
            forward = Problem(
                "bf16",
                head_dim_qk,
                head_dim_v,
                1,
                1,
                1,
                1,
                64,
                64,
                64,
                64,
                1.0,
                dropout_p=dropout_p,
            )
            problem = BackwardProblem(forward, strides, strides, strides, strides, strides)
            bwd_tiles.backward_specs(problem, arch)
