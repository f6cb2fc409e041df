"""Context parallelism in use: errors that all ranks report, wrappers of models, meshes."""

from __future__ import annotations

from typing import Any

import context_parallel_jobs as jobs
import pytest
from ranks import Ranks


@pytest.mark.parametrize(
    ("name", "value"),
    [("causal", False), ("window_size", (3, 0)), ("softmax_scale", 0.5), ("softcap", 2.0),
     ("deterministic", True), ("method", "ring"), ("return_lse", True)],
)  # fmt: skip
def test_options_that_differ_are_an_error_on_every_rank(
    ranks: Ranks, name: str, value: Any
) -> None:
    for error, afterwards in ranks.run(2, jobs.disagree, 1, name, value):
        assert error.startswith("ValueError: ranks of the group disagree"), error
        assert name in error and "on rank 0" in error and "on rank 1" in error
        assert not afterwards, "ranks stay in step after an error"


@pytest.mark.parametrize(
    "other",
    [{"cu_seqlens": [0, 12, 30]}, {"scheme": "contiguous"}, {"min_tokens_per_rank": 3}],
    ids=str,
)
def test_layouts_that_differ_are_an_error_on_every_rank(
    ranks: Ranks, other: dict[str, Any]
) -> None:
    for error in ranks.run(3, jobs.other_layout, 2, other):
        assert "ranks of the group disagree: layout is " in error, error


@pytest.mark.parametrize(
    ("kind", "on_it", "elsewhere"),
    [
        ("rows", "ValueError: q has shape", "refused by another rank of the group: rank 1: q has"),
        ("integers", "TypeError: q has dtype", "rank 1: q has dtype torch.int32"),
        ("no tensor", "TypeError: v is NoneType", "rank 1: v is NoneType"),
        ("sinks", "ValueError: s_aux has shape", "rank 1: s_aux has shape"),
        ("heads", "disagree: (heads, head_dim) of q, k, v is", "(2, 8)) on ranks 0, 2"),
        ("dtype", "disagree: dtype is 'torch.float32' on ranks 0, 2", "'torch.float64' on rank 1"),
        ("gradients", "disagree: gradients is False on ranks 0, 2", "True on rank 1"),
        ("batch", "disagree: batch is 1 on ranks 0, 2", "2 on rank 1"),
    ],
)
def test_a_mistake_of_one_rank_is_an_error_on_every_rank(
    ranks: Ranks, kind: str, on_it: str, elsewhere: str
) -> None:
    errors = ranks.run(3, jobs.other_tensors, 1, kind)
    assert on_it in errors[1]
    for error in (errors[0], errors[2]):
        assert error.startswith("ValueError") and elsewhere in error, error


@pytest.mark.parametrize(
    ("heads", "options", "message"),
    [
        ((3, 3, 3), {"method": "all_to_all"}, "NotImplementedError: method="),
        ((4, 4, 4), {"method": "star"}, "ValueError: method is 'star'"),
        ((4, 3, 4), {}, "ValueError: k has 3 heads and q has 4"),
        ((4, 2, 2), {"window_size": 3}, "TypeError: window_size is 3"),
        ((4, 2, 2), {"softcap": "no"}, "TypeError: softcap"),
    ],
)  # fmt: skip
def test_wrong_arguments(
    ranks: Ranks, heads: tuple[int, int, int], options: dict[str, Any], message: str
) -> None:
    for error in ranks.run(2, jobs.refused_alike, heads, options):
        assert error.startswith(message), error


def test_errors_without_communication(ranks: Ranks) -> None:
    expected = {
        "no layout": "TypeError: layout is ProcessGroup",
        "two dimensions": "ValueError: group is a DeviceMesh of 2 dimensions",
        "not in it": "ValueError: group: this rank is not in it",
        "no group": "TypeError: group is int",
        "scheme": "ValueError: scheme is 'striped'",
        "both": "ValueError: expected either seqlen or cu_seqlens",
        "neither": "ValueError: expected either seqlen or cu_seqlens",
        "negative": "ValueError: seqlen is -1",
        "starts": "ValueError: cu_seqlens is [1, 8]",
        "decreasing": "ValueError: cu_seqlens decreases from 8 to 5",
        "fractions": "ValueError: cu_seqlens is torch.float32",
        "shard": "ValueError: x has shape (1, 9)",
        "dim": "ValueError: dim is 1",
    }
    found = ranks.run(4, jobs.misuse)[0]
    assert found.keys() == expected.keys()
    for name, error in found.items():
        assert error.startswith(expected[name]), f"{name}: {error}"


def test_gather_with_wrong_rows_is_an_error_on_every_rank(ranks: Ranks) -> None:
    first, second = ranks.run(2, jobs.gather_wrong_rows)
    assert first.startswith("ValueError: x_local has shape")
    assert "rank 0: x_local has shape" in second


def test_a_dtensor_is_refused_with_a_way_out(ranks: Ranks) -> None:
    for error in ranks.run(4, jobs.dtensors_are_refused):
        assert error.startswith("TypeError: q is a DTensor") and "to_local()" in error


def test_second_derivatives_are_refused(ranks: Ranks) -> None:
    for error in ranks.run(2, jobs.differentiate_twice):
        assert error.startswith("RuntimeError"), error


def test_auto_takes_the_cheaper_method(ranks: Ranks) -> None:
    calls = [
        (1 << 16, (16, 16, 16), (-1, -1)),  # few ranks, much to compute
        (1 << 10, (16, 16, 16), (-1, -1)),  # too little to hide transfers
        (1 << 10, (32, 4, 4), (-1, -1)),  # of which little has to travel
        (1 << 10, (15, 15, 15), (-1, -1)),  # heads cannot be dealt out
        (1 << 10, (16, 16, 16), (128, 0)),  # a window: few keys travel
    ]
    for chosen in ranks.run(2, jobs.methods_chosen, calls):
        assert chosen == ["ring", "all_to_all", "ring", "ring", "ring"]
    assert ranks.run(4, jobs.methods_chosen, [(1 << 14, (16, 1, 1), (-1, -1))])[0] == ["all_to_all"]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "fsdp2-checkpoint"])
def test_training_on_packed_documents_equals_one_process(ranks: Ranks, wrapper: str) -> None:
    """examples/long_context.py: windows, sinks, unequal head dims, new documents in each step."""
    ranks.run(4, jobs.train, wrapper, 300, 3)


def test_heads_divided_along_another_dimension_of_the_mesh(ranks: Ranks) -> None:
    ranks.run(4, jobs.heads_and_tokens)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_bits(ranks: Ranks, reentrant: bool) -> None:
    ranks.run(3, jobs.checkpointing, reentrant)


def test_torch_compile_breaks_the_graph(ranks: Ranks) -> None:
    for error in ranks.run(2, jobs.compiled):
        assert error.startswith("Unsupported"), error
