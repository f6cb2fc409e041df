"""The deterministic backward whose CTAs add to dq in a fixed order, one after the
other, by counters in memory (flash2/device/bwd_turns.cuh). On the simulator and on the GPU.
"""

from __future__ import annotations

import cases
import pytest
import torch
from cases import Case, on_both
from conftest import Runner
from test_backward import DETERMINISTIC, TILES, Call, Grads, PlanInOrder, check

from flash_attn_interface._common.runtime import sources
from flash_attn_interface._common.sim import launcher
from flash_attn_interface._common.sim.launcher import SimulatorError
from flash_attn_interface._flash2 import bwd
from flash_attn_interface._flash2.bwd_tiles import BackwardTile
from flash_attn_interface.reference.forward import attention_reference

ORDERED = [
    *DETERMINISTIC,
    Case(causal=True, seqlen_q=290, seqlen_k=310, batch=1).with_heads(4, 2, 1),
    Case(seqlen_q=290, seqlen_k=470, batch=1, window_size=(130, 20)),
    Case(seqlen_q=290, seqlen_k=470, batch=1, window_size=(-1, 20)),
    Case(seqlen_q=290, seqlen_k=470, batch=1, window_size=(70, -1), causal=True),
    Case(seqlen_q=290, seqlen_k=310, batch=1, attention_chunk=96),
    *cases.VARLEN[2:4],
    *cases.VARLEN[9:12],
    Case(causal=True, lengths_q=(200, 0, 300), lengths_k=(330, 12, 260), tail=5),
]


def same(some: Grads, others: Grads) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def show_the_order(call: Call) -> None:
    """Makes dq tell in which order its parts were added, although it is rounded to 16 bits: in each
    row dS adds up to 0, so a constant added to all keys leaves dq, but not the parts, as it was.
    """
    call.inputs.k.detach().add_(128)
    out, lse, _ = attention_reference(*(x.double() for x in call._qkv()), **call.arguments)
    assert lse is not None
    call.out, call.softmax_lse = out.to(call.out.dtype), lse.float()


def in_order(
    runner: Runner, call: Call, tile: BackwardTile | None = None, heads_per_cta: int = 0
) -> Grads:
    return call.run(runner, True, tile, heads_per_cta, plan_type=PlanInOrder)[0]


def check_in_order(
    runner: Runner, case: Case, tile: BackwardTile | None = None, heads_per_cta: int = 0
) -> None:
    """In the simulator the first runs have room for one CTA, which proves that CTAs wait for
    earlier ones only, and gives the order that runs of many CTAs at a time must keep.
    """
    call = Call(case, runner.device)
    with launcher.checks(resident_ctas=1):
        with launcher.checks(ordered_adds=True):
            check(call, in_order(runner, call, tile, heads_per_cta))
        show_the_order(call)
        first = in_order(runner, call, tile, heads_per_cta)
    if runner.name == "sim":
        for seed, resident_ctas in enumerate((3, 16, 132)):
            with launcher.checks(seed=seed, resident_ctas=resident_ctas):
                assert same(first, in_order(runner, call, tile, heads_per_cta))
        return
    for _ in range(1000):
        assert same(first, in_order(runner, call, tile, heads_per_cta))


@on_both(ORDERED)
def test_the_order_is_kept(runner: Runner, case: Case):
    check_in_order(runner, case)


@on_both(
    [
        Case(causal=True, seqlen_q=290, seqlen_k=310, batch=1).with_dims(64, 64),
        Case(seqlen_q=290, seqlen_k=470, batch=1, window_size=(130, 20)).with_dims(80, 48),
        cases.VARLEN[1].with_heads(4, 2, 1),
    ]
)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_with_every_tile(runner: Runner, case: Case, tile: BackwardTile):
    check_in_order(runner, case, tile)


@on_both([Case(seqlen_q=150, seqlen_k=300, batch=1, causal=True).with_heads(8, 2, 1)])
@pytest.mark.parametrize("heads_per_cta", [2, 4, 8])
def test_with_ctas_that_share_heads(runner: Runner, case: Case, heads_per_cta: int):
    check_in_order(runner, case, heads_per_cta=heads_per_cta)


TURNS = "flash2/device/bwd_turns.cuh"
LOOK = "wait_global_at_least(counter(at), u32(ahead));"
COUNT = "step > kDqDelay) {\n        count(back<kDqDelay + 1>(at));"
RELEASE = "red_release_global_add_u32(counter(at), 1);"
FAULTS = {
    "early-turn": (LOOK, "if (ahead > 1) { wait_global_at_least(counter(at), u32(ahead - 1)); }"),
    "no-turn": (LOOK, ""),
    "early-count": (COUNT, "step >= kDqDelay) {\n        count(back<kDqDelay>(at));"),
    "no-release": (RELEASE, "atomic_add_global_u32(counter(at), 1);"),
    "no-last-barrier": ("cta_sync();\n      if", "if"),
}
UNORDERED = r"this addition is not ordered after the addition by CTA \d+, warp \d, lane \d+ at "


@pytest.mark.sim
@pytest.mark.parametrize("tile", ["own-rows-delayed", "shared", "roles"])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_found(
    fault: tuple[str, str], tile: str, monkeypatch: pytest.MonkeyPatch
):
    """With one CTA at a time, whose additions come in order whether or not anything sees to it."""
    right, wrong = fault
    read = sources.read

    def read_with_fault(name: str) -> str:
        text = read(name)
        assert name != TURNS or text.count(right) == 1
        return text.replace(right, wrong) if name == TURNS else text

    monkeypatch.setattr(sources, "read", read_with_fault)
    call = Call(Case(seqlen_q=130, seqlen_k=300, batch=1, causal=True), "cpu")
    runner = Runner("sim", torch.device("cpu"))
    with (
        launcher.checks(resident_ctas=1, ordered_adds=True),
        pytest.raises(SimulatorError, match=UNORDERED),
    ):
        in_order(runner, call, TILES[tile])


@pytest.mark.sim
@pytest.mark.parametrize("causal", [False, True])
def test_any_number_of_sms_gives_the_same_bits(causal: bool, monkeypatch: pytest.MonkeyPatch):
    """It decides which units run together. That of the heads in a CTA, which it decides too, shows
    in dk and dv."""
    runner = Runner("sim", torch.device("cpu"))
    call = Call(Case(seqlen_q=150, seqlen_k=300, batch=3, causal=causal), "cpu")
    show_the_order(call)
    results = []
    for num_sms in (1, 4, 7, 132):
        monkeypatch.setattr(bwd, "SIMULATED_SMS", num_sms)
        results.append(in_order(runner, call, heads_per_cta=1))
    assert all(same(results[0], other) for other in results[1:])
