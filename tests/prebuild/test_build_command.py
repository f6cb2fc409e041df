"""`python -m flash_attn_interface build` and `... .cache`, on kernels that compile in no time."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from tiny_kernels import tiny_spec, tiny_tree

from flash_attn_interface import build as build_command
from flash_attn_interface import cache as cache_command
from flash_attn_interface._common import env
from flash_attn_interface._common.prebuild.build import Trees
from flash_attn_interface._common.prebuild.headdim import Wanted
from flash_attn_interface._common.runtime import cubins, store
from flash_attn_interface._common.runtime.spec import KernelSpec
from flash_attn_interface.call import backends

__all__ = ["tiny_tree"]


class Planner:
    """One kernel per pair and dtype."""

    asked: list[tuple[tuple[int, int], Wanted, str]]

    @classmethod
    def specs(cls, pair: tuple[int, int], wanted: Wanted, arch: str) -> list[KernelSpec]:
        cls.asked.append((pair, wanted, arch))
        return [
            tiny_spec(arch, num_threads=32 * min(pair[0], 8), bf16=dtype == "bf16")
            for dtype in wanted.dtypes
        ]


@pytest.fixture
def own_cache(tiny_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of this test, where one tree is installed, whose kernels are tiny."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    Planner.asked = []
    monkeypatch.setitem(sys.modules, "tiny_planner", Planner)
    packages = build_command.installed_trees().packages
    trees = Trees(["tiny_planner"], packages, {"tiny": tiny_tree})
    monkeypatch.setattr(build_command, "installed_trees", lambda: trees)
    monkeypatch.setattr(backends, "hopper", lambda: None)
    for variable in (env.CUDA_ARCHS, env.PREBUILT_DIR, env.DISK_CACHE, env.MAX_JOBS):
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path / "cache"))
    return tmp_path / "cache"


def kernels_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("tiny"))


# ---- build ------------------------------------------------------------------------------------


def test_the_cache_is_filled_and_then_used(
    own_cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["--dims", "1", "1", "--dims", "2", "2", "--arch", "sm_80", "--dtype", "bf16"]
    assert build_command.main(command) == 0
    assert "[2/2, " in capfd.readouterr().out
    assert len(kernels_in(own_cache)) == 2
    assert not own_cache.stat().st_mode & 0o077
    found = cubins.default_kernels().find(tiny_spec(num_threads=64, bf16=True))
    assert found is not None and found.origin == "disk"
    assert build_command.main(command) == 0
    assert "all 2 kernels are up to date" in capfd.readouterr().out


def test_a_folder_for_other_machines(
    own_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "fleet"
    command = ["--dims", "1", "1", "--arch", "sm_80", "86", "90a", "--jobs", "2", "--out", str(out)]
    assert build_command.main(command) == 0
    told = capfd.readouterr().out
    assert "2 at once" in told and f"{env.PREBUILT_DIR.name}={out}" in told
    assert len(kernels_in(out)) == 6 and not own_cache.exists()
    assert (out / cubins.CONTENTS).read_text().startswith("6 kernels for sm_80, sm_86, sm_90a")
    monkeypatch.setenv(env.PREBUILT_DIR.name, str(out))
    image = cubins.default_kernels().image(tiny_spec(num_threads=32, bf16=True))
    assert image.origin == "prebuilt" and not own_cache.exists()


def test_list_says_what_is_missing_and_compiles_nothing(
    own_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fleet"
    cubins.prebuild(tiny_spec(num_threads=32, bf16=True), out)
    command = ["--list", "--dims", "1", "1", "--arch", "sm_80", "--out", str(out)]
    assert build_command.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("built   tiny-scale-bf16-sm_80-")
    assert lines[1].startswith("missing tiny-scale-fp16-sm_80-")
    assert lines[2].startswith("2 kernels for sm_80; head dims (1,1); bf16, fp16")
    assert len(kernels_in(out)) == 1


def test_what_is_asked_for_comes_from_the_command_line_the_file_and_the_defaults(
    own_cache: Path, tmp_path: Path
) -> None:
    listing = tmp_path / "list.json"
    listing.write_text('{"pairs": [[1, 2]], "dtypes": ["fp16"], "archs": ["89"]}')
    assert build_command.main(["--list", "--headdim", str(listing)]) == 0
    assert build_command.main(["--list", "--headdim", str(listing), "--arch", "86"]) == 0
    assert build_command.main(["--list", "--features", "local", "softcap", "--arch", "80"]) == 0
    asked = Planner.asked
    assert asked[0] == ((1, 2), Wanted(((1, 2),), ("fp16",), archs=("sm_89",)), "sm_89")
    assert asked[1][2] == "sm_86"
    assert tuple(pair for pair, _, _ in asked[2:]) == Wanted().pairs
    assert asked[2][1].features == ("local", "dense", "varlen", "softcap")


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["--dims", "0", "64"], "command line: pairs[0] is [0, 64]: expected a head_dim_qk from 1"),
        (["--arch", "sm_75"], '--arch[0] is "sm_75": expected one of 80, 86'),
        (["--headdim", "absent.json"], "absent.json cannot be read (No such file or directory)"),
        (["--headdim", __file__], "test_build_command.py is not JSON: "),
    ],
)
def test_bad_command_lines(
    command: list[str], told: str, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build_command.main(command) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("listed", [[], ["--list"]])
def test_nothing_to_build_is_an_error(
    listed: list[str],
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Planner, "specs", lambda pair, wanted, arch: [])
    for arch, way_out in (
        ("sm_80", "what it serves of them is compiled at its first call"),
        ("sm_90a", backends.HOPPER_NOT_INSTALLED),
    ):
        assert build_command.main(["--dims", "64", "300", "--arch", arch, *listed]) == 2
        told = f"error: no installed kernel tree builds head dims (64,300) for {arch} ahead; "
        assert capsys.readouterr().err == f"{told}{way_out}\n"


@pytest.mark.parametrize("installed", [False, True])
def test_hopper_machines_without_the_hopper_tree_are_told(
    installed: bool,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(backends, "hopper", lambda: object() if installed else None)
    asked = ["--list", "--dims", "1", "1", "--arch"]
    assert build_command.main([*asked, "sm_80"]) == 0
    assert capsys.readouterr().err == ""
    assert build_command.main([*asked, "sm_90a"]) == 0
    told = f"only the Ampere kernels are built: {backends.HOPPER_NOT_INSTALLED}"
    assert (told in capsys.readouterr().err) is not installed


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_compiled(
    own_cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "fleet"
    assert build_command.main(["--dims", "1", "1", "--arch", "80", "--out", str(out)]) == 1
    told = capfd.readouterr()
    assert told.out == "" and told.err == f"error: {out} cannot be created (Not a directory)\n"


def test_a_failing_compile_is_an_exit_status(
    own_cache: Path, tiny_tree: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from flash_attn_interface._common.runtime import sources

    (tiny_tree / "op.cuh").write_text("#error not today\n")
    sources.read.cache_clear()
    assert build_command.main(["--dims", "1", "1", "--arch", "80"]) == 1
    out, err = capfd.readouterr()
    assert "not today" in out + err and "error: kernels could not be compiled" in err


# ---- cache ------------------------------------------------------------------------------------


@pytest.fixture
def entries(own_cache: Path) -> list[Path]:
    """Two kernels in the cache, and things that are not kernels."""
    kernels = cubins.KernelCache(cubins.ArtifactStore(own_cache))
    images = [kernels.image(tiny_spec(num_threads=n)) for n in (32, 64)]
    (own_cache / "tuned").mkdir()
    (own_cache / "tuned" / "sm_80.json").write_text("{}")
    (own_cache / "notes.txt").write_text("mine\n")
    return [image.folder for image in images if image.folder is not None]


def damage(entry: Path) -> None:
    (entry / "kernel.cubin").write_bytes(b"short")


def test_show(
    entries: list[Path],
    own_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fleet = tmp_path / "fleet"
    cubins.prebuild(tiny_spec("sm_90"), fleet)
    monkeypatch.setenv(env.PREBUILT_DIR.name, str(fleet))
    assert cache_command.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"cache     {own_cache}"
    assert "2 tiny_scale sm_80" in lines[1]
    assert str(fleet) in lines[2] and "1 tiny_scale sm_90" in lines[3]
    assert cache_command.main(["show", "--entries"]) == 0
    told = capsys.readouterr().out
    assert all(entry.name in told for entry in entries) and "nvrtc" in told


def test_show_where_there_is_nothing(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cache_command.main(["show"]) == 0
    assert "no entries" in capsys.readouterr().out
    monkeypatch.setenv(env.DISK_CACHE.name, "0")
    assert cache_command.main(["show"]) == 0
    assert "memory only" in capsys.readouterr().out
    assert cache_command.main(["clear"]) == 0
    assert not own_cache.exists()


def test_verify(entries: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cache_command.main(["verify"]) == 0
    assert "2 entries checked" in capsys.readouterr().out
    damage(entries[0])
    assert cache_command.main(["verify"]) == 1
    told = capsys.readouterr().out
    assert f"damaged: {entries[0]}" in told and "1 damaged" in told
    assert entries[0].is_dir()


def test_clear_removes_kernels_and_nothing_else(entries: list[Path], own_cache: Path) -> None:
    (own_cache / ".damaged-x").mkdir()
    assert cache_command.main(["clear"]) == 0
    assert sorted(p.name for p in own_cache.iterdir() if p.name != ".locks") == [
        "notes.txt",
        "tuned",
    ]
    assert (own_cache / "tuned" / "sm_80.json").is_file()


def test_clear_only_damaged_or_old_ones(entries: list[Path], own_cache: Path) -> None:
    damage(entries[0])
    assert cache_command.main(["clear", "--damaged"]) == 0
    assert [e.is_dir() for e in entries] == [False, True]
    assert cache_command.main(["clear", "--older-than", "7"]) == 0
    assert entries[1].is_dir()
    month_ago = time.time() - 30 * 86400
    os.utime(entries[1], (month_ago, month_ago))
    assert cache_command.main(["clear", "--older-than", "7"]) == 0
    assert kernels_in(own_cache) == []


def test_clear_reports_what_it_may_not_remove(
    entries: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(path: object, target: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store.os, "rename", refused)
    assert cache_command.main(["clear"]) == 1
    assert "error: " in capsys.readouterr().err
    assert all(entry.is_dir() for entry in entries)
