"""Shared fixtures: seeds, markers, and the two machines (`sim`, `gpu`) that one test body runs on.

pytest -m sim            kernels on the CPU simulator (needs g++ with C++20)
pytest -m gpu            the same tests and larger ones on the current CUDA device
pytest --seed N          the random inputs of an earlier run; every failure prints its N
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import inputs
import pytest
import torch
from ranks import Ranks

if TYPE_CHECKING:  # markers and options need no package
    from flash_attn_interface._common.ask.problem import Target

# setuptools, which torch's inductor imports, insists on replacing distutils and fails where a test
# has got hold of it first; so it comes first.
with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401

MARKERS = {
    "sim": "runs kernels on the CPU simulator",
    "gpu": "needs a CUDA device of compute capability 8.0 or newer",
    "hopper": "needs a compute capability 9.0 device and the flash-attn-3 distribution",
    "slow": "takes minutes or tens of GiB; left out unless -m or the command line names it",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="seed of all random inputs")


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    if hasattr(config, "workerinput"):  # of pytest-xdist
        config.option.seed = config.workerinput["seed"]
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(1 << 31)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["seed"] = node.config.option.seed


def pytest_report_header(config: pytest.Config) -> str:
    return f"random inputs: --seed {config.option.seed}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {"gpu": _no_gpu(), "hopper": _no_hopper(), "sim": _no_simulator()}
    if "slow" not in config.option.markexpr and not any("::" in arg for arg in config.args):
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
    for item in items:
        for name, reason in reasons.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def _no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device (torch.cuda.is_available() is False)"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


def _no_hopper() -> str | None:
    if reason := _no_gpu():
        return reason
    if torch.cuda.get_device_capability() != (9, 0):
        return "not a compute capability 9.0 device"
    if os.environ.get("FLASH_ATTN_INTERFACE_TEST_ARCH"):
        return "FLASH_ATTN_INTERFACE_TEST_ARCH makes it an older device"
    try:
        import flash_attn_3  # noqa: F401
    except ImportError as error:
        return f"the flash-attn-3 distribution is not installed ({error})"
    return None


def _no_simulator() -> str | None:
    return None if shutil.which("g++") else "no g++ on PATH to build the simulator"


@pytest.fixture(autouse=True)
def _seeds(request: pytest.FixtureRequest) -> None:
    """Every test draws fresh inputs, a function of --seed and its own name only."""
    session_seed = request.config.option.seed
    seed = zlib.crc32(f"{session_seed} {request.node.name}".encode())
    inputs.SEEDS.seed(seed)
    torch.manual_seed(seed)
    print(f"reproduce with: --seed {session_seed}")


@dataclass(frozen=True)
class Runner:
    """Where the public functions run their kernels in this test."""

    name: str
    device: torch.device
    arch: str = "sm_80"  # what `sim` simulates

    def target(self, tree: str = "flash2") -> Target:
        """What this tree's kernels are compiled for here."""
        from flash_attn_interface._common.ask.problem import Target
        from flash_attn_interface.call import selection

        if self.name == "sim":
            return Target(self.arch, 0, simulated=True)
        return selection.target_for(tree, selection.device_of(torch.empty(0, device=self.device)))

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a public function with kernels on this machine and NaN in all fresh memory."""
        with self.active():
            return function(*args, **kwargs)

    @contextmanager
    def active(self) -> Iterator[None]:
        import flash_attn_interface

        with fresh_memory_is_nan():
            if self.name == "gpu":
                yield
            else:
                with flash_attn_interface.simulate(self.arch):
                    yield


@contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """torch.empty returns NaN (integers: their maximum): an element that no one wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _runner(name: str) -> Runner:
    return Runner(name, torch.device("cuda" if name == "gpu" else "cpu"))


@pytest.fixture(
    params=[
        pytest.param("sim", marks=pytest.mark.sim),
        pytest.param("gpu", marks=pytest.mark.gpu),
    ]
)
def runner(request: pytest.FixtureRequest) -> Runner:
    return _runner(request.param)


@pytest.fixture
def gpu() -> Runner:
    """For tests that make sense on a GPU only; mark them `gpu` as well."""
    return _runner("gpu")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four gloo processes."""
    started = Ranks(4, "gloo")
    yield started
    started.close()


@pytest.fixture
def ampere_tree(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All calls go to flash2, where another tree would serve some: for bitwise comparisons."""
    from flash_attn_interface.call import dispatch

    monkeypatch.setenv("FLASH_ATTN_INTERFACE_FORCE_BACKEND", "flash2")
    dispatch.forget_plans()
    yield
    dispatch.forget_plans()


@pytest.fixture(params=["cpu", "sim", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch) -> Iterator[torch.device]:
    """cpu: the reference. sim: kernels are asked for, a stand-in computes with the reference."""
    from fakes import FakeBackend

    from flash_attn_interface import simulate
    from flash_attn_interface.call import backends, dispatch

    dispatch.forget_plans()
    if request.param == "sim":
        monkeypatch.setattr(backends, "flash2", FakeBackend)
    with simulate("sm_80") if request.param == "sim" else contextlib.nullcontext():
        yield _runner(request.param).device
    dispatch.forget_plans()
