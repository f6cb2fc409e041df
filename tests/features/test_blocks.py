"""Feature blocks: every kernel has the constants and values of all of them, and every backend
refuses a feature that its SERVES does not name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import hopper_tree
import pytest

from flash_attn_interface._common.ask.backward_problem import BackwardProblem
from flash_attn_interface._common.ask.kv_problem import Append
from flash_attn_interface._common.ask.problem import Problem, Target
from flash_attn_interface._common.features import union
from flash_attn_interface._common.features.direction import Direction
from flash_attn_interface._common.params import ParamLayout
from flash_attn_interface._common.runtime.spec import KernelSpec
from flash_attn_interface._flash2 import backend as flash2
from flash_attn_interface._flash2 import bwd_tiles, decode_tiles, fwd_tiles
from flash_attn_interface.call import backends

hopper_tree.load()
hopper = importlib.import_module("flash_attn_3.backend")
hopper_fwd_tiles = importlib.import_module("flash_attn_3.fwd_tiles")
hopper_bwd_tiles = importlib.import_module("flash_attn_3.bwd_tiles")

PLAIN = Problem(
    dtype="bf16", head_dim_qk=64, head_dim_v=128, num_heads_q=8, num_heads_k=8, num_heads_v=8,
    batch=2, seqlen_q=512, seqlen_k=512, total_q=1024, total_k=1024, softmax_scale=0.125,
    q_strides=(262144, 512, 64), k_strides=(262144, 512, 64), v_strides=(524288, 1024, 128),
)  # fmt: skip
OUT_STRIDES = (524288, 1024, 128)

# Feature -> what a problem that asks for it has, of features that can be asked for alone.
ASKING: dict[str, dict[str, Any]] = {
    "fp16": {"dtype": "fp16"},
    "bf16": {"dtype": "bf16"},
    "varlen": {"varlen_q": True, "varlen_k": True},
    "seqused": {"has_seqused_k": True},
    "causal": {"causal": True, "window_right": 0},
    "window": {"window_left": 100, "window_right": 7},
    "attention_chunk": {"attention_chunk": 64},
    "softcap": {"softcap": 30.0},
    "alibi": {"alibi": True},
    "sink": {"sink": True},
    "dropout": {"dropout_p": 0.1},
    "s_dmask": {"dropout_p": 0.1, "return_softmax": True},
    "softmax_lse": {"return_lse": True},
    "pages": {"page_size": 16, "cache_slots": 99, "has_seqused_k": True},
    "cache_batch_idx": {"cache_batch_idx": True, "cache_slots": 9, "has_seqused_k": True},
    "leftpad_k": {"leftpad_k": True, "cache_slots": 9, "has_seqused_k": True},
    "qv": {"qv": True, "cache_slots": 9, "has_seqused_k": True},
}
OF_A_CALL = {"append", "rotary", "deterministic"}
BACKENDS: dict[str, tuple[Any, Any, Target]] = {
    "flash2": (flash2.BACKEND, flash2, Target("sm_80", 0)),
    "hopper": (hopper.BACKEND, hopper, Target("sm_90a", 0, simulated=True)),
    "reference": (backends.REFERENCE, backends, Target("sm_80", 0)),
}
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward", "decode")


def backward(problem: Problem) -> BackwardProblem:
    return BackwardProblem(problem, OUT_STRIDES, OUT_STRIDES, (0, 0, 0), (0, 0, 0), (0, 0, 0))


def refusal(name: str, problem: Problem, direction: Direction) -> str | None:
    backend, _, target = BACKENDS[name]
    if direction == "forward":
        return backend.refuses_forward(problem, target)
    if direction == "backward":
        return backend.refuses_backward(backward(problem), target)
    cached = replace(problem, cache_slots=problem.cache_slots or 2, has_seqused_k=True)
    return backend.refuses_forward(replace(cached, append=Append()), target)


KERNELS: dict[str, tuple[Any, Direction, Callable[[Problem], KernelSpec]]] = {
    "flash2 forward": (flash2, "forward", lambda p: fwd_tiles.forward_spec(p, "sm_80")),
    "flash2 backward": (
        flash2, "backward", lambda p: bwd_tiles.backward_specs(backward(p), "sm_80")[1],
    ),
    "flash2 decode": (flash2, "decode", lambda p: decode_tiles.decode_spec(p, "sm_80", True)),
    "hopper forward": (hopper, "forward", lambda p: hopper_fwd_tiles.forward_spec(p, "sm_90a")),
    "hopper backward": (
        hopper, "backward", lambda p: hopper_bwd_tiles.backward_specs(backward(p), "sm_90a")[1],
    ),
}  # fmt: skip


def test_every_field_of_a_problem_belongs_to_one_block() -> None:
    """A new field is refused by all backends only if its block says what it means."""
    owned = [name for block in union.BLOCKS for name in block.FIELDS]
    owned += [*union.SHAPE_FIELDS, *union.HINT_FIELDS]
    assert sorted(owned) == sorted(field.name for field in fields(Problem))


def test_blocks_share_no_name() -> None:
    everything = replace(PLAIN, dropout_p=0.1, softcap=3.0, page_size=16, cache_slots=9)
    for names in (
        [name for block in union.BLOCKS for name in block.asked(PLAIN)],
        [name for block in union.BLOCKS for name in block.constants(PLAIN, "forward")],
        [name for block in union.BLOCKS for name in block.values(everything)],
    ):
        assert len(names) == len(set(names)) > 5


@pytest.mark.parametrize("feature", ASKING)
def test_a_problem_asks_for_the_feature_and_no_more(feature: str) -> None:
    problem = replace(PLAIN, **{"return_lse": False, **ASKING[feature]})
    on = {name for name, is_asked in union.asked(problem).items() if is_asked}
    beside = {"s_dmask": {"dropout"}}.get(feature, set())
    beside |= {"seqused"} if problem.has_seqused_k else set()
    assert on == {feature, problem.dtype} | beside


def test_every_feature_has_an_example() -> None:
    assert set(union.asked(PLAIN)) - set(OF_A_CALL) == set(ASKING)
    asked = set(union.asked(backward(PLAIN))) | set(union.asked(replace(PLAIN, append=Append())))
    assert asked == {*ASKING, *OF_A_CALL}


@pytest.mark.parametrize(
    ("kernel", "feature"),
    [
        (kernel, feature)
        for kernel, (module, direction, _) in KERNELS.items()
        for feature in ASKING
        if feature in module.SERVES[direction]
    ],
)
def test_kernels_have_the_constants_and_take_the_values_of_all_blocks(
    kernel: str, feature: str
) -> None:
    _, direction, spec_of = KERNELS[kernel]
    problem = replace(PLAIN, **ASKING[feature])
    spec = spec_of(problem)
    constants = union.constants(problem, direction)
    assert dict(spec.constants).items() >= constants.items()
    layout = ParamLayout.load(spec.params)
    assert union.values(problem).keys() <= layout.fields.keys()
    layout.block(**union.values(problem))


@pytest.mark.parametrize("name", BACKENDS)
def test_serves_names_features(name: str) -> None:
    serves = BACKENDS[name][1].SERVES
    assert set(serves) == set(DIRECTIONS)
    assert frozenset().union(*serves.values()) <= {*ASKING, *OF_A_CALL}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("feature", ASKING)
def test_what_is_served_is_what_serves_says(name: str, direction: Direction, feature: str) -> None:
    problem = replace(PLAIN, **ASKING[feature])
    served = refusal(name, problem, direction) is None
    assert served == (feature in BACKENDS[name][1].SERVES[direction])


@pytest.fixture
def new_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block whose feature every problem asks for."""
    block = SimpleNamespace(
        FIELDS=(),
        asked=lambda problem: {"prefix": True},
        constants=lambda problem, direction: {"prefix": True},
        values=lambda problem: {"prefix": 3},
    )
    monkeypatch.setattr(union, "BLOCKS", (*union.BLOCKS, block))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_new_feature_is_refused_until_serves_names_it(
    name: str, direction: Direction, new_feature: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = refusal(name, PLAIN, direction)
    assert told is not None
    module = BACKENDS[name][1]
    if (name, direction) == ("hopper", "decode"):
        assert told == "it has no kernels that read a cache"
        return
    assert told.endswith("does not serve prefix")
    extended = {**module.SERVES, direction: module.SERVES[direction] | {"prefix"}}
    monkeypatch.setattr(module, "SERVES", extended)
    assert refusal(name, PLAIN, direction) is None


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_new_feature_reaches_every_kernel(kernel: str, new_feature: None) -> None:
    _, _, spec_of = KERNELS[kernel]
    assert spec_of(PLAIN)["prefix"] is True


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_type_that_is_not_listed_is_refused(name: str, direction: Direction) -> None:
    told = refusal(name, replace(PLAIN, dtype="fp8"), direction)
    assert told is not None and ("fp8" in told or "no kernels" in told)
