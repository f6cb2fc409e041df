"""The autotuner on real kernels: its check in the simulator, a whole run on a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import hopper_tree
import pytest
import torch
from tune_bench import (
    BACKWARD,
    DECODE,
    FORWARD,
    HOPPER_BACKWARD,
    HOPPER_FORWARD,
    Bench,
    check_problem,
    name_of,
    problem_of,
)

from flash_attn_interface._common.ask.problem import Target
from flash_attn_interface._common.tiles import tuned_tiles
from flash_attn_interface._flash2 import fwd_tiles
from flash_attn_interface.tune import command as tune
from flash_attn_interface.tune import measure as tune_measure
from flash_attn_interface.tune.journal import Journal
from flash_attn_interface.tune.measure import Checker, make_problem
from flash_attn_interface.tune.search import Search, Settings

hopper_tree.load()
from flash_attn_3.bwd_tiles import BackwardTile  # noqa: E402

# --- the check against the reference, on the real kernels -------------------------------------

SIMULATED = [
    (FORWARD, "sm_80", {"causal": True}, fwd_tiles.ForwardTile(128, 48, 8, 3, True)),
    (
        FORWARD,
        "sm_80",
        {"features": ("local", "softcap", "alibi")},
        fwd_tiles.ForwardTile(64, 32, 2),
    ),
    (FORWARD, "sm_80", {"features": ("dropout",)}, fwd_tiles.ForwardTile(64, 96, 4)),
    (BACKWARD, "sm_80", {"causal": True}, None),
    (BACKWARD, "sm_80", {"features": ("dropout",)}, None),
    (DECODE, "sm_80", {"seqlen_q": 1, "heads": 4, "heads_kv": 2}, None),
    (HOPPER_FORWARD, "sm_90a", {"causal": True}, None),
    (HOPPER_BACKWARD, "sm_90a", {"causal": True}, None),
    (HOPPER_BACKWARD, "sm_90a", {"features": ("dropout",)}, None),
    (HOPPER_BACKWARD, "sm_90a", {}, BackwardTile(64, 64, True, stages_ds=1, cluster_size=2)),
]


@pytest.mark.sim
@pytest.mark.parametrize(("tunable", "arch", "changes", "tile"), SIMULATED, ids=name_of)
def test_candidates_pass_the_check_in_the_simulator(tunable, arch, changes, tile):
    sizes = {"batch": 2, "heads": 2, "seqlen_q": 70, "seqlen_k": 83, "window": 30}
    asked = make_problem("bf16", (48, 80), changes.get("causal", False), **{
        **sizes, **{k: v for k, v in changes.items() if k != "causal"}
    })  # fmt: skip
    target = Target(arch, 0, simulated=True)
    checker = Checker(tunable, asked, target)
    tile = tile or tunable.candidates(asked, arch, 20)[-1]
    plan = tunable.plan(checker.case.problem, target, tile)
    assert tunable.refuses(tile, asked, arch) is None
    assert checker.refuses(plan) is None
    broken = BrokenPlan(plan)
    assert "wrong" in checker.refuses(broken)


class BrokenPlan:
    """Right but for one element of the last result that counts."""

    def __init__(self, plan):
        self.plan = plan

    def run(self, *tensors):
        results = self.plan.run(*tensors)
        if isinstance(results, tuple):
            results[0].view(-1)[-1] += 0.25
        else:
            tensors[1].dv.view(-1)[-1] += 0.25  # dv
        return results


@pytest.mark.sim
def test_a_whole_search_in_the_simulator():
    """Real plans, real results; only the compiler's report and the clock are made up."""
    asked = problem_of()
    bench = Bench(lambda tile: 100.0)
    order = []

    def plan(problem, target, tile):
        real = FORWARD.plan(problem, target, tile)
        assert real.spec["block_n"] == tile.block_n
        order.append(tile)
        return real

    def clock(run, calls):
        run()
        return [50.0 + len(order) % 2] * calls

    settings = Settings({64: asked}, check_problem(), 2, 1)
    target = Target("sm_80", 0, simulated=True)
    search = Search(replace(FORWARD, plan=plan), target, settings, Journal(None), "simulator")
    bench.clock = clock
    result = bench.run(search)
    assert result.rejected == {}
    assert len(result.screened) == len(search.waved) >= 3
    assert result.best is None


@pytest.mark.gpu
def test_tuning_on_the_gpu(tmp_path: Path, monkeypatch, capsys):
    """The whole command, with little effort; what it writes is used and not slower."""
    monkeypatch.setenv("FLASH_ATTN_INTERFACE_TUNED_TILES", str(tmp_path / "tables"))
    command = ["--dims", "48", "80", "--direction", "fwd", "bwd", "--causal", "yes"]
    command += ["--seqlen", "512", "--tokens", "4096", "--max-candidates", "4"]
    command += ["--max-neighbours", "2", "--report", str(tmp_path / "report.md")]
    tuned_tiles.forget()
    assert tune.main(command) == 0
    report = (tmp_path / "report.md").read_text()
    assert "flash2/fwd/bf16/48x80/causal" in report and "flash2/bwd/bf16/48x80/causal" in report
    for path in (tmp_path / "tables").glob("*.json"):
        table = tuned_tiles.read(path)
        assert table is not None and table.gpu == torch.cuda.get_device_name()
        assert all(entry.facts["speedup"] > 1.0 for entry in table.entries.values())
    timed = tune_measure.cuda_clock
    monkeypatch.setattr(tune, "cuda_clock", lambda run, calls: pytest.fail("timed again"))
    assert tune.main(command) == 0
    assert timed is not None and capsys.readouterr().out
    tuned_tiles.forget()
