"""Tensor maps: what is refused, and what reaches the driver and the simulator."""

from __future__ import annotations

import ctypes
import struct
from types import SimpleNamespace
from typing import Any

import pytest

from flash_attn_interface._common.launch import tensor_map
from flash_attn_interface._common.params import TENSOR_MAP_BYTES

# (batch, rows, heads, dim) = (2, 100, 3, 64), bf16, as TMA sees it.
GOOD: dict[str, Any] = {
    "dtype": "bf16",
    "address": 0x7F0000001230,
    "dims": (64, 100, 3, 2),
    "strides_bytes": (384, 128, 38400),
    "box": (64, 80, 1, 1),
    "swizzle_bytes": 128,
}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"dtype": "fp8"}, "tensor map of 'fp8'; known are fp16, bf16, fp32"),
        ({"address": 0x7F0000001238}, "16-byte alignment"),
        ({"address": 0}, "16-byte alignment"),
        ({"dims": (64, 0, 3, 2)}, "each must be 1 to"),
        ({"dims": (64, 100, 3)}, "1 to 5 dims"),
        ({"strides_bytes": (384, 128)}, "a stride for each but the first"),
        ({"strides_bytes": (384, 136, 38400)}, "multiples of 16"),
        ({"strides_bytes": (2**40, 128, 38400)}, "multiples of 16 below"),
        ({"box": (64, 257, 1, 1)}, "extents are 1 to 256"),
        ({"box": (64, 80, 1)}, "a box extent for each"),
        ({"box": (12, 80, 1, 1), "swizzle_bytes": 0}, "the first fills 16-byte units"),
        ({"box": (32, 80, 1, 1)}, "rows of 64 bytes, not the 128 of its swizzle"),
        ({"swizzle_bytes": 16}, "swizzle of 16 bytes"),
    ],
)
@pytest.mark.parametrize("kind", ["device", "simulated"])
def test_what_tma_cannot_do_is_refused(
    kind: tensor_map.Kind, changed: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        tensor_map.encode(kind, **{**GOOD, **changed})


def test_simulated_maps_hold_what_they_were_given() -> None:
    encoded = tensor_map.encode("simulated", **GOOD)
    assert len(encoded) == TENSOR_MAP_BYTES
    address, _, swizzle, rank, element = struct.unpack_from("<QIHBB", encoded)
    assert (address, swizzle, rank, element) == (GOOD["address"], 128, 4, 2)
    assert struct.unpack_from("<4Q5I5H", encoded, 16) == (
        *(384, 128, 38400, 0),
        *(64, 100, 3, 2, 1),
        *(64, 80, 1, 1, 1),
    )
    assert tensor_map.address_comes_first("simulated")


class FakeDriver:
    """Stands for cuda.bindings.driver: enums by name, numbers as they are."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.arguments: tuple[Any, ...] = ()
        self.memory = bytes(range(TENSOR_MAP_BYTES))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("CUtensorMap"):
            return type(name, (), {"__getattr__": lambda self, member: member})()
        return int  # cuuint32_t, cuuint64_t

    def cuTensorMapEncodeTiled(self, *arguments: Any) -> tuple[int, Any]:

        self.arguments = arguments
        self._buffer = ctypes.create_string_buffer(self.memory, TENSOR_MAP_BYTES)
        return self.status, SimpleNamespace(getPtr=lambda: ctypes.addressof(self._buffer))


def test_the_driver_is_asked_for_device_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    monkeypatch.setattr(tensor_map, "_driver", lambda: driver)
    assert tensor_map.encode("device", **GOOD) == driver.memory
    assert driver.arguments == (
        "CU_TENSOR_MAP_DATA_TYPE_BFLOAT16",
        4,
        GOOD["address"],
        [64, 100, 3, 2],
        [384, 128, 38400],
        [64, 80, 1, 1],
        [1, 1, 1, 1],
        "CU_TENSOR_MAP_INTERLEAVE_NONE",
        "CU_TENSOR_MAP_SWIZZLE_128B",
        "CU_TENSOR_MAP_L2_PROMOTION_L2_256B",
        "CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE",
    )
    plain = {**GOOD, "swizzle_bytes": 0, "dtype": "fp16"}
    tensor_map.encode("device", **plain)
    assert driver.arguments[0] == "CU_TENSOR_MAP_DATA_TYPE_FLOAT16"
    assert driver.arguments[8] == "CU_TENSOR_MAP_SWIZZLE_NONE"


def test_a_driver_that_refuses_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_map, "_driver", lambda: FakeDriver(status=1))
    with pytest.raises(RuntimeError, match=r"cuTensorMapEncodeTiled failed: 1, .*dims \(64, 100"):
        tensor_map.encode("device", **GOOD)


def test_a_thread_without_a_context_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As autograd's, when a backward is the first thing that it runs on a GPU."""
    driver = FakeDriver(status=201)
    monkeypatch.setattr(tensor_map, "_driver", lambda: driver)

    def make_current(cuda: Any) -> None:
        assert cuda is driver
        driver.status = 0

    monkeypatch.setattr(tensor_map.driver, "make_context_current", make_current)
    assert tensor_map.encode("device", **GOOD) == driver.memory
    driver.status = 201
    monkeypatch.setattr(tensor_map.driver, "make_context_current", lambda cuda: None)
    with pytest.raises(RuntimeError, match="cuTensorMapEncodeTiled failed: 201"):
        tensor_map.encode("device", **GOOD)


def test_patching_is_off_where_the_address_is_not_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_map, "_driver", lambda: FakeDriver())
    tensor_map.address_comes_first.cache_clear()
    assert not tensor_map.address_comes_first("device")
    tensor_map.address_comes_first.cache_clear()
