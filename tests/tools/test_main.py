"""`python -m flash_attn_interface`: report, self-check and exit status."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from fakes import FakeBackend

from flash_attn_interface import __main__ as command
from flash_attn_interface._common import env
from flash_attn_interface.call import backends, dispatch
from flash_attn_interface.tools import selfcheck


@pytest.fixture
def fake(monkeypatch) -> FakeBackend:
    backend = FakeBackend()
    monkeypatch.setattr(backends, "flash2", lambda: backend)
    monkeypatch.setattr(backends, "hopper", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command.shutil, "which", lambda name: f"/usr/bin/{name}")
    dispatch.forget_plans()
    yield backend
    dispatch.forget_plans()


def test_environment_is_reported(fake, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path))
    assert command.main(["--environment"]) == 0
    text = capsys.readouterr().out
    for part in ("2.8.3", torch.__version__, "none that torch can use", "flash2: sm_80", "hopper"):
        assert part in text
    assert f"{tmp_path} (0 kernels)" in text
    assert f"{env.CACHE_DIR.name}={tmp_path}" in text
    assert "Self-check" not in text


def test_a_broken_hopper_tree_is_reported(fake, monkeypatch, capsys):
    def fail() -> None:
        raise ImportError("of release 0.0.1")

    monkeypatch.setattr(backends, "hopper", fail)
    assert command.main(["--environment"]) == 0
    assert "hopper: of release 0.0.1" in capsys.readouterr().out


def test_everything_passes(fake, capsys):
    assert command.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"All {len(selfcheck.CASES)} passed."
    assert sum("] ok" in line for line in lines) == len(selfcheck.CASES)
    assert len(fake.plans) == len(selfcheck.CASES)


def test_a_refusal_fails_the_check(fake, capsys):
    fake.refusal = "out of order"
    assert command.main(["--simulate", "sm_90"]) == 1
    text = capsys.readouterr().out
    assert "the simulator of sm_90" in text and "flash2: out of order" in text
    assert f"{len(selfcheck.CASES)} of {len(selfcheck.CASES)} failed." in text


@pytest.mark.parametrize("part", [0, 1], ids=["out", "lse"])
def test_a_wrong_result_fails_the_check(fake, monkeypatch, capsys, part):
    """Also where the difference is a NaN."""
    run = backends._ReferencePlan.run

    def damaged(self, *tensors):
        results = run(self, *tensors)
        results[part].view(-1)[3] = float("nan")
        return results

    monkeypatch.setattr(backends._ReferencePlan, "run", damaged)
    assert command.main([]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_without_gpu_and_compiler_nothing_is_checked(fake, monkeypatch, capsys):
    monkeypatch.setattr(command.shutil, "which", lambda name: None)
    assert command.main([]) == 2
    assert "Install g++" in capsys.readouterr().out


def test_a_terminal_sees_progress(fake, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    assert command.main([]) == 0
    text = terminal.getvalue()
    assert f"] 0/{len(selfcheck.CASES)}" in text and "\r\033[K" in text
    assert text.endswith("passed.\n")


@pytest.mark.sim
def test_self_check_on_the_simulator():
    results: list[selfcheck.Result] = []
    cases = tuple(dataclasses.replace(case) for case in selfcheck.CASES[:1])
    selfcheck.run_cases(
        torch.device("cpu"), "sm_80", lambda result, done, total: results.append(result), cases
    )
    assert [result.failure for result in results] == [""] and results[0].passed
