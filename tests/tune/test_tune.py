"""The autotuner: which candidates it tries, what it leaves out, whom it lets win.

Without a GPU and without kernels: the clock is the test's. test_tune_kernels.py has the real ones.
"""

from __future__ import annotations

from dataclasses import astuple, replace

import pytest
from tune_bench import (
    BACKWARD,
    CLEAN,
    DECODE,
    FACTS,
    FORWARD,
    HOPPER_BACKWARD,
    HOPPER_FORWARD,
    Bench,
    check_problem,
    name_of,
    problem,
    problem_of,
    shipped_tile,
)

from flash_attn_interface._common.ask.problem import Target
from flash_attn_interface._common.runtime.compiler import CompileError
from flash_attn_interface._flash2 import fwd_tiles
from flash_attn_interface.tune import compile as tune_compile
from flash_attn_interface.tune.journal import Journal
from flash_attn_interface.tune.measure import Checker
from flash_attn_interface.tune.search import DeviceLostError, choose

PLACES = [
    *((FORWARD, arch) for arch in ("sm_80", "sm_86", "sm_90")),
    *((BACKWARD, arch) for arch in ("sm_80", "sm_89")),
    *((DECODE, arch) for arch in ("sm_80", "sm_120")),
    (HOPPER_FORWARD, "sm_90a"),
]


# --- candidates ------------------------------------------------------------------------------


@pytest.mark.parametrize(("tunable", "arch"), PLACES, ids=name_of)
@pytest.mark.parametrize("dims", [(160, 224), (48, 80), (256, 256), (8, 16)], ids=str)
def test_candidates_are_distinct_and_can_be_built(tunable, arch, dims):
    asked = problem(tunable, dims)
    found = tunable.candidates(asked, arch, 40)
    assert found == tunable.candidates(asked, arch, 40)
    assert 1 <= len(found) <= 40 and len(set(found)) == len(found)
    for tile in found:
        assert tunable.refuses(tile, asked, arch) is None
        spec = tunable.specs(asked, arch, tile)[0]  # validates shared memory, threads, CTAs
        assert spec["block_n"] == tile.block_n and spec["min_ctas_per_sm"] >= 1


@pytest.mark.parametrize(("tunable", "arch"), PLACES, ids=name_of)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (160, 224)], ids=str)
def test_the_trees_own_choices_obey_the_rules_that_candidates_must(tunable, arch, dims):
    for causal in (False, True):
        asked = problem(tunable, dims, causal)
        assert tunable.refuses(tunable.builtin(asked, arch), asked, arch) is None


@pytest.mark.parametrize(("tunable", "arch"), PLACES, ids=name_of)
def test_candidates_do_not_stake_all_on_one_shape(tunable, arch):
    found = tunable.candidates(problem(tunable), arch, 30)
    shapes = {tunable._shape(tile) for tile in found}
    assert len(shapes) >= 8


@pytest.mark.parametrize(("tunable", "arch"), PLACES, ids=name_of)
def test_neighbours_differ_in_one_field(tunable, arch):
    asked = problem(tunable)
    middle = tunable.candidates(asked, arch, 1)[0]
    near = tunable.neighbours(middle, asked, arch, 50)
    assert near
    for tile in near:
        assert sum(a != b for a, b in zip(astuple(tile), astuple(middle), strict=True)) == 1


@pytest.mark.parametrize(
    ("tunable", "arch", "dims", "schedule"),
    [
        (FORWARD, "sm_80", (64, 64), "one_barrier"),
        (FORWARD, "sm_90", (64, 128), "one_barrier"),
        (FORWARD, "sm_90", (256, 256), "prologue_chunks"),
        (BACKWARD, "sm_90", (64, 128), "split_roles"),
        (BACKWARD, "sm_90", (128, 128), "split_roles"),
        (BACKWARD, "sm_90", (256, 256), "split_roles"),
        (BACKWARD, "sm_90", (48, 80), "k_in_registers"),
        (DECODE, "sm_80", (64, 64), "q_in_registers"),
        (HOPPER_FORWARD, "sm_90a", (32, 64), "ping_pong"),
        (HOPPER_FORWARD, "sm_90a", (64, 128), "p_in_smem"),
        (HOPPER_BACKWARD, "sm_90a", (64, 64), "split_roles"),
        (HOPPER_BACKWARD, "sm_90a", (96, 192), "dq_columns"),
        (HOPPER_BACKWARD, "sm_90a", (128, 128), "cluster_size"),
        (HOPPER_BACKWARD, "sm_90a", (128, 256), "dq_buffers"),
        (HOPPER_BACKWARD, "sm_90a", (192, 128), "add_stages"),
        (HOPPER_BACKWARD, "sm_90a", (256, 256), "cluster_size"),
        (HOPPER_BACKWARD, "sm_90a", (256, 256), "aux"),
    ],
    ids=lambda value: name_of(value) or str(value),
)
def test_candidates_try_each_schedule_both_ways(tunable, arch, dims, schedule):
    """Of its own list the tree takes some from measurements; the estimate must not exclude them."""
    asked = problem(tunable, dims)
    found = tunable.candidates(asked, arch, 32)
    assert len({getattr(tile, schedule) for tile in found}) == 2
    assert tunable.builtin(asked, arch) in set(tunable.space(asked, arch))


def test_dropout_takes_key_tiles_of_whole_patches():
    asked = problem(features=("dropout",))
    assert all(tile.block_n % 32 == 0 for tile in FORWARD.candidates(asked, "sm_80", 40))
    hopper = HOPPER_FORWARD.candidates(asked, "sm_90a", 40)
    assert hopper and all(tile.block_n % 32 == 0 for tile in hopper)


# --- the choice ------------------------------------------------------------------------------

A, B, C = (fwd_tiles.ForwardTile(128, block_n, 8) for block_n in (32, 64, 96))


@pytest.mark.parametrize(
    ("a", "b", "c", "winner"),
    [
        ((100, 100), (80, 80), (90, 90), B),
        ((100, 100), (99.5, 99.5), (99.2, 99.2), None),  # ties with what is in use
        ((100, 100), (80.1, 80.1), (80, 80), B),  # tie of others: the first by its fields
        ((100, 100), (60, 102), (90, 95), C),  # slower at one length
        ((100, 100), (100.9, 90), (120, 60), B),
        ((100, 100), (110, 110), (120, 120), None),
    ],
)
def test_choice(a, b, c, winner):
    times = dict(zip((C, B, A), (c, b, a), strict=True))  # the order does not matter
    as_dicts = {tile: dict(zip((1024, 4096), us, strict=True)) for tile, us in times.items()}
    assert choose(as_dicts, shipped={1024: A, 4096: A}) == winner


def test_choice_where_the_tile_in_use_depends_on_the_length():
    """One tile must then beat each where it is used."""
    times = {A: {1024: 90, 4096: 130}, B: {1024: 130, 4096: 90}, C: {1024: 89, 4096: 85}}
    assert choose(times, {1024: A, 4096: B}) == C
    assert choose({A: times[A], B: times[B]}, {1024: A, 4096: B}) is None
    times[C] = {1024: 80, 4096: 92}
    assert choose(times, {1024: A, 4096: B}) is None


# --- compiling -------------------------------------------------------------------------------


def test_reports_are_remembered_and_kernels_that_are_out_not_compiled_again(tmp_path):
    asked = problem()
    good, spilling, broken = (
        FORWARD.specs(asked, "sm_80", tile)[0]
        for tile in FORWARD.candidates(asked, "sm_80", 30)[:3]
    )
    compiled = []

    def compile_one(spec):
        compiled.append(spec)
        if spec == broken:
            raise CompileError(spec, "static assertion failed", "log")
        return replace(CLEAN, spill_store_bytes=8) if spec == spilling else CLEAN

    def reports():
        journal, ticks = Journal(tmp_path / "journal.jsonl"), []
        specs = [good, spilling, broken, good]
        found = tune_compile.compile_all(specs, 2, journal, lambda: ticks.append(1), compile_one)
        assert len(ticks) == len(found) == 3
        return found

    first = reports()
    assert [first[spec].clean for spec in (good, spilling, broken)] == [True, False, False]
    assert "static assertion" in first[broken].error and first[spilling].spill_bytes == 8
    assert len(compiled) == 3
    assert reports() == first
    assert compiled[3:] == [good]  # its code is wanted, the others' is not


def test_journal_survives_a_torn_last_line(tmp_path):
    path = tmp_path / "deep" / "journal.jsonl"
    Journal(path).put("check", "one", {"wrong": None})
    with path.open("a") as file:
        file.write('{"kind": "check", "id": "tw')
    journal = Journal(path)
    assert journal.get("check", "one") == {"wrong": None}
    assert journal.get("check", "tw") is None and journal.get("compile", "one") is None


def test_a_candidate_is_as_good_as_its_worst_kernel():
    good, spilling = (tune_compile.Report(replace(CLEAN, spill_load_bytes=n)) for n in (0, 4))
    broken = tune_compile.Report(None, "static assertion failed")
    assert tune_compile.together([good, good]) == good
    assert tune_compile.together([good, spilling]) == spilling
    assert tune_compile.together([spilling, broken, good]) == broken


@pytest.mark.parametrize(("tunable", "arch"), PLACES, ids=name_of)
def test_all_kernels_of_a_plan_are_compiled_before_it_is_timed(tunable, arch):
    """Or they would be compiled one by one while the GPU waits."""
    for seqlen in (1024, 16384):
        asked = problem(tunable, seqlen=seqlen)
        for tile in tunable.candidates(asked, arch, 5):
            plan = tunable.plan(asked, Target(arch, 0, simulated=True), tile)
            used = set(getattr(plan, "specs", None) or [plan.spec])
            assert used <= set(tunable.specs(asked, arch, tile))


# --- the search ------------------------------------------------------------------------------


def test_the_fastest_candidate_wins():
    best = FORWARD.candidates(problem_of(), "sm_80", 10)[4]
    bench = Bench(lambda tile: 50.0 if tile == best else 100.0)
    result = bench.run(bench.search())
    assert (result.shipped, result.best) == ({64: shipped_tile()}, best)
    assert result.speedup == pytest.approx(2.0)
    assert result.best_us == {64: 50.0} and result.shipped_us == {64: 100.0}
    assert len(result.screened) == len(bench.compiled) <= 15 and result.rejected == {}


def test_nothing_is_changed_if_all_tie():
    bench = Bench(lambda tile: 100.0 if tile == shipped_tile() else 99.5)
    result = bench.run(bench.search())
    assert result.best is None and result.shipped == {64: shipped_tile()}
    assert result.best_us == result.shipped_us and result.speedup == 1.0


def test_the_second_wave_looks_beside_the_best_of_the_first():
    first = FORWARD.candidates(problem_of(), "sm_80", 10)
    near = [t for t in FORWARD.neighbours(first[0], problem_of(), "sm_80", 99) if t not in first]
    hidden = [tile for tile in near if tile != shipped_tile()][0]
    bench = Bench(lambda tile: {first[0]: 80.0, hidden: 70.0}.get(tile, 100.0))
    assert bench.run(bench.search()).best == hidden


def test_the_third_wave_looks_beside_the_best_of_the_second():
    first = FORWARD.candidates(problem_of(), "sm_80", 10)
    tried = [*first, shipped_tile()]

    def beside(tile):
        return [t for t in FORWARD.neighbours(tile, problem_of(), "sm_80", 99) if t not in tried]

    best = first[0]
    near = beside(best)[:4]  # as many as the bench's settings allow
    step = next(tile for tile in near if set(beside(tile)) - set(near))
    hidden = next(tile for tile in beside(step) if tile not in near)
    bench = Bench(lambda tile: {best: 80.0, step: 70.0, hidden: 60.0}.get(tile, 100.0))
    assert bench.run(bench.search()).best == hidden


def test_candidates_that_spill_or_err_are_out_however_fast():
    a, b, c, *_ = [t for t in FORWARD.candidates(problem_of(), "sm_80", 10) if t != shipped_tile()]
    us = {a: 10.0, b: 20.0, c: 60.0}
    bench = Bench(lambda tile: us.get(tile, 100.0), spilling=(a,), wrong=(b,))
    result = bench.run(bench.search())
    assert result.best == c
    assert result.rejected == {"spills": 1, "wrong": 1}
    assert a not in bench.timed and b not in [tile for tile, _ in result.screened]


def test_a_lucky_time_does_not_win():
    """A candidate that is fast only at first loses the duel with the tile in use."""
    lucky = FORWARD.candidates(problem_of(), "sm_80", 10)[2]
    seen = []

    def us_of(tile):
        seen.append(tile)
        return 50.0 if tile == lucky and seen.count(lucky) < 10 else 100.0

    bench = Bench(us_of)
    assert bench.run(bench.search()).best is None


def test_the_tile_in_use_may_spill_but_must_be_right():
    bench = Bench(lambda tile: 100.0, spilling=(shipped_tile(),))
    assert bench.run(bench.search()).best is None
    bench = Bench(lambda tile: 100.0, wrong=(shipped_tile(),))
    results, failures = bench.run_all([bench.search()])
    assert results == {}
    assert failures[0].startswith("flash2/fwd/bf16/48x80/full: the tile in use: out is wrong")


def test_a_search_that_fails_does_not_stop_the_others():
    best = FORWARD.candidates(problem_of(), "sm_80", 10)[4]
    bench = Bench(lambda tile: 50.0 if tile == best else 100.0)

    def broken_plan(asked, target, tile):
        raise ValueError("no plan today")

    def no_candidates(asked, arch):
        raise OSError("no such file")

    searches = [
        bench.search(tunable=replace(FORWARD, plan=broken_plan)),
        bench.search(),
        bench.search(tunable=replace(bench.tunable(), space=no_candidates)),
    ]
    results, failures = bench.run_all(searches)
    assert list(results) == [1] and results[1].best == best
    assert "no plan today" in failures[0] and "no such file" in failures[2]


def test_out_of_time_means_no_second_wave_and_then_no_result():
    bench = Bench(lambda tile: 100.0)
    search = bench.search()
    results, failures = bench.run_all([search], seconds=0.0)
    assert results == {} and failures[0].endswith("out of time")
    assert search.times and len(search.waved) <= 11  # the first wave was timed


def test_a_lost_device_ends_the_run_and_is_remembered(tmp_path):
    best, bad, *_ = FORWARD.candidates(problem_of(), "sm_80", 10)[4:]
    bench = Bench(lambda tile: {best: 50.0, bad: 10.0}.get(tile, 100.0))

    def plan(asked, target, tile):
        if tile == bad:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return bench.tunable().plan(asked, target, tile)

    tunable = replace(FORWARD, plan=plan)
    search = bench.search(Journal(tmp_path / "journal"), tunable)
    search._usable = lambda: False
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        bench.run(search)
    result = bench.run(bench.search(Journal(tmp_path / "journal"), tunable))
    assert result.best == best and result.rejected == {"wrong": 1}


def test_a_finished_search_is_not_repeated_and_an_interrupted_one_goes_on(tmp_path):
    path = tmp_path / "journal.jsonl"
    best = FORWARD.candidates(problem_of(), "sm_80", 10)[4]
    calls = []

    def us_of(tile):
        calls.append(tile)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return 50.0 if tile == best else 100.0

    bench = Bench(us_of)
    with pytest.raises(KeyboardInterrupt):
        bench.run(bench.search(Journal(path)))
    checked = path.read_text().count('"wrong": null')
    assert checked >= 10
    first = bench.run(bench.search(Journal(path)))
    assert path.read_text().count('"wrong": null') < 2 * checked  # checks were remembered
    assert first.best == best
    timed = len(bench.timed)
    again = bench.run(bench.search(Journal(path)))
    assert len(bench.timed) == timed and again == first and again.facts == FACTS
    other_machine = bench.search(Journal(path))
    other_machine.machine = "GPU 2"
    bench.run(other_machine)
    assert len(bench.timed) > timed


def test_a_candidate_that_ended_the_process_is_not_tried_again(tmp_path):
    best = FORWARD.candidates(problem_of(), "sm_80", 10)[4]
    bench = Bench(lambda tile: 50.0 if tile == best else 100.0)
    search = bench.search(Journal(tmp_path / "journal.jsonl"))
    checker = Checker(search.tunable, check_problem(), search.target)
    search._checker = checker
    written = []
    put = search.journal.put

    def put_and_die(kind, name, fact):
        put(kind, name, fact)
        written.append(fact)
        if kind == "check" and fact["wrong"] == "ended an earlier run" and len(written) > 1:
            raise SystemExit  # as if the next line, the launch, had taken the process with it

    search.journal.put = put_and_die
    with pytest.raises(SystemExit):
        search._check(shipped_tile()) or search._check(best)
    result = bench.run(bench.search(Journal(tmp_path / "journal.jsonl")))
    assert result.best is None and result.rejected == {"wrong": 1}
