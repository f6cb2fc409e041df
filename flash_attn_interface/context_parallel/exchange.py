"""Point-to-point transfers between the ranks of a group, on a stream of their own.

On CUDA devices NCCL moves the data on its own stream. What it has to wait for is what it is posted
behind, so transfers are posted from a side stream that waits only for what they need; attention on
the caller's stream goes on meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .steps import Rows

_side_streams: dict[torch.device, Any] = {}


def select(tensor: Tensor, rows: Rows, dim: int, indices: dict[int, Tensor]) -> Tensor:
    """The rows of `tensor` along `dim`: a view of a slice, else a copy.

    indices: `rows.index` on the tensor's device, by its id.
    """
    if rows.index is not None:
        return tensor.index_select(dim, indices[id(rows.index)])
    if rows.start == 0 and rows.stop == tensor.shape[dim]:
        return tensor
    return tensor.narrow(dim, rows.start, len(rows))


class Pending:
    """Transfers under way. Holds what they read and write."""

    def __init__(self, works: list[Any], side: Any, tensors: list[Tensor]) -> None:
        self.works, self.side, self.tensors = works, side, tensors

    def wait(self) -> None:
        """Returns when the caller's stream is ordered behind the transfers (on the CPU: after
        them). The side stream is ordered behind them too, since memory that it allocated for what
        was sent goes back to it.
        """
        for work in self.works:
            if self.side is not None:
                with torch.cuda.stream(self.side):
                    work.wait()
            work.wait()
        self.works, self.tensors = [], []


class Transfers:
    """Of one call of attention. Peers are ranks of `group`."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.side: Any = None
        if device.type == "cuda":
            if device not in _side_streams:
                _side_streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self.side = _side_streams[device]

    def now(self) -> Any:
        """What is on the caller's stream so far, for `post(after=...)`."""
        if self.side is None:
            return None
        return torch.cuda.current_stream(self.device).record_event()

    def post(
        self,
        sends: Sequence[tuple[int, Tensor, Rows]],
        receives: Sequence[tuple[int, Tensor]],
        after: Any,
        dim: int = 0,
        indices: dict[int, Tensor] | None = None,
    ) -> Pending:
        """Starts the transfers that one step of all ranks consists of.

        Args:
            sends: (peer, tensor, rows of it along `dim`).
            receives: (peer, contiguous tensor to fill). Several tensors between two ranks arrive in
                the order of sending.
            after: an earlier `now()`, when the tensors sent are there and those to fill are free.
        """
        if not sends and not receives:
            return Pending([], self.side, [])
        if self.side is None:
            return self._post(sends, receives, dim, indices or {})
        with torch.cuda.stream(self.side):
            self.side.wait_event(after)
            return self._post(sends, receives, dim, indices or {})

    def _post(
        self,
        sends: Sequence[tuple[int, Tensor, Rows]],
        receives: Sequence[tuple[int, Tensor]],
        dim: int,
        indices: dict[int, Tensor],
    ) -> Pending:
        operations, tensors = [], []
        order: dict[tuple[bool, int], int] = {}  # gloo matches by tag
        for peer, tensor, rows in sends:
            part = select(tensor, rows, dim, indices).detach().contiguous()
            operations.append(self._operation(True, part, peer, order))
            tensors.append(part)
        for peer, into in receives:
            operations.append(self._operation(False, into, peer, order))
            tensors.append(into)
        return Pending(dist.batch_isend_irecv(operations), self.side, tensors)

    def _operation(
        self, send: bool, tensor: Tensor, peer: int, order: dict[tuple[bool, int], int]
    ) -> dist.P2POp:
        tag = order.get((send, peer), 0)
        order[send, peer] = tag + 1
        other = dist.get_global_rank(self.group, peer)
        function = dist.isend if send else dist.irecv
        return dist.P2POp(function, tensor, other, self.group, tag)
