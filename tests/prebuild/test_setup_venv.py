"""What `make` installs, by the driver that it finds."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from types import ModuleType, SimpleNamespace

import pytest
from installs import ROOT


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_venv", ROOT / ".ci" / "setup_venv.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("version", "torch", "extras"),
    [
        (None, "torch==", ["test"]),
        (12040, "torch<2.11", ["test", "cu12"]),
        (12080, "torch<2.11", ["test", "cu12"]),
        (13000, "torch", ["test"]),
        (14010, "torch", ["test"]),
    ],
)
def test_torch_and_compiler_fit_the_driver(
    version: int | None,
    torch: str,
    extras: list[str],
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(script, "driver_version", lambda: version)
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    major = script.driver_cuda_major()
    assert script.default_torch(major).startswith(torch)
    assert script.extras_for(major, ["test"]) == extras


@pytest.mark.parametrize(
    ("line", "major"),
    [
        ("| NVIDIA-SMI 550.54    Driver Version: 550.54    CUDA Version: 12.4     |", 12),
        ("| NVIDIA-SMI 595.10    KMD Version: 595.10    CUDA UMD Version: 13.2    |", 13),
        ("something else", 13),
    ],
)
def test_nvidia_smi_is_asked_where_the_library_is_not_found(
    line: str, major: int, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = SimpleNamespace(returncode=0, stdout=line)
    monkeypatch.setattr(script, "driver_version", lambda: None)
    monkeypatch.setattr(script.shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: answer)
    assert script.driver_cuda_major() == major


def test_the_cu12_extra_accepts_the_compiler_of_each_torch_for_cuda_12() -> None:
    """Those pin it; a higher bound makes pip replace torch."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    (extra,) = re.findall(r'^    "cu12": \[(.*)\],$', text, re.MULTILINE)
    from packaging.requirements import Requirement

    parts = {r.name: r.specifier for r in map(Requirement, re.findall(r'"([^"]+)"', extra))}
    pinned = {"2.5": "12.4.127", "2.6": "12.4.127", "2.7": "12.6.77", "2.8": "12.8.93"}
    pinned |= {"2.9": "12.8.93", "2.10": "12.8.93"}
    for torch, version in pinned.items():
        assert version in parts["nvidia-cuda-nvrtc-cu12"], torch
    assert "12.9.4" in parts["cuda-bindings"]  # pinned by torch 2.10
    assert "13.0.0" not in parts["cuda-bindings"]
