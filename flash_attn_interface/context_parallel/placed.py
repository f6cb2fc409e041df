"""A plan on a device: its row indices and sequence lengths as tensors, copied there all at once."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from .kernels import Sequences
from .steps import Launch, Plan, Rows


@dataclass(frozen=True)
class Placed:
    """indices: `Rows.index` on the device, by its id; equal ones share a tensor.
    sequences: of each launch of each step.
    """

    plan: Plan
    indices: dict[int, Tensor]
    sequences: tuple[tuple[Sequences, ...], ...]


def place(plan: Plan, device: torch.device, dense: bool) -> Placed:
    return Placed(plan, _indices(plan, device), _sequences(plan, device, dense))


def _rows(plan: Plan) -> list[Rows]:
    found: list[Rows] = []
    for step in plan.steps:
        found += [rows for _, rows in step.sends]
        found.append(step.own)
        for launch in step.launches:
            found += launch.q, launch.k
    return found


def _indices(plan: Plan, device: torch.device) -> dict[int, Tensor]:
    arrays = {id(rows.index): rows.index for rows in _rows(plan) if rows.index is not None}
    distinct = {array.tobytes(): array for array in arrays.values()}
    if not distinct:
        return {}
    joined = _to(np.concatenate(list(distinct.values())), device)
    parts = torch.split(joined, [len(array) for array in distinct.values()])
    tensors = dict(zip(distinct, parts, strict=True))
    return {key: tensors[array.tobytes()] for key, array in arrays.items()}


def _sequences(plan: Plan, device: torch.device, dense: bool) -> tuple[tuple[Sequences, ...], ...]:
    launches = [launch for step in plan.steps for launch in step.launches]
    starts: list[Tensor | None] = [None] * (2 * len(launches))
    if not dense and launches:
        lists = [
            [0, *accumulate(lengths)]
            for launch in launches
            for lengths in (launch.q_lengths, launch.k_lengths)
        ]
        # Each begins at a multiple of 16 bytes.
        padded = [numbers + [0] * (-len(numbers) % 4) for numbers in lists]
        joined = _to(np.concatenate(padded).astype(np.int32), device)
        parts = torch.split(joined, [len(numbers) for numbers in padded])
        starts = [p[: len(numbers)] for p, numbers in zip(parts, lists, strict=True)]
    of_launch = iter(zip(launches, starts[::2], starts[1::2], strict=True))
    return tuple(tuple(_sequence(*next(of_launch)) for _ in step.launches) for step in plan.steps)


def _sequence(launch: Launch, starts_q: Tensor | None, starts_k: Tensor | None) -> Sequences:
    return Sequences(
        starts_q,
        starts_k,
        max(launch.q_lengths),
        max(launch.k_lengths),
        launch.causal,
        launch.window,
    )


def _to(numbers: np.typing.NDArray[np.integer], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(numbers))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
