"""The dropout keep mask: Random123's known answers, its definition, statistics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from flash_attn_interface._common.launch import philox


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: Any, key: Any, expected: Any):
    words = philox.philox4x32_10(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in words) == expected


def test_keep_mask_follows_its_definition_element_by_element():
    seed, offset, p, num_heads = 0x123456789ABCDEF0 >> 2, (7 << 32) + 11, 0.4, 3
    mask = philox.keep_mask(torch.tensor([seed, offset]), p, 2, num_heads, 37, 70)
    for b, h, i, j in [(0, 0, 0, 0), (1, 2, 36, 69), (0, 1, 15, 33), (1, 0, 17, 9), (0, 2, 8, 62)]:
        r, c = i % 16, j % 32
        byte_idx = c // 8 * 4 + r // 8 * 2 + c % 2
        counter = (j // 32 * 32 + r % 8 * 4 + c % 8 // 2, i // 16, b * num_heads + h, offset)
        key = (seed, (seed >> 32) ^ (offset >> 32))
        words = philox.philox4x32_10(
            tuple(torch.tensor(x & 0xFFFFFFFF) for x in counter),
            tuple(torch.tensor(x & 0xFFFFFFFF) for x in key),
        )
        byte = int(words[byte_idx // 4]) >> 8 * (byte_idx % 4) & 0xFF
        assert bool(mask[b, h, i, j]) == (byte <= math.floor((1 - p) * 255))


def test_keep_mask_does_not_depend_on_lengths_or_on_the_order_of_sequences():
    state = torch.tensor([1 << 61, 12345])
    mask = philox.keep_mask(state, 0.5, 3, 2, 40, 90)
    assert torch.equal(philox.keep_mask(state, 0.5, 3, 2, 17, 33), mask[:, :, :17, :33])
    last = philox.keep_mask(state, 0.5, 1, 2, 40, 90, first_batch_idx=2)
    assert torch.equal(last, mask[2:])


@pytest.mark.parametrize("p", [0.0, 0.1, 0.17, 0.5, 0.9])
def test_keep_fraction(p: float):
    state = torch.randint(0, 2**62, (2,), dtype=torch.int64)
    mask = philox.keep_mask(state, p, 2, 2, 256, 512)
    expected = (math.floor((1 - p) * 255) + 1) / 256
    deviation = math.sqrt(expected * (1 - expected) / mask.numel())
    assert abs(mask.double().mean().item() - expected) <= 6 * deviation
    for dim in range(3):  # no two heads, batches or rows share their randomness
        a, b = mask.select(dim, 0).double(), mask.select(dim, 1).double()
        both = (a * b).mean().item()
        assert abs(both - expected**2) <= 6 * math.sqrt(0.25 / a.numel())
