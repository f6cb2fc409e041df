"""What the commands share: one line for what a user can cause, and no traceback."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from asked import forward_call
from fakes import FakeBackend
from test_build_command import Planner, own_cache
from tiny_kernels import tiny_spec, tiny_tree

import flash_attn_interface
from flash_attn_interface import __main__ as main_command
from flash_attn_interface import build, command_line
from flash_attn_interface import cache as cache_command
from flash_attn_interface._common import env, log
from flash_attn_interface._common.ask.check import check
from flash_attn_interface._common.runtime import compiler, cubins, entries, nvrtc
from flash_attn_interface._common.runtime.store import ArtifactStore
from flash_attn_interface.call import backends, selection
from flash_attn_interface.call.selection import Device, decide
from flash_attn_interface.tools import report

__all__ = ["own_cache", "tiny_tree"]

COMMANDS = [[], ["build"], ["cache"], ["kernels"], ["tune"]]
LISTING = ["build", "--list", "--arch", "80"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m flash_attn_interface` with these."""
    return subprocess.run(
        [sys.executable, "-m", "flash_attn_interface", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# ---- wrong usage ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS, ids=lambda name: "".join(name) or "report")
def test_a_wrong_argument_is_one_line(name: list[str]) -> None:
    result = run(*name, "--nonsense")
    assert result.returncode == command_line.WRONG_USAGE and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(" ".join(["python -m flash_attn_interface", *name]))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nonsense"], "unrecognized arguments: nonsense"),
        (["--simulate", "sm_75"], "unknown architecture 'sm_75'"),
        (["build", "--jobs", "0"], "'0' is not an integer from 1"),
        (["build", "--dims", "64"], "--dims: expected 2 arguments"),
        (["build", "--dims", "0", "64"], "expected a head_dim_qk from 1 to 576"),
        (["build", "--features", "sparse"], "invalid choice: 'sparse'"),
        (["cache", "clear", "--older-than", "-1"], "'-1' is not a number from 0"),
        (["cache", "clear", "--older-than", "nan"], "'nan' is not a number from 0"),
        (["cache", "trim", "--max-size", "much"], "'much' is not a size such as"),
        (["cache", "trim"], "trim needs --max-size"),
        (["tune"], "the following arguments are required: --dims"),
        (["tune", "--dims", "0", "64"], "'0' is not an integer from 1"),
        (["tune", "--dims", "64", "64", "--arch", "sm_75"], "unknown architecture 'sm_75'"),
    ],
)
def test_each_wrong_value_is_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main_command.main(arguments)
    except SystemExit as left:  # argparse's way
        status = int(left.code or 0)
    out, err = capsys.readouterr()
    assert status == command_line.WRONG_USAGE and out == ""
    assert told in err and len(err.splitlines()) == 1


def test_a_wrong_value_in_the_environment_is_one_line() -> None:
    result = run("cache", **{env.CACHE_LIMIT.name: "much"})
    assert result.returncode == command_line.WRONG_USAGE
    assert result.stderr.splitlines() == [
        f"error: {env.CACHE_LIMIT.name}='much': expected {env.CACHE_LIMIT.kind}"
    ]


# ---- Ctrl-C and pipes -------------------------------------------------------------------------


@pytest.mark.parametrize("main", [main_command.main, build.main, cache_command.main])
def test_ctrl_c_is_one_line(
    main: command_line.Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    for module, name in ((report, "make"), (build, "installed_trees"), (cache_command, "show")):
        monkeypatch.setattr(module, name, interrupted)
    assert main([]) == command_line.INTERRUPTED
    assert capsys.readouterr().err.split() == ["Interrupted."]


def test_ctrl_c_while_kernels_compile_leaves_no_traceback(tmp_path: Path) -> None:
    arguments = ["build", "--dims", "40", "72", "--arch", "80", "--jobs", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "flash_attn_interface", *arguments, "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    told = []
    for line in process.stdout:
        told.append(line)
        if "compiling" in line:
            break
    time.sleep(1.5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    told.append(process.communicate(timeout=60)[0])
    assert process.returncode == command_line.INTERRUPTED, told
    assert "Traceback" not in "".join(told) and "Interrupted." in "".join(told)


def compilers_in(folder: str) -> list[str]:
    """Command lines of processes that name the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has ended
            continue
        if folder in line:
            found.append(line)
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_sigterm_while_kernels_compile_ends_the_compilers_too(tmp_path: Path) -> None:
    arguments = ["build", "--dims", "40", "72", "--arch", "80", "--jobs", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "flash_attn_interface", *arguments, "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)}, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    told = []
    for line in process.stdout:
        told.append(line)
        if "compiling" in line:
            break
    deadline = time.monotonic() + 30
    while len(compilers_in(f"{tmp_path}/flash-attn-prebuild")) == 0:
        assert time.monotonic() < deadline, told
        time.sleep(0.1)
    process.terminate()  # as `timeout` and schedulers do
    told.append(process.communicate(timeout=60)[0])
    assert process.returncode == 143 and "Traceback" not in "".join(told), told
    assert compilers_in(f"{tmp_path}/flash-attn-prebuild") == []


@pytest.mark.parametrize("arguments", [["--environment"], ["cache", "show"], LISTING])
def test_a_reader_that_goes_away_leaves_no_traceback(arguments: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "flash_attn_interface", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=120) != 0


# ---- the report -------------------------------------------------------------------------------


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with a driver for CUDA 13, without findings; its cache folder."""
    for variable in env.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path / "cache"))
    monkeypatch.setattr(env, "misspelt", list)
    monkeypatch.setattr(backends, "hopper", lambda: None)
    machine(monkeypatch, (13, 0), 13)
    return tmp_path / "cache"


def machine(monkeypatch: pytest.MonkeyPatch, driver: tuple[int, int], torch_major: int) -> None:
    monkeypatch.setattr(nvrtc, "driver_version", lambda: driver)
    monkeypatch.setattr(nvrtc, "torch_cuda_major", lambda: torch_major)
    monkeypatch.setattr(compiler, "unfit_for_the_driver", lambda: None)
    monkeypatch.setattr(report, "_version_of", lambda name: "12.9.4")


def found(about: str) -> report.Finding:
    (finding,) = [finding for finding in report.make().findings if finding.about == about]
    return finding


def test_a_healthy_machine_has_a_good_verdict(healthy: Path) -> None:
    shown = report.make()
    assert shown.findings == ()
    assert list(shown.lines())[-1] == "verdict    driver, compiler and cache fit together"
    assert not healthy.exists()


def test_each_thing_that_does_not_fit_is_said_with_a_way_out(
    healthy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, (12, 4), 13)
    assert "built for CUDA 13, the driver is for CUDA 12.4" in found("torch").text
    monkeypatch.setattr(report, "_version_of", lambda name: "13.0.1")
    assert found("bindings").way_out == 'pip install "cuda-bindings<13"'
    told = compiler.too_old((12, 4), "nvrtc 13.5.37")
    monkeypatch.setattr(compiler, "unfit_for_the_driver", lambda: told)
    assert "the compiler is nvrtc 13.5.37" in found("compiler").text
    assert 'pip install "nvidia-cuda-nvrtc-cu12"' in found("compiler").way_out
    monkeypatch.setenv(env.PREBUILT_DIR.name, str(healthy / "nowhere"))
    assert "does not exist" in found("prebuilt").text
    monkeypatch.setattr(env, "misspelt", lambda: ["FLASH_ATTN_X is not read; did you mean Y?"])
    assert found("set").text == "FLASH_ATTN_X is not read; did you mean Y?"
    assert any(line.endswith("Y? Correct it, or unset it") for line in report.make().lines())
    healthy.mkdir()
    healthy.chmod(0o777)
    assert "other users may write to it" in found("cache").text
    verdicts = [line for line in report.make().lines() if line.startswith("verdict")]
    assert len(verdicts) == 1 and len(report.make().findings) >= 6


def test_a_missing_compiler_is_found(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise compiler.MissingCompilerError("no NVRTC library is found. Fix: pip install x")

    monkeypatch.setattr(compiler, "compiler_version", missing)
    assert "pip install x" in found("compiler").text


@pytest.mark.parametrize("in_the_way", ["file", "read-only"])
def test_a_cache_that_cannot_be_made_is_found(
    in_the_way: str, healthy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_the_way == "file":
        healthy.write_text("")
    else:
        monkeypatch.setattr(report.os, "access", lambda path, mode: False)
    assert "is not used" in found("cache").text


@pytest.mark.parametrize("installed", [False, True])
def test_a_hopper_gpu_without_its_tree_is_told(
    installed: bool, healthy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(backends, "hopper", lambda: FakeBackend("hopper") if installed else None)
    monkeypatch.setattr(report, "prebuilt_folders", list)
    told = [f for f in report.make().findings if f.about == "hopper"]
    assert [f.way_out for f in told] == ([] if installed else ["cd hopper && pip install ."])


def test_json_holds_the_report_and_the_check(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_command.main(["--json", "--environment"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["release"] == flash_attn_interface.version.RELEASE
    assert record["findings"] == [] and record["facts"]["trees"][0].startswith("flash2")
    assert "check" not in record
    fake = FakeBackend()
    monkeypatch.setattr(backends, "flash2", lambda: fake)
    monkeypatch.setattr(main_command.shutil, "which", lambda name: name)
    assert main_command.main(["--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["check"]["passed"] is True and len(record["check"]["calls"]) > 3
    fake.refusal = "out of order"
    flash_attn_interface.call.dispatch.forget_plans()
    assert main_command.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out)["check"]["passed"] is False
    monkeypatch.setattr(main_command.shutil, "which", lambda name: None)
    assert main_command.main(["--json"]) == 2
    flash_attn_interface.call.dispatch.forget_plans()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main_command.main(["--version"])
    assert left.value.code == 0
    assert flash_attn_interface.version.RELEASE in capsys.readouterr().out


# ---- the Hopper tree --------------------------------------------------------------------------


def test_a_call_that_goes_without_the_hopper_tree_says_so() -> None:
    q = torch.zeros(1, 4, 1, 16, dtype=torch.bfloat16)
    asked = check(forward_call(q, q, q))
    hopper, flash2 = FakeBackend("hopper"), FakeBackend()
    told = ("hopper", "the Hopper tree is not installed: cd hopper && pip install .")
    assert decide(asked, Device((9, 0)), [flash2]).refused == (told,)
    assert decide(asked, Device((8, 0)), [flash2]).refused == ()
    assert decide(asked, Device((9, 0)), [flash2], "flash2").refused == ()
    assert decide(asked, Device((9, 0)), [hopper, flash2]).refused == ()
    flash2.refusal = "too long"
    with pytest.raises(NotImplementedError, match=r"not installed: cd hopper && pip install \."):
        decide(asked, Device((9, 0)), [flash2])
    assert selection.hopper_advice((9, 0), ["flash2"]) == told[1]


# ---- build and cache --------------------------------------------------------------------------


def test_many_kernels_are_estimated_and_asked_about(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled: list[int] = []
    monkeypatch.setattr(
        build.prebuild, "build", lambda specs, *rest: compiled.append(len(specs)) or len(specs)
    )
    monkeypatch.setattr(build, "MANY", 3)
    wanted = ["build", "--arch", "80", "86", "--dims", "1", "1", "--dims", "2", "2", "--jobs", "2"]

    class Terminal:
        def __init__(self, answer: str) -> None:
            self.answer = answer

        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return self.answer

    for answer, go_on in (("\n", True), ("y\n", True), ("n\n", False)):
        monkeypatch.setattr("sys.stdin", Terminal(answer))
        compiled.clear()
        assert main_command.main(wanted) == (0 if go_on else 1)
        assert compiled == ([8] if go_on else [])
        told = capsys.readouterr().out
        assert "8 kernels to compile: about 2 s, 2 at once; 516 KiB" in told and "Go on?" in told
    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    assert main_command.main([*wanted, "--yes"]) == 0
    assert "Go on?" not in capsys.readouterr().out
    monkeypatch.setattr(build, "MANY", 8)
    assert main_command.main(wanted) == 0
    assert "to compile" not in capsys.readouterr().out


def test_list_ends_with_totals_and_time(
    own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cubins.KernelCache(ArtifactStore(own_cache)).image(tiny_spec(num_threads=32, bf16=True))
    assert main_command.main(["build", "--list", "--dims", "1", "1", "--arch", "80", "90a"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and Planner.asked
    assert lines[5] == "2 tiny_scale sm_80; 2 tiny_scale sm_90a"
    assert lines[6].startswith("1 built. 3 kernels to compile: about ")


def test_a_folder_that_would_be_refused_is_said_when_it_is_filled(
    own_cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fleet"
    out.mkdir()
    out.chmod(0o777)
    wanted = ["--dims", "1", "1", "--arch", "80", "--dtype", "bf16", "--out", str(out)]
    assert build.main(wanted) == 0
    assert "they will be refused there: other users may write to it" in capfd.readouterr().err


@pytest.fixture
def three(tiny_tree: Path, own_cache: Path) -> list[Path]:
    """Kernels of the cache, used 30, 20 and 10 days ago."""
    kernels = cubins.KernelCache(ArtifactStore(own_cache))
    folders = [kernels.image(tiny_spec(num_threads=n)).folder for n in (32, 64, 96)]
    made = [folder for folder in folders if folder is not None]
    for folder, days in zip(made, (30, 20, 10), strict=True):
        os.utime(folder, (time.time() - days * 86400,) * 2)
    return made


def test_loading_a_kernel_marks_it_used(three: list[Path], own_cache: Path) -> None:
    before = entries.last_used(three[0])
    found = cubins.KernelCache(ArtifactStore(own_cache)).image(tiny_spec(num_threads=32))
    assert found.origin == "disk"
    assert entries.last_used(three[0]) > before + 86400
    assert cache_command.main(["clear", "--older-than", "15"]) == 0
    assert [folder.is_dir() for folder in three] == [True, False, True]


def test_trim_removes_what_was_not_used_for_longest(
    three: list[Path], own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = max(map(entries.size_of, three))
    assert cache_command.main(["trim", "--max-size", str(2 * size)]) == 0
    assert "removed 1 entries" in capsys.readouterr().out
    assert [folder.is_dir() for folder in three] == [False, True, True]
    assert cache_command.main(["trim", "--max-size", "1G"]) == 0
    assert cache_command.main(["trim", "--max-size", "0"]) == 0
    assert not any(folder.is_dir() for folder in three)


def test_a_limit_holds_when_kernels_are_added(
    three: list[Path], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = max(map(entries.size_of, three))
    monkeypatch.setenv(env.CACHE_LIMIT.name, str(2 * size + 100))
    added = cubins.default_kernels().image(tiny_spec(num_threads=128)).folder
    assert added is not None and added.is_dir()
    assert [folder.is_dir() for folder in three] == [False, False, True]


def test_show_says_when_kernels_were_last_used(
    three: list[Path], own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    day = time.strftime("%Y-%m-%d", time.localtime(time.time() - 10 * 86400))
    assert cache_command.main(["show", "--entries"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("used " in line for line in lines) == 4
    assert any(f"MiB, last used {day}" in line for line in lines)


# ---- the log ----------------------------------------------------------------------------------


@pytest.fixture
def quiet_again() -> Iterator[None]:
    yield
    log._configure.cache_clear()
    log._configure(None)
    log.LOGGER.propagate = True
    log.LOGGER.setLevel(logging.NOTSET)


def test_the_log_shows_decisions_and_compiles(own_cache: Path) -> None:
    program = (
        "import torch, flash_attn_interface as f\n"
        "q = torch.zeros(1, 4, 1, 16, dtype=torch.bfloat16)\n"
        "f.flash_attn_func(q, q, q)\n"
        "from flash_attn_interface._common.runtime import cubins\n"
        "from flash_attn_interface._common.runtime.arch import limits\n"
        "from flash_attn_interface._flash2 import prebuild\n"
        "from flash_attn_interface._common.prebuild.headdim import Wanted\n"
        "spec = prebuild.specs((16, 16), Wanted(((16, 16),)), 'sm_80')[0]\n"
        "cubins.default_kernels().image(spec)\n"
    )
    shown = {}
    for level in ("", "info", "debug"):
        result = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True,
            env={**os.environ, env.LOGLEVEL.name: level, env.CACHE_DIR.name: f"{own_cache}{level}"},
        )  # fmt: skip
        shown[level] = [
            line for line in result.stderr.splitlines() if "INFO" in line or "DEB" in line
        ]
    assert shown[""] == []
    assert len(shown["info"]) == 2 and len(shown["debug"]) == 3
    assert "reference serves bf16 qk16 v16" in shown["info"][0]
    assert "compiled flash2-" in shown["info"][1] and "with nvrtc" in shown["info"][1]
    assert "built: flash2-" in shown["debug"][2]


def test_an_applications_own_logging_gets_the_log_without_the_variable(
    quiet_again: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(env.LOGLEVEL.name, raising=False)
    with caplog.at_level(logging.INFO, "flash_attn_interface"):
        log.info("a line of %s", "text")
        log.debug("not this")
    assert caplog.messages == ["a line of text"]
