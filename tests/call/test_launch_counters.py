"""Who shares counters and who does not. No GPU needed: streams and captures are played."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from flash_attn_interface._common.launch import lasting_memory, launch_counters


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The state of torch's CUDA side, to be changed by the test; pools lie in host memory."""
    state = SimpleNamespace(stream=7, capturing=False, waits=0)

    def zeros(count: int, dtype: torch.dtype, device: object) -> torch.Tensor:
        state.waits += 1
        return torch.zeros(count, dtype=dtype)

    monkeypatch.setattr(launch_counters, "_pools", {})
    monkeypatch.setattr(launch_counters, "_BLOCK", 3 * launch_counters.MAX_COUNTERS)
    monkeypatch.setattr(lasting_memory, "zeros", zeros)
    for name, value in {
        "_cuda_getDevice": lambda: 0,
        "_cuda_isCurrentStreamCapturing": lambda: state.capturing,
        "_cuda_getCurrentRawStream": lambda _: state.stream,
    }.items():
        monkeypatch.setattr(torch._C, name, value, raising=False)
    return state


def test_a_stream_keeps_its_counters(cuda: SimpleNamespace):
    first = launch_counters.address(0, 10)
    assert first != 0
    assert launch_counters.address(0, launch_counters.MAX_COUNTERS) == first
    cuda.stream = 8
    other = launch_counters.address(0, 10)
    assert abs(other - first) >= 4 * launch_counters.MAX_COUNTERS
    cuda.stream = 7
    assert launch_counters.address(0, 10) == first


def test_captured_launches_share_with_nobody(cuda: SimpleNamespace):
    launch_counters.prepare(0)
    eager = launch_counters.address(0, 10)
    cuda.capturing = True
    addresses = [launch_counters.address(0, 100) for _ in range(5)]
    ranges = sorted([(eager, launch_counters.MAX_COUNTERS), *((a, 100) for a in addresses)])
    for (begin, count), (following, _) in zip(ranges, ranges[1:], strict=False):
        assert begin + 4 * count <= following


def test_a_capture_allocates_nothing_and_may_find_none(cuda: SimpleNamespace):
    cuda.capturing = True
    launch_counters.prepare(0)
    assert launch_counters.address(0, 1) == 0  # no pool yet
    cuda.capturing = False
    launch_counters.prepare(0)
    waits, cuda.capturing = cuda.waits, True
    found = [launch_counters.address(0, launch_counters.MAX_COUNTERS) for _ in range(5)]
    assert [address != 0 for address in found] == [True, True, True, False, False]
    assert cuda.waits == waits


def test_room_is_made_for_more(cuda: SimpleNamespace):
    """Beyond a block, with everything that was handed out left alone."""
    seen = set()
    for cuda.stream in range(20):
        seen.add(launch_counters.address(0, 1))
    assert len(seen) == 20
    assert 0 not in seen
    assert all(not block.any() for block in launch_counters._pools[0]._blocks)
