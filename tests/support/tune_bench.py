"""Shared by the tests of the autotuner: problems, and a search with made-up kernels, compiler and
clock.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hopper_tree

from flash_attn_interface._common.ask.problem import Target
from flash_attn_interface._common.runtime.compiler import ResourceUsage
from flash_attn_interface._common.tiles.tuning import Tunable
from flash_attn_interface._flash2 import tuning as flash2_tuning
from flash_attn_interface.call import backends
from flash_attn_interface.tune import compile as tune_compile
from flash_attn_interface.tune import search as tune_search
from flash_attn_interface.tune.journal import Journal
from flash_attn_interface.tune.measure import make_problem
from flash_attn_interface.tune.search import Result, Search, Settings

HOPPER = hopper_tree.load()
FORWARD, BACKWARD, DECODE = flash2_tuning.TUNABLES
HOPPER_FORWARD, HOPPER_BACKWARD = HOPPER.BACKEND.tunables()
CLEAN = ResourceUsage(registers=128, spill_store_bytes=0, spill_load_bytes=0, stack_bytes=0)


def problem(tunable: Tunable = FORWARD, dims=(48, 80), causal=False, seqlen=4096, **changes: Any):
    sizes = {"batch": 2, "heads": 8, "heads_kv": 2, "seqlen_q": seqlen, "seqlen_k": seqlen}
    if tunable.direction == "decode":
        sizes["seqlen_q"] = 1
    return make_problem("bf16", dims, causal, **{**sizes, **changes})


def name_of(value: object) -> str | None:
    return f"{value.tree}-{value.direction}" if isinstance(value, Tunable) else None


FACTS = {"gpu": "GPU 1", "driver": "CUDA driver 13.0", "date": "2026-11-22"}


class Bench:
    """Plans that compute with the reference, compilations that report, a clock that knows."""

    def __init__(self, us_of, spilling=(), wrong=()):
        self.us_of, self.spilling, self.wrong = us_of, spilling, wrong
        self.running = None
        self.timed: list[Any] = []
        self.compiled: list[Any] = []

    def tunable(self, of: Tunable = FORWARD) -> Tunable:
        def plan(asked, target, tile):
            return BenchPlan(self, asked, tile)

        return replace(of, plan=plan)

    def compile_all(self, specs, title):
        specs = list(dict.fromkeys(specs))
        self.compiled += specs
        spilling = {FORWARD.specs(problem_of(), "sm_80", tile)[0] for tile in self.spilling}
        report = tune_compile.Report
        spill = replace(CLEAN, spill_load_bytes=4)
        return {spec: report(spill if spec in spilling else CLEAN) for spec in specs}

    def clock(self, run, calls):
        run()
        self.timed.append(self.running)
        return [self.us_of(self.running)] * calls

    def search(self, journal=None, tunable=None) -> Search:
        settings = Settings({64: problem_of()}, check_problem(), 10, 4)
        target = Target("sm_80", 0, simulated=True)
        return Search(
            tunable or self.tunable(), target, settings, journal or Journal(None), "GPU 1", FACTS
        )

    def run(self, search) -> Result:
        results, failures = self.run_all([search])
        assert failures == {}
        return results[0]

    def run_all(self, searches, **limits) -> tuple[dict[int, Result], dict[int, str]]:
        results: dict[int, Result] = {}

        def each(title, total):
            return lambda: None

        failures = tune_search.run(
            searches, self.compile_all, self.clock, each, results.__setitem__, **limits
        )
        return results, failures


class BenchPlan:
    def __init__(self, bench, asked, tile):
        self.bench, self.asked, self.tile = bench, asked, tile

    def run(self, *tensors):
        self.bench.running = self.tile
        out, lse, _ = backends.REFERENCE.plan_forward(self.asked, None).run(*tensors)
        if self.tile in self.bench.wrong:
            out[0, -1, -1, -1] = float("nan")
        return out, lse, None


def problem_of():
    return problem(seqlen=64, batch=1, heads=1, heads_kv=1)


def check_problem():
    return problem(seqlen=40, batch=1, heads=1, heads_kv=1, seqlen_k=51)


def shipped_tile():
    return FORWARD.builtin(problem_of(), "sm_80")
