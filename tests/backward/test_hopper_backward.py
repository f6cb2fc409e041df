"""The Hopper backward's plans, on the simulator and on an H100: the Ampere backward's cases, inputs
and bounds, in test_backward.py.
"""

from __future__ import annotations

import cases
import hopper_tree
import pytest
from cases import Case
from conftest import Runner
from test_backward import SOME_HEAD_DIMS, Call, Grads, check
from test_hopper_forward import machine, on_hopper, serves
from test_ordered_additions import ORDERED, same, show_the_order

from flash_attn_interface._common.ask.backward_problem import BackwardProblem
from flash_attn_interface._common.ask.problem import Problem, Target
from flash_attn_interface._common.sim import launcher

__all__ = ["machine"]

hopper_tree.load()
from flash_attn_3 import BACKEND, bwd_tiles  # noqa: E402
from flash_attn_3.bwd import BackwardPlan  # noqa: E402
from flash_attn_3.bwd_tiles import BackwardTile  # noqa: E402

ARCH = "sm_90a"


def check_case(
    machine: Runner,
    case: Case,
    with_dlse: bool = False,
    tile: BackwardTile | None = None,
    heads_per_cta: int = 0,
) -> None:
    call = Call(case, machine.device, with_dlse)
    chosen = None if tile is None and not heads_per_cta else BackwardPlan
    grads, _ = call.run(machine, False, tile, heads_per_cta, backend=BACKEND, plan_type=chosen)
    check(call, grads)


@on_hopper([case for case in SOME_HEAD_DIMS if serves(case)])
def test_head_dims(machine: Runner, case: Case):
    check_case(machine, case)


@on_hopper(cases.LENGTHS)
def test_lengths(machine: Runner, case: Case):
    check_case(machine, case)


@on_hopper(cases.HEADS)
def test_head_counts(machine: Runner, case: Case):
    check_case(machine, case)


@on_hopper(cases.MASKS)
def test_masks(machine: Runner, case: Case):
    check_case(machine, case)


@on_hopper([case for case in cases.SCORES if case.softmax_scale != 0.0])
def test_scores(machine: Runner, case: Case):
    check_case(machine, case)


@on_hopper(cases.DROPOUT)
def test_dropout(machine: Runner, case: Case):
    check_case(machine, case)


@on_hopper(cases.VARLEN)
def test_varlen(machine: Runner, case: Case):
    check_case(machine, case)


@on_hopper([case for case in cases.LAYOUTS if serves(case)])
def test_layouts(machine: Runner, case: Case):
    check_case(machine, case)


@on_hopper([case for case in cases.LARGE if case.softcap == 0.0 and serves(case)])
def test_large(machine: Runner, case: Case):
    check_case(machine, case)


@on_hopper(
    [Case(), Case(causal=True, seqlen_q=140, seqlen_k=40), cases.VARLEN[1], cases.DROPOUT[0]]
)
def test_gradient_of_softmax_lse(machine: Runner, case: Case):
    check_case(machine, case, with_dlse=True)


TILES = {
    "joint": BackwardTile(64, 128),
    "joint-128": BackwardTile(128, 128, stages_q=1, stages_do=1),
    "joint-bulk": BackwardTile(64, 128, add_stages=2),
    "split": BackwardTile(64, 64, split_roles=True),
    "split-128": BackwardTile(64, 128, split_roles=True, add_stages=1),
    "split-one-stage": BackwardTile(64, 64, True, 1, 1, 1),
    "split-floats": BackwardTile(64, 64, True, aux=False),
    "split-overlapped": BackwardTile(64, 64, True, dq_buffers=2, dq_columns=128),
    "joint-overlapped": BackwardTile(
        128, 128, False, 1, 1, add_stages=1, dq_buffers=2, dq_columns=128
    ),
    "pair": BackwardTile(64, 64, True, stages_ds=1, cluster_size=2),
    "pair-two-stages": BackwardTile(64, 64, True, add_stages=2, cluster_size=2),
    "pair-128": BackwardTile(64, 128, True, stages_ds=1, cluster_size=2),
    "pair-joint": BackwardTile(64, 128, stages_ds=1, add_stages=1, cluster_size=2),
}


@on_hopper(
    [
        Case(causal=True, seqlen_q=290, seqlen_k=310, batch=1).with_dims(64, 64),
        Case(seqlen_q=150, seqlen_k=170, batch=1).with_dims(80, 48).with_heads(4, 2, 1),
        cases.VARLEN[1],
    ]
)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_tiles(machine: Runner, case: Case, tile: BackwardTile):
    """Every way in which warpgroups may divide the work."""
    check_case(machine, case, tile=tile)


@on_hopper([Case(seqlen_q=150, seqlen_k=170, batch=1).with_heads(8, 2, 1)])
@pytest.mark.parametrize("heads_per_cta", [2, 4, 8])
def test_ctas_that_share_heads(machine: Runner, case: Case, heads_per_cta: int):
    check_case(machine, case, heads_per_cta=heads_per_cta)


def deterministic(machine: Runner, call: Call, tile: BackwardTile | None, heads: int = 0) -> Grads:
    return call.run(machine, True, tile, heads, backend=BACKEND, plan_type=BackwardPlan)[0]


def check_deterministic(
    machine: Runner, case: Case, tile: BackwardTile | None = None, heads_per_cta: int = 0
) -> None:
    """In the simulator the first runs have room for one CTA or cluster, which proves that CTAs wait
    for earlier ones only, and gives the order that runs of many CTAs at a time must keep.
    """
    call = Call(case, machine.device)
    with launcher.checks(resident_ctas=1 if tile is None else tile.cluster_size):
        with launcher.checks(ordered_adds=True):
            check(call, deterministic(machine, call, tile, heads_per_cta))
        show_the_order(call)
        first = deterministic(machine, call, tile, heads_per_cta)
    if machine.name == "sim":
        for seed, resident_ctas in enumerate((3, 16, 132)):
            with launcher.checks(seed=seed, resident_ctas=resident_ctas):
                assert same(first, deterministic(machine, call, tile, heads_per_cta))
        return
    for _ in range(1000):
        assert same(first, deterministic(machine, call, tile, heads_per_cta))


@on_hopper(ORDERED)
def test_deterministic(machine: Runner, case: Case):
    check_deterministic(machine, case)


@on_hopper(
    [
        Case(causal=True, seqlen_q=290, seqlen_k=310, batch=1).with_dims(64, 64),
        Case(seqlen_q=290, seqlen_k=470, batch=1, window_size=(130, 20)).with_dims(80, 48),
        cases.VARLEN[1],
    ]
)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_deterministic_with_every_tile(machine: Runner, case: Case, tile: BackwardTile):
    check_deterministic(machine, case, tile)


@on_hopper([Case(seqlen_q=150, seqlen_k=300, batch=1, causal=True).with_heads(8, 2, 1)])
@pytest.mark.parametrize("heads_per_cta", [2, 4, 8])
def test_deterministic_with_ctas_that_share_heads(machine: Runner, case: Case, heads_per_cta: int):
    check_deterministic(machine, case, heads_per_cta=heads_per_cta)


@on_hopper([Case(seqlen_q=70, seqlen_k=100, batch=1).with_dims(64, 64)])
@pytest.mark.parametrize("tile", ["joint", "split"])
def test_tiny_probabilities_keep_their_precision(machine: Runner, case: Case, tile: str):
    """As among a million keys. An LSE that is larger by c makes all gradients smaller by exp(c)."""
    call = Call(case, machine.device)
    options = {"tile": TILES[tile], "backend": BACKEND, "plan_type": BackwardPlan}
    large, _ = call.run(machine, **options)
    call.softmax_lse += 20 * 0.6931471805599453
    small, _ = call.run(machine, **options)
    for name, want, got in zip(("dq", "dk", "dv"), large, small, strict=True):
        error = (got.float() * 2.0**20 - want.float()).abs().max()
        assert error <= 2.0**-7 * want.float().abs().max(), name


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_every_pair_of_head_dims_has_a_tile(dropout_p: float):
    strides = (1, 1, 1)
    sizes = (1, 1, 1, 1, 64, 64, 64, 64, 1.0)
    for head_dim_qk in range(16, 257, 16):
        for head_dim_v in range(16, 257, 16):
            forward = Problem("bf16", head_dim_qk, head_dim_v, *sizes, dropout_p=dropout_p)
            problem = BackwardProblem(forward, strides, strides, strides, strides, strides)
            main = bwd_tiles.backward_specs(problem, ARCH)[1]
            split = bool(main["split_roles"])
            roles = [main["score_registers"], main["gradient_registers"], main["dq_registers"]]
            assert int(main["producer_registers"]) + sum(map(int, roles)) <= 512, main.describe()
            assert split or roles[0] == roles[1]


def test_what_it_refuses_says_why():
    target = Target(ARCH, 0, simulated=True)
    strides = (64 * 2 * 128, 2 * 128, 128)
    forward = Problem(
        "bf16", 128, 128, 2, 2, 2, 1, 64, 64, 64, 64, 0.1,
        q_strides=strides, k_strides=strides, v_strides=strides,
    )  # fmt: skip
    problem = BackwardProblem(forward, *[strides] * 5)
    assert BACKEND.refuses_backward(problem, target) is None
    expanded = BackwardProblem(forward, strides, (0, 0, 128), *[strides] * 3)
    reason = BACKEND.refuses_backward(expanded, target)
    assert reason is not None and "dout is expanded along its row axis" in reason
