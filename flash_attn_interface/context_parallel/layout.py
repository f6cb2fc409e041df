"""Layout: how the tokens of a batch are divided among the ranks of a process group."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._common.ask.check_tensors import require_tensor
from .._common.ask.check_values import flag, integer, shown
from .._common.ask.checks import shorten
from . import all_to_all, gathering
from .agreement import agree
from .division import SCHEMES, Division
from .placed import Placed, place
from .plain import refuse_watchers, require_plain
from .steps import plan

MIN_TOKENS_PER_RANK = 256  # two runs of 128, the rows of a tile


class Layout:
    """Which tokens this rank holds of sequences that a group of ranks works on together.

    Every rank of the group makes the same one. It costs no communication; ranks compare layouts
    when they first use them.

    Dense: a batch of sequences of one length, tensors (batch, tokens, heads, head_dim). Each is
    divided among all ranks. Packed: documents of any lengths end to end, tensors (tokens, heads,
    head_dim). Long documents are divided among ranks, short ones stay whole on one, so that ranks
    have even work; the same cu_seqlens serves queries and keys.

    scheme "zigzag" cuts a sequence into twice as many chunks as ranks divide it, and gives rank r
    the chunks r and 2n - 1 - r: under a causal mask all ranks then have the same work. "contiguous"
    gives it one chunk: for windows and masks without a diagonal, where it moves fewer keys. Lengths
    need not be divisible by anything; chunks differ by a token at most.

    Args:
        group: a process group with this rank in it, a DeviceMesh of one dimension, or None for all
            ranks. gloo for CPU tensors, NCCL for CUDA tensors.
        seqlen: of a dense batch.
        cu_seqlens: of packed documents: starts and the total, a CPU tensor or a sequence of ints.
            A CUDA tensor is copied to the host, which synchronises.
        scheme: "zigzag" or "contiguous".
        min_tokens_per_rank: a document is divided only among so many ranks that each gets at least
            this many of its tokens.
        verify: compare the layout and the options of each call with the other ranks' when they are
            first used. False trusts that they agree, and saves a small all_gather per new layout;
            calls that do not agree then hang.

    Raises:
        TypeError, ValueError: an argument is wrong, or this rank is not in the group.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | None,
        *,
        seqlen: int | None = None,
        cu_seqlens: Sequence[int] | Tensor | None = None,
        scheme: str = "zigzag",
        min_tokens_per_rank: int = MIN_TOKENS_PER_RANK,
        verify: bool = True,
    ) -> None:
        self.group = _process_group(group)
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        if scheme not in SCHEMES:
            raise ValueError(f"scheme is {scheme!r}: expected 'zigzag' or 'contiguous'")
        if (seqlen is None) == (cu_seqlens is None):
            raise ValueError("expected either seqlen or cu_seqlens")
        self.scheme, self.verify = scheme, flag("verify", verify)
        self.dense = cu_seqlens is None
        minimum = _count("min_tokens_per_rank", min_tokens_per_rank, 1)
        if cu_seqlens is None:
            lengths, least = [_count("seqlen", seqlen, 0)], None
        else:
            lengths, least = _lengths(cu_seqlens), minimum
        self.division = Division.of(lengths, self.world, scheme, least)
        self.digest = hashlib.blake2b(
            repr((lengths, scheme, least)).encode(), digest_size=8
        ).hexdigest()
        self.calls: dict[Hashable, Any] = {}  # that function.py has checked, on a GPU
        self._agreed: set[Hashable] = set()
        self._placed: dict[Hashable, Placed] = {}
        self._orders: dict[torch.device, all_to_all.Order] = {}
        self._tensors: dict[Hashable, Tensor] = {}

    @property
    def dim(self) -> int:
        """Of tokens in this layout's tensors: 1 if dense, 0 if packed."""
        return 1 if self.dense else 0

    @property
    def tokens(self) -> int:
        """On this rank, of each sequence of a dense batch or of all documents together."""
        return self.division.tokens(self.rank)

    @property
    def total(self) -> int:
        """Tokens on all ranks."""
        return self.division.total

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """int64 (tokens,): of each of this rank's tokens, its position within its document."""
        return self._numbers("positions", device)

    def indices(self, device: torch.device | str | None = None) -> Tensor:
        """int64 (tokens,): of each of this rank's tokens, its row in the undivided tensor."""
        return self._numbers("indices", device)

    def shard(self, x: Tensor, dim: int | None = None) -> Tensor:
        """This rank's rows of a tensor that every rank has, differentiable.

        Args:
            x: with `total` rows along `dim`, any dtype.
            dim: of tokens; None means 1 for a dense layout, 0 for a packed one.

        Returns:
            x with `tokens` rows along `dim`. Its gradient holds this rank's rows, zeros elsewhere.

        Raises:
            ValueError: x has another number of rows.
        """
        require_tensor("x", x)
        axis = self._axis("x", x, dim)
        if x.shape[axis] != self.total:
            raise ValueError(
                f"x has shape {tuple(x.shape)}: expected {self.total} rows along dim {axis}, the "
                "layout's tokens on all ranks"
            )
        if self.world == 1 and self.dense:
            return x
        return x.index_select(axis, self.indices(x.device))

    def gather(self, x_local: Tensor, dim: int | None = None) -> Tensor:
        """The undivided tensor, on every rank, from each rank's rows; differentiable.

        Every rank of the group has to call it. The gradient of x_local is the sum over ranks of its
        rows' gradients: if all ranks compute the same loss from the result, divide it by their
        number.

        Args:
            x_local: with `tokens` rows along `dim`; other sizes and the dtype are those of all
                ranks.
            dim: as in `shard`.

        Raises:
            ValueError: x_local has another number of rows, here or on another rank, or ranks
                disagree about sizes, dtype or layout.
        """
        refuse_watchers("Layout.gather", x_local)
        axis, call, error = self.dim, None, None
        try:
            require_plain("x_local", x_local)
            axis = self._axis("x_local", x_local, dim)
            if x_local.shape[axis] != self.tokens:
                raise ValueError(
                    f"x_local has shape {tuple(x_local.shape)}: expected {self.tokens} rows along "
                    f"dim {axis}, the layout's tokens on this rank"
                )
            others = tuple(n for i, n in enumerate(x_local.shape) if i != axis)
            call = {"call": "gather", "dim": axis, "sizes": others, "dtype": str(x_local.dtype)}
        except Exception as refused:  # whatever it is: the other ranks wait for this one
            error = refused
        device = x_local.device if isinstance(x_local, Tensor) else torch.device("cpu")
        self.agree(device, call, error)
        return gathering.gather(self, x_local, axis)

    def agree(
        self,
        device: torch.device,
        call: Mapping[str, object] | None,
        error: Exception | None,
    ) -> None:
        """Raises on every rank if one refuses the call or makes another one; see agreement.py.

        CPU tensors are cheap to compare, so that is done in each call. On a GPU a call that all
        ranks have agreed on before is not compared again.
        """
        key = None if call is None else tuple(call.values())
        if device.type != "cpu" and key is not None and key in self._agreed:
            return
        backends = str(dist.get_backend_config(self.group))
        error = error or (_backend_error(device, backends) if self.world > 1 else None)
        if self.verify:
            told = None if error or call is None else {"layout": self.describe(), **call}
            agree(self.group, self._device_for_facts(device, backends), told, error)
        elif error is not None:
            raise error
        self._agreed.add(key)

    def describe(self) -> str:
        """For people: what has to be the same on all ranks."""
        kind = f"seqlen={self.total}" if self.dense else f"{len(self.division.lengths)} documents"
        return f"{kind}, scheme={self.scheme!r}, digest {self.digest}"

    def placed(self, causal: bool, window: tuple[int, int], device: torch.device) -> Placed:
        """The steps of this rank, with their indices on the device."""
        key = (causal, window, device)
        if key not in self._placed:
            steps = plan(self.division, self.rank, causal, window, self.dense)
            self._placed[key] = place(steps, device, self.dense)
        return self._placed[key]

    def order(self, device: torch.device) -> all_to_all.Order:
        """How the ranks' tokens make up the documents."""
        if device not in self._orders:
            self._orders[device] = all_to_all.order(self.division, device, self.dense)
        return self._orders[device]

    def padded_rows(self, device: torch.device) -> Tensor:
        """int64 (total,): of each row of the undivided tensor, its place where every rank's rows
        are padded to the most that a rank has."""
        key = ("padded_rows", device)
        if key not in self._tensors:
            rows = torch.empty(self.total, dtype=torch.int64)
            most = max(self.division.tokens(rank) for rank in range(self.world))
            for rank in range(self.world):
                held = torch.from_numpy(self.division.indices(rank))
                rows[held] = torch.arange(len(held)) + rank * most
            self._tensors[key] = rows.to(device)
        return self._tensors[key]

    def _numbers(self, name: str, device: torch.device | str | None) -> Tensor:
        where = torch.device("cpu" if device is None else device)
        key = (name, where)
        if key not in self._tensors:
            numbers = getattr(self.division, name)(self.rank)
            self._tensors[key] = torch.from_numpy(numbers).to(where)
        return self._tensors[key]

    def _axis(self, name: str, x: Tensor, dim: int | None) -> int:
        axis = self.dim if dim is None else integer("dim", dim)
        if not -x.ndim <= axis < x.ndim:
            raise ValueError(f"dim is {axis}: {name} has {x.ndim} dimensions")
        return axis % x.ndim

    def _device_for_facts(self, device: torch.device, backends: str) -> torch.device:
        """CPU memory where the group can move it, which a GPU then need not wait for."""
        if "cpu:" in backends:
            return torch.device("cpu")
        if device.type == "cuda":  # which need not be the current one
            return device
        return torch.device("cuda", torch.cuda.current_device())


def _backend_error(device: torch.device, backends: str) -> ValueError | None:
    """Whether the group moves tensors of this device; gloo moves CUDA tensors in part only."""
    served = f"{device.type}:" in backends and "cuda:gloo" not in backends
    if served or (device.type == "cpu" and "cpu:" in backends):
        return None
    return ValueError(
        f"q is on {device}, but the group's backends are {backends}: CPU tensors need gloo, CUDA "
        "tensors NCCL, and init_process_group without a backend has both"
    )


def _process_group(group: Any) -> dist.ProcessGroup:
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "torch.distributed has no process group: call torch.distributed.init_process_group "
            "first"
        )
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group is a DeviceMesh of {group.ndim} dimensions: pass the one that the sequence "
                'is divided along, for instance mesh["cp"]'
            )
        group = group.get_group()
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group: this rank is not in it")
        raise TypeError(
            f"group is {type(group).__name__}: expected a torch.distributed process group, a "
            "DeviceMesh of one dimension or None"
        )
    if dist.get_rank(group) < 0:
        raise ValueError("group: this rank is not in it")
    return group


def _count(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {type(value).__name__}: expected an int") from None
    if number < least:
        raise ValueError(f"{name} is {number}: expected at least {least}")
    return number


def _lengths(cu_seqlens: Sequence[int] | Tensor) -> list[int]:
    """Of documents, from their starts and the total."""
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}: expected "
                "int32 or int64 of shape (documents + 1,)"
            )
        cu_seqlens = cu_seqlens.tolist()
    elif isinstance(cu_seqlens, (str, bytes)) or not isinstance(cu_seqlens, Iterable):
        raise TypeError(f"cu_seqlens is {shown(cu_seqlens)}: expected a tensor or a list of ints")
    starts = [_count("an element of cu_seqlens", start, 0) for start in cu_seqlens]
    if not starts or starts[0] != 0:
        raise ValueError(f"cu_seqlens is {shorten(starts)}: expected to start with 0")
    for start, stop in pairwise(starts):
        if stop < start:
            raise ValueError(f"cu_seqlens decreases from {start} to {stop}")
    return [stop - start for start, stop in pairwise(starts)] or [0]
