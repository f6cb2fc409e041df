"""The autotuner's command: what it asks for, what it writes, and that the next plan uses it."""

from __future__ import annotations

import json
from dataclasses import replace

import hopper_tree
import pytest
import torch
from tune_bench import CLEAN, FORWARD, problem

from flash_attn_interface._common import env
from flash_attn_interface._common.prebuild import build as prebuild
from flash_attn_interface._common.tiles import tuned_tiles
from flash_attn_interface._flash2 import fwd_tiles
from flash_attn_interface.call import backends
from flash_attn_interface.call.selection import Device
from flash_attn_interface.call.simulation import capability_of
from flash_attn_interface.tune import command as tune
from flash_attn_interface.tune import compile as tune_compile
from flash_attn_interface.tune import report as tune_report
from flash_attn_interface.tune import tables as tune_tables
from flash_attn_interface.tune.journal import Journal
from flash_attn_interface.tune.search import Result

H100 = "NVIDIA H100 80GB HBM3"

# --- what is written --------------------------------------------------------------------------


def row(best, screened=(), tunable=FORWARD, dims=(48, 80)):
    asked = problem(tunable, dims)
    shipped = tunable.builtin(asked, "sm_90")
    key = tunable.key(asked)
    us = {4096: 100.0}
    after = us if best is None else {4096: 80.0}
    facts = {"gpu": H100, "driver": "CUDA driver 13.0", "date": "2026-11-22"}
    result = Result(key, {4096: shipped}, best, us, after, screened, {}, facts)
    return tunable, {4096: asked}, result


@pytest.fixture
def no_tables(monkeypatch, tmp_path):
    """An empty folder for the user's tables, and no packaged ones."""
    monkeypatch.setattr(tuned_tiles, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setenv("FLASH_ATTN_INTERFACE_TUNED_TILES", str(tmp_path / "user"))
    tuned_tiles.forget()
    yield tmp_path / "user"
    tuned_tiles.forget()


def block_n(gpu: str = H100) -> int:
    return int(fwd_tiles.forward_spec(problem(), "sm_90", gpu=gpu)["block_n"])


BUILTIN = fwd_tiles.forward_tile(problem(), "sm_90").block_n


def test_what_was_found_is_what_the_next_plan_uses(no_tables):
    _, _, result = row(fwd_tiles.ForwardTile(128, 96, 4, 2))
    tune_tables.write_results(no_tables, "sm_90", [result])
    assert block_n() == 96 and block_n("NVIDIA H200") == BUILTIN
    path = no_tables / "nvidia-h100-80gb-hbm3.json"
    record = json.loads(path.read_text())["entries"][result.key]
    assert record["speedup"] == 1.25 and record["us_before"] == {"4096": 100.0}
    assert record["date"] == "2026-11-22"
    # Another key does not touch it.
    other = replace(result, key="flash2/fwd/bf16/48x80/causal")
    tune_tables.write_results(no_tables, "sm_90", [other])
    assert set(json.loads(path.read_text())["entries"]) == {result.key, other.key}
    # Tuned again, the package's choice is as good: the entry goes.
    tune_tables.write_results(no_tables, "sm_90", [row(None)[2]])
    assert set(json.loads(path.read_text())["entries"]) == {other.key}
    assert block_n() == BUILTIN


def test_an_entry_of_the_package_stays_if_nothing_is_better(no_tables):
    """It is the tile in use then; taking it out would change that."""
    packaged, best = tuned_tiles.PACKAGED, fwd_tiles.ForwardTile(128, 96, 4, 2)
    tune_tables.write_results(packaged, "sm_90", [row(best)[2]])
    again = replace(row(None)[2], shipped={4096: best})
    tune_tables.write_results(packaged, "sm_90", [again])
    assert block_n() == 96


def test_all_models_of_the_architecture_get_the_tiles_of_the_one_at_hand(no_tables):
    rows = [row(fwd_tiles.ForwardTile(128, 96, 4, 2))]
    tune_tables.write_derived(no_tables, "sm_90", ["sm_90"], rows, pytest.fail)
    assert block_n("NVIDIA H200") == 96
    record = json.loads((no_tables / "sm_90.json").read_text())
    assert (record["gpu"], record["arch"]) == ("", "sm_90") and H100 in record["origin"]


def test_derived_tables_hold_the_fastest_tile_that_fits_and_does_not_spill():
    asked = problem(dims=(160, 224))
    large = fwd_tiles.ForwardTile(128, 128, 8)  # more shared memory than an sm_86 has
    spilling = fwd_tiles.ForwardTile(64, 48, 4)
    good = fwd_tiles.ForwardTile(64, 32, 4)
    builtin = FORWARD.builtin(asked, "sm_86")
    assert FORWARD.refuses(large, asked, "sm_86") and not FORWARD.refuses(good, asked, "sm_86")
    screened = [(large, 70.0), (spilling, 80.0), (good, 85.0), (builtin, 100.0)]

    def compile_all(specs, title):
        spill = replace(CLEAN, spill_load_bytes=4)
        of = {FORWARD.specs(asked, "sm_86", spilling)[0]: spill}
        return {spec: tune_compile.Report(of.get(spec, CLEAN)) for spec in specs}

    rows = [row(large, screened, dims=(160, 224))]
    (entry,) = tune_tables.derive("sm_86", rows, compile_all).values()
    assert entry is not None and entry.tile == tuned_tiles.as_record(good)
    assert entry.facts == {"speedup_where_timed": 1.176}
    slow = [row(large, [(large, 70.0), (good, 99.5), (builtin, 100.0)], dims=(160, 224))]
    assert list(tune_tables.derive("sm_86", slow, compile_all).values()) == [None]
    unknown = [row(large, [(large, 70.0), (good, 85.0)], dims=(160, 224))]
    assert tune_tables.derive("sm_86", unknown, compile_all) == {}


def test_the_reports_tables_name_keys_and_gains():
    text = tune_report.before_and_after([row(fwd_tiles.ForwardTile(128, 96, 4, 2))])
    assert "| flash2/fwd/bf16/48x80/full | 4096 | 100 (" in text and "1.250x" in text
    kept = row(None)
    assert "the same" in tune_report.tiles_found([kept])
    assert "| kept |" in tune_report.before_and_after([kept])
    assert tune_tables.entry(kept[2]) is None


# --- the command ------------------------------------------------------------------------------


def test_without_a_gpu_the_command_asks_for_an_architecture(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--dims", "48", "80"]) == 2
    assert "--arch" in capsys.readouterr().err


def test_compile_only(monkeypatch, tmp_path, capsys):
    """NVRTC and the ordinary cache, no GPU."""
    from flash_attn_interface._common.runtime import compiler

    try:
        compiler.load_nvrtc()
    except compiler.MissingCompilerError as error:
        pytest.skip(str(error))
    command = ["--dims", "48", "80", "--direction", "fwd", "--tree", "flash2", "--causal", "no"]
    command += ["--arch", "sm_86", "--max-candidates", "2", "--journal", str(tmp_path / "j")]
    assert tune.main(command) == 0
    text = capsys.readouterr().out
    assert text.startswith("flash2/fwd/bf16/48x80/full for sm_86: ")
    assert " candidates may run" in text and "registers  block_m" in text
    lines = [json.loads(line) for line in (tmp_path / "j").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"compile"}
    assert all(line["fact"]["resources"]["registers"] > 0 for line in lines)


def test_derived_tables_from_a_journal(no_tables, tmp_path, monkeypatch, capsys):
    """The GPU's part and the compiler's can be done on two machines."""
    asked = problem(dims=(160, 224))
    good = fwd_tiles.ForwardTile(64, 32, 4)
    builtin = FORWARD.builtin(asked, "sm_86")
    result = row(good, [(good, 85.0), (builtin, 100.0)], dims=(160, 224))[2]
    journal = Journal(tmp_path / "journal")
    journal.put("result", "an id", result.as_fact())
    monkeypatch.setattr(
        tune_compile, "compile_all",
        lambda specs, *_: {spec: tune_compile.Report(CLEAN) for spec in specs},
    )  # fmt: skip
    command = ["--dims", "160", "224", "--arch", "sm_90", "--tree", "flash2", "--derive", "sm_86"]
    assert tune.main([*command, "--journal", str(tmp_path / "journal")]) == 0
    assert "1 of 5 keys have results" in capsys.readouterr().out
    table = tuned_tiles.read(no_tables / "sm_86.json")
    assert table is not None and table.gpu == "" and "not measured there" in table.origin
    assert table.entries[result.key].tile == tuned_tiles.as_record(good)
    assert tune.main([*command, "--journal", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (
            ["--direction", "fwd", "--causal", "both"],
            ["fwd/bf16/48x80/full", "fwd/bf16/48x80/causal"],
        ),
        (["--direction", "decode"], ["decode/bf16/48x80/full/rows16"]),
        (["--direction", "bwd", "--features", "local"], ["bwd/bf16/48x80/local"]),
        (
            ["--direction", "fwd", "--causal", "yes", "--dtype", "fp16", "--features", "softcap"],
            ["fwd/fp16/48x80/causal+softcap"],
        ),
    ],
    ids=lambda value: " ".join(value[1:]) if "--direction" in value else None,
)
def test_subjects(arguments, keys):
    from flash_attn_interface.call.selection import Device

    options = tune.parser().parse_args(["--dims", "48", "80", *arguments])
    found = tune.subjects(options, Device((8, 0)))
    assert [subject.key for subject in found] == [f"flash2/{key}" for key in keys]
    for subject in found:
        specs = {
            subject.tunable.specs(p, "sm_80", subject.tunable.builtin(p, "sm_80"))
            for p in (*subject.settings.problems.values(), subject.settings.check)
        }
        assert len(specs) == 1, "what is checked is what is timed"


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ([], "user"),
        (["--apply", "packaged"], "packaged"),
        (["--apply", "none"], None),
        (["--output", "elsewhere"], "elsewhere"),
    ],
    ids=["default", "packaged", "none", "output"],
)
def test_where_tables_are_written(arguments, folder, no_tables, monkeypatch):
    monkeypatch.chdir(no_tables.parent)
    options = tune.parser().parse_args(["--dims", "48", "80", *arguments])
    found = tune._table_folder(options)
    assert (found and found.resolve()) == (folder and no_tables.parent / folder)


def test_jobs_follow_cpus_memory_and_the_environment(monkeypatch):
    monkeypatch.setenv(env.MAX_JOBS.name, "3")
    assert tune.parser().parse_args(["--dims", "48", "80"]).jobs == 3
    monkeypatch.delenv(env.MAX_JOBS.name)
    assert tune.parser().parse_args(["--dims", "48", "80"]).jobs == prebuild.jobs()


def test_help_says_what_it_does(capsys):
    with pytest.raises(SystemExit):
        tune.main(["--help"])
    assert "--dims QK V" in capsys.readouterr().out


def test_directions_that_a_tree_does_not_serve_are_left_out(capsys, monkeypatch):
    monkeypatch.setattr(backends, "hopper", lambda: hopper_tree.load().BACKEND)
    options = tune.parser().parse_args(["--dims", "576", "256", "--arch", "sm_86"])
    found = tune.subjects(options, Device(capability_of("sm_86")))
    assert {subject.tunable.direction for subject in found} == {"fwd", "decode"}
    assert "left out, no backward tile of head dims (576, 256)" in capsys.readouterr().err
    options = tune.parser().parse_args(
        ["--dims", "512", "512", "--arch", "sm_90", "--causal", "no"]
    )
    found = tune.subjects(options, Device(capability_of("sm_90")))
    assert {subject.tunable.direction for subject in found} == {"decode"}
    told = capsys.readouterr().err
    assert "no tile of fwd.cu for head dims (512, 512)" in told  # of the Hopper tree
    assert "it takes V in parts of up to 256 columns" in told


def test_a_folder_for_tables_that_cannot_be_made_is_told_first(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "tables"
    asked = ["--dims", "64", "64", "--arch", "sm_80", "--output", str(folder)]
    assert tune.main(asked) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err == f"error: {folder} cannot be created (Not a directory)\n"
