"""What reaches context_parallel beside plain tensors and sensible numbers: nothing hangs, nothing
is silently wrong. gloo processes on CPU tensors."""

from __future__ import annotations

from types import SimpleNamespace

import context_parallel_jobs as jobs
import pytest
import torch
from ranks import Ranks

from flash_attn_interface.context_parallel import exchange
from flash_attn_interface.context_parallel.layout import Layout


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        (
            jobs.broken_tensors,
            {
                "nested": "TypeError: q is a nested tensor",
                "sparse": "TypeError: q has layout torch.sparse_coo",
                "uninitialized": "TypeError: q is a UninitializedParameter",
                "no heads": "ValueError: q has 0 heads",
                "no head_dim": "ValueError: k has head_dim 8 but q has 0",
                "collective": "TypeError: q is an AsyncCollectiveTensor",
            },
        ),
        (
            jobs.broken_options,
            {
                "method": "TypeError: method is array(",
                "softcap": "ValueError: softcap is 1e-46",
                "sparse sinks": "TypeError: s_aux has layout torch.sparse_coo",
                "gather": "TypeError: x_local is NoneType",
                "gather along": "ValueError: dim is 7: x_local has 4 dimensions",
            },
        ),
    ],
    ids=["tensors", "options"],
)
def test_whatever_one_rank_passes_is_an_error_on_every_rank(
    ranks: Ranks, job: object, expected: dict[str, str]
) -> None:
    other, on_it = ranks.run(2, job, 1)  # type: ignore[arg-type]
    for name, message in expected.items():
        assert on_it[name].startswith(message), on_it[name]
        told = message.split(": ", 1)[1]
        assert other[name].startswith(
            f"ValueError: refused by another rank of the group: rank 1: {told}"
        )


def test_extreme_scalars_that_change_nothing(ranks: Ranks) -> None:
    for rank in ranks.run(2, jobs.extreme_scalars):
        assert all(rank.values()), rank


@pytest.mark.parametrize("method", ["ring", "all_to_all"])
def test_gradients_that_arrive_in_disguise(ranks: Ranks, method: str) -> None:
    ranks.run(2, jobs.gradients_in_disguise, method)


def test_traces_and_transforms_are_refused(ranks: Ranks) -> None:
    for rank in ranks.run(2, jobs.watched):
        for name, error in rank.items():
            assert error.startswith("NotImplementedError") and name.split(" of ")[0] in error, error


def test_streams_are_those_of_the_tensors_device(monkeypatch) -> None:
    """Not of the current device, which need not be the one that a rank's tensors are on."""
    asked: list[torch.device] = []

    def current_stream(device: torch.device | None = None) -> SimpleNamespace:
        assert device is not None
        asked.append(device)
        return SimpleNamespace(record_event=lambda: "an event")

    cuda1 = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "a stream")
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(exchange, "_side_streams", {})
    transfers = exchange.Transfers(None, cuda1)  # type: ignore[arg-type]
    assert transfers.now() == "an event" and asked == [cuda1]
    assert Layout._device_for_facts(None, cuda1, "cuda:nccl") == cuda1  # type: ignore[arg-type]
