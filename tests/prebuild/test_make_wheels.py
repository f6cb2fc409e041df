"""`make wheels`: which wheels it refuses. Building and installing them takes minutes and is done by
the command itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / ".ci/make_wheels.py"
GOOD = "flash_attn-2.8.3-py3-none-any.whl"
KERNELS = ["flash_attn_interface/_prebuilt/kernels/kernel.cubin", "flash_attn/__init__.py"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_wheels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_good_wheel_has_no_faults(script):
    assert script.faults(Path(GOOD), 2**20, KERNELS) == []


@pytest.mark.parametrize(
    "name, size, names, fault",
    [
        ("flash_attn-2.8.3-cp311-cp311-linux_x86_64.whl", 1, KERNELS, "every Python"),
        (GOOD, 40 * 2**20, KERNELS, "40.0 MiB"),
        (GOOD, 1, KERNELS[1:], "no prebuilt kernel"),
        (GOOD, 1, [*KERNELS, "flash_attn/x.so"], "flash_attn/x.so"),
    ],
)
def test_faults_are_named(script, name, size, names, fault):
    (found,) = script.faults(Path(name), size, names)
    assert fault in found


def test_the_try_sees_nothing_of_the_checkout(script, monkeypatch, tmp_path):
    for name in (
        "PYTHONPATH",
        "FLASH_ATTN_INTERFACE_PREBUILT_DIR",
        "FLASH_ATTENTION_SKIP_CUDA_BUILD",
    ):
        monkeypatch.setenv(name, "set")
    env = script.clean_environment(tmp_path)
    assert {key for key in env if key.startswith(("PYTHON", "FLASH_ATTN", "FLASH_ATTENTION"))} == {
        "FLASH_ATTN_INTERFACE_CACHE_DIR"
    }
