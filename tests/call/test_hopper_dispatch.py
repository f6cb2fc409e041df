"""When the Hopper tree serves a call, what it refuses and why, and flash_attn_f3b2_func. No GPU."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import hopper_tree
import pytest
import torch
from fakes import FakeBackend, pretend_cuda, qkv, ragged_qkv

import flash_attn_interface
from flash_attn_interface import explain, simulate
from flash_attn_interface._common.ask.problem import Problem, Target
from flash_attn_interface.call import backends, dispatch
from flash_attn_interface.version import RELEASE

TREE = hopper_tree.load()
TARGET = Target("sm_90a", 0)
DENSE = ((2, 512, 8, 64), (2, 512, 8, 64), (2, 512, 8, 128))


def asked(**changes: Any) -> Problem:
    fields: dict[str, Any] = {
        "dtype": "bf16", "head_dim_qk": 64, "head_dim_v": 128, "num_heads_q": 8, "num_heads_k": 8,
        "num_heads_v": 8, "batch": 2, "seqlen_q": 512, "seqlen_k": 512, "total_q": 1024,
        "total_k": 1024, "softmax_scale": 0.125, "q_strides": (262144, 512, 64),
        "k_strides": (262144, 512, 64), "v_strides": (524288, 1024, 128),
    }  # fmt: skip
    return Problem(**{**fields, **changes})


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "hopper", lambda: TREE.BACKEND)


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "hopper", lambda: None)


@pytest.mark.parametrize(
    ("arch", "backend"),
    [("sm_80", "flash2"), ("sm_86", "flash2"), ("sm_90a", "hopper"), ("sm_120", "flash2")],
)
def test_each_architecture_gets_its_tree(installed, arch, backend):
    explanation = explain(*DENSE, causal=True, arch=arch)
    assert explanation.backend == backend
    assert explanation.spec is not None and explanation.spec.arch == arch
    assert explanation.refused == {} or arch != "sm_90a"


def test_without_the_tree_an_h100_gets_the_ampere_kernels(not_installed):
    explanation = explain(*DENSE, arch="sm_90a")
    assert (explanation.backend, explanation.spec.arch) == ("flash2", "sm_90")


def test_cpu_tensors_go_to_the_reference(installed):
    assert explain(*(torch.zeros(shape).bfloat16() for shape in DENSE)).backend == "reference"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vector_bytes": 8}, "multiples of 16 bytes"),
        ({"head_dim_v": 100}, "head_dim_v % 8"),
        ({"head_dim_qk": 128, "head_dim_v": 520}, "head dims"),
        ({"dropout_p": 0.1, "return_softmax": True}, "S_dmask"),
        ({"page_size": 256}, "without pages"),
        ({"total_k": 2**29}, "limited to"),
        ({"k_strides": (0, 512, 64)}, "k is expanded along its batch axis"),
        ({"q_strides": (262144, 512, 0)}, "q is expanded along its head axis"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_refusals_say_why(changes, reason):
    assert reason in TREE.BACKEND.refuses_forward(asked(**changes), TARGET)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_dim_v": 512},
        {"num_heads_k": 2, "num_heads_v": 4},
        {"k_strides": (32768, 64, 0), "v_strides": (65536, 128, 0)},  # one head, expanded
        {"dropout_p": 0.1, "alibi": True, "softcap": 3.0, "attention_chunk": 5},
    ],
    ids=str,
)
def test_serves(changes):
    assert TREE.BACKEND.refuses_forward(asked(**changes), TARGET) is None
    assert TREE.BACKEND.plan_forward(asked(**changes), TARGET).grid > 0


def test_other_architectures_are_refused():
    assert "sm_90a" in TREE.BACKEND.refuses_forward(asked(), Target("sm_90", 0))


def test_refused_calls_take_the_ampere_kernels(installed):
    explanation = explain((2, 9, 1, 20), (2, 9, 1, 20), (2, 9, 1, 20), arch="sm_90a")
    assert explanation.backend == "flash2"
    assert "16 bytes" in explanation.refused["hopper"]


def test_both_distributions_carry_one_release():
    assert TREE.BACKEND.release == RELEASE


def test_expanded_heads_are_stored_once():
    plan = TREE.BACKEND.plan_forward(
        asked(k_strides=(32768, 64, 0), v_strides=(65536, 128, 0)), TARGET
    )
    assert plan._values()["qhead_per_khead"] == 8
    assert [m.dims[2] for m in plan.map_plans()] == [8, 1, 1, 8]


@pytest.mark.parametrize("num_units", [8, 96, 7])
def test_groups_divide_the_units(num_units):
    heads = {f"num_heads_{x}": num_units for x in "qkv"}
    problem = asked(**heads, causal=True, window_right=0, seqlen_k=16384, total_k=32768)
    plan = TREE.BACKEND.plan_forward(problem, TARGET)
    assert plan.num_units % plan.units_per_group == 0
    assert plan.units_per_group * 16384 * 192 * 2 <= TREE.fwd.L2_BUDGET_BYTES


def test_ragged_maps_come_back_to_the_sequence():
    """Addresses are computed modulo 2**64; coordinates stay below the extents."""
    maps = TREE.tensor_maps
    plan = maps.plan_map(
        "k_map", "bf16", 64, (1, 100, 8), (0, 512, 64),
        ragged_rows=100, box_rows=64, swizzle_bytes=128,
    )  # fmt: skip
    first, length, row = 60, 40, 39
    at = (maps.RAGGED_ROWS - length + row, 3, first + length, maps.RAGGED_ROWS)
    assert all(c < extent for c, extent in zip(at, plan.dims[1:], strict=True))
    offset = sum(c * stride for c, stride in zip(at, plan.strides_bytes, strict=True))
    assert offset % 2**64 == (first + row) * 1024 + 3 * 128
    assert plan.dims[1] == at[0] + 1  # the next row is behind the sequence


# ---- flash_attn_f3b2_func ----------------------------------------------------------------------


@pytest.fixture
def trees(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeBackend, FakeBackend]:
    """Two trees that serve everything, forward and backward."""
    hopper, flash2 = FakeBackend("hopper"), FakeBackend("flash2")
    monkeypatch.setattr(backends, "hopper", lambda: hopper)
    monkeypatch.setattr(backends, "flash2", lambda: flash2)
    dispatch.forget_plans()
    yield hopper, flash2
    dispatch.forget_plans()


@pytest.mark.parametrize(("arch", "forward"), [("sm_80", 1), ("sm_90a", 0), ("sm_120", 1)])
@pytest.mark.parametrize("deterministic", [{}, {"deterministic": True}])
def test_f3b2_is_hopper_forward_and_ampere_backward(trees, arch, forward, deterministic):
    q, k, v = (x.requires_grad_() for x in qkv())
    with simulate(arch):
        out = flash_attn_interface.flash_attn_f3b2_func(q, k, v, 0.3, True, **deterministic)
        out.float().sum().backward()
    assert [len(tree.plans) for tree in trees] == [1 - forward, forward]
    assert [len(tree.backward_plans) for tree in trees] == [0, 1]
    assert trees[1].backward_plans[0].problem.deterministic == bool(deterministic)
    assert q.grad is not None and k.grad is not None and v.grad is not None


def test_f3b2_varlen(trees):
    arguments = ragged_qkv()
    arguments["q"].requires_grad_()
    with simulate("sm_90a"):
        out, lse = flash_attn_interface.flash_attn_f3b2_varlen_func(
            **arguments, causal=True, return_attn_probs=True
        )
        out.float().sum().backward()
    assert lse.shape == (4, 7)
    assert (len(trees[0].plans), len(trees[1].backward_plans)) == (1, 1)


def test_f3b2_takes_deterministic_as_its_sixth_argument(trees):
    q, k, v = (x.requires_grad_() for x in qkv())
    with simulate("sm_90a"):
        flash_attn_interface.flash_attn_f3b2_func(q, k, v, None, False, True).sum().backward()
    assert trees[1].backward_plans[0].problem.deterministic
    with pytest.raises(NotImplementedError, match="qv"):
        flash_attn_interface.flash_attn_f3b2_func(q, k, v, None, False, q)


def test_f3b2_without_gradients_and_on_the_cpu(trees):
    q, k, v = qkv()
    plain = flash_attn_interface.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(flash_attn_interface.flash_attn_f3b2_func(q, k, v, causal=True), plain)
    assert not trees[0].plans and not trees[1].plans


def test_each_tensor_goes_to_the_tree_of_its_device(trees, monkeypatch):
    """An A100 and an H100 in one host."""
    capability = {0: (8, 0), 1: (9, 0)}
    device = dispatch.Device
    current = [0]
    monkeypatch.setattr(dispatch, "device_of", lambda t: device(capability[current[0]], current[0]))
    for index in (0, 1):
        current[0] = index
        dispatch.forget_plans()
        flash_attn_interface.flash_attn_f3b2_func(*pretend_cuda(*qkv()))
    hopper, flash2 = trees
    assert [plan.target for plan in flash2.plans] == [Target("sm_80", 0)]
    assert [plan.target for plan in hopper.plans] == [Target("sm_90a", 1)]


# ---- the distribution --------------------------------------------------------------------------


def test_wheel(tmp_path: Path):
    """Named as clients expect, declares flash_attn_interface without shipping a file of it."""
    pytest.importorskip("setuptools")
    import shutil

    source = tmp_path / "hopper"
    shutil.copytree(
        hopper_tree.FOLDER, source, ignore=shutil.ignore_patterns("__pycache__", "build")
    )
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--no-index", "-w", tmp_path, source], cwd=tmp_path, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == "flash_attn_3-3.0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = "flash_attn_3-3.0.0.dist-info/"
        assert archive.read(f"{info}top_level.txt").split() == [
            b"flash_attn_3", b"flash_attn_config", b"flash_attn_interface",
        ]  # fmt: skip
        assert b"hopper = flash_attn_3:BACKEND" in archive.read(f"{info}entry_points.txt")
    shipped = {name.removeprefix("flash_attn_3/") for name in names if not name.startswith(info)}
    kinds = (".py", ".cu", ".cuh", "py.typed")
    tree = {p.name for p in hopper_tree.FOLDER.iterdir() if p.name.endswith(kinds)} - {"setup.py"}
    assert shipped == tree | {"flash_attn_interface/__init__.py"}  # the folder interface/
