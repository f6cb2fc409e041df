"""The dropout keep mask in plain PyTorch: which probabilities survive, for a given (seed, offset).

Definition shared by every kernel (device twin: common/device/dropout.cuh), the reference and the
tests. The mask is a pure function of (seed, offset, batch index, query head, row, column), rows and
columns counted from the start of their sequence, so neither tile sizes nor the architecture nor the
backward's loop order can change it.

One Philox4x32-10 call yields 16 random bytes: the share of one lane in a 16 x 32 tile of the score
matrix, in the register order of two m16n8 accumulator pairs. With R = row // 16, C = column // 32,
r = row % 16, c = column % 32:

    lane    = (r % 8) * 4 + (c % 8) // 2
    byte    = (c // 8) * 4 + (r // 8) * 2 + c % 2    (in word byte // 4, at bit 8 * (byte % 4))
    counter = (C * 32 + lane, R, batch_idx * num_heads_q + head, offset's low 32 bits)
    key     = (seed's low 32 bits, seed's high 32 bits XOR offset's high 32 bits)
    keep   <=> byte value <= floor((1 - dropout_p) * 255)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85

Words4 = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32_10(counter: Words4, key: tuple[Tensor, Tensor]) -> Words4:
    """Random123's Philox4x32 with 10 rounds on int64 tensors that hold unsigned 32-bit values.

    All tensors broadcast against each other. Checked against Random123's known answers in tests.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _multiply_high_low(_MULTIPLIER_0, c0)
        hi1, lo1 = _multiply_high_low(_MULTIPLIER_1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL_0) & _MASK32, (k1 + _WEYL_1) & _MASK32
    return c0, c1, c2, c3


def _multiply_high_low(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32 bit product, in 16-bit halves: int64 is a bit too short."""
    low, high = multiplier * (x & 0xFFFF), multiplier * (x >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _MASK32


def keep_threshold(dropout_p: float) -> int:
    """Largest random byte that is kept, so the true keep probability is (threshold + 1) / 256."""
    return math.floor((1.0 - dropout_p) * 255.0)


def keep_mask(
    rng_state: Tensor,
    dropout_p: float,
    batch: int,
    num_heads_q: int,
    seqlen_q: int,
    seqlen_k: int,
    first_batch_idx: int = 0,
) -> Tensor:
    """Bool (batch, num_heads_q, seqlen_q, seqlen_k), True = kept, on the device of `rng_state`.

    Args:
        rng_state: int64 (2,) = (seed, offset); never read back to the host.
        first_batch_idx: batch index of the first sequence, for callers that go sequence by
            sequence.
    Intermediates take about 16 bytes per score; meant for tests and CPU tensors.
    """
    device = rng_state.device
    seed, offset = rng_state[0], rng_state[1]
    row_tiles, column_tiles = -(-seqlen_q // 16), -(-seqlen_k // 32)

    def axis(size: int, trailing: int, first: int = 0) -> Tensor:
        indices = torch.arange(first, first + size, dtype=torch.int64, device=device)
        return indices.view(-1, *[1] * trailing)

    heads = axis(batch * num_heads_q, 3, first=first_batch_idx * num_heads_q)
    words = philox4x32_10(
        (
            axis(column_tiles, 1) * 32 + axis(32, 0),
            axis(row_tiles, 2),
            heads & _MASK32,
            offset & _MASK32,
        ),
        (seed & _MASK32, ((seed >> 32) ^ (offset >> 32)) & _MASK32),
    )
    # (heads, row tile, column tile, r % 8, (c % 8) // 2, c // 8 = word, r // 8, c % 2)
    shifts = torch.tensor([[0, 8], [16, 24]], dtype=torch.int64, device=device)
    random_bytes = torch.stack(
        [((word.unsqueeze(-1).unsqueeze(-1) >> shifts) & 0xFF).to(torch.uint8) for word in words],
        dim=4,
    )
    random_bytes = random_bytes.view(batch * num_heads_q, row_tiles, column_tiles, 8, 4, 4, 2, 2)
    by_row_and_column = random_bytes.permute(0, 1, 6, 3, 2, 5, 4, 7)
    by_row_and_column = by_row_and_column.reshape(
        batch, num_heads_q, row_tiles * 16, column_tiles * 32
    )
    return by_row_and_column[:, :, :seqlen_q, :seqlen_k] <= keep_threshold(dropout_p)
