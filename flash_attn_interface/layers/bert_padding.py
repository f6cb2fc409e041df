"""Between padded batches and packed tokens: what `flash_attn.bert_padding` exports, and the
`unpad_input` and `pad_input` of FlashAttention-3.

Plain PyTorch on any device. Packing has to know how many tokens there are, so both unpad functions
wait for the device, each once; nothing else here does. Users call these around the varlen
functions; the attention itself never pads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from .._common.ask.check_tensors import require_device, require_tensor
from .._common.ask.check_values import non_negative
from ..call.watchers import readable

# ---- rows of a tensor ---------------------------------------------------------------------------


class IndexFirstAxis(torch.autograd.Function):
    """The row gather behind `index_first_axis`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, indices: Tensor) -> Tensor:
        return input.index_select(0, indices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        input, indices = inputs
        ctx.save_for_backward(indices)
        ctx.first_axis_dim = input.shape[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        zeros = grad_output.new_zeros(ctx.first_axis_dim, *grad_output.shape[1:])
        return zeros.index_add(0, indices, grad_output), None


class IndexPutFirstAxis(torch.autograd.Function):
    """The row scatter behind `index_put_first_axis`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
        zeros = values.new_zeros(first_axis_dim, *values.shape[1:])
        if values.dtype.is_floating_point and values.dtype.itemsize == 1:  # torch cannot copy fp8
            bits = zeros.view(torch.uint8).index_copy_(0, indices, values.view(torch.uint8))
            return bits.view(values.dtype)
        return zeros.index_copy_(0, indices, values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        return grad_output.index_select(0, indices), None, None


class IndexFirstAxisResidual(torch.autograd.Function):
    """The row gather behind `index_first_axis_residual`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        return input.index_select(0, indices), input.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_residual: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        return grad_residual.index_add(0, indices, grad_output), None


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input[indices], differentiable in input.

    The gradient adds up where an index occurs several times (upstream's is right for distinct
    indices only).

    Args:
        input: (rows, ...), any dtype.
        indices: (nnz,), int64 or int32, each in [0, rows).

    Returns: (nnz, ...), dtype of input.

    Raises: TypeError for indices that are no integers; ValueError for wrong shapes or devices, and
        for indices in CPU memory that are out of range.
    """
    _check_rows("input", input)
    gathered: Tensor = IndexFirstAxis.apply(  # type: ignore[no-untyped-call]
        input, _row_indices(indices, input, "input")
    )
    return gathered


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros whose rows `indices` are `values`; differentiable in values.

    Args:
        values: (nnz, ...), any dtype.
        indices: (nnz,), int64 or int32, distinct, each in [0, first_axis_dim).
        first_axis_dim: number of rows of the result.

    Returns: (first_axis_dim, ...), dtype of values.

    Raises: as `index_first_axis`.
    """
    return _put_rows("values", values, indices, non_negative("first_axis_dim", first_axis_dim),
                     "first_axis_dim")  # fmt: skip


def _put_rows(name: str, values: Any, indices: Any, first_axis_dim: int, of: str) -> Tensor:
    """`index_put_first_axis` of the argument `name`; of: what gives the number of rows."""
    _check_rows(name, values)
    indices = _row_indices(indices, values, name, first_axis_dim, of)
    if values.shape[0] != indices.shape[0]:
        raise ValueError(
            f"{name} has {values.shape[0]} rows, but indices has {indices.shape[0]} entries: "
            "expected one index per row"
        )
    size = first_axis_dim * max(values.shape[1:].numel() * values.element_size(), 1)
    if size > _MAX_BYTES:
        raise ValueError(f"{of}: the result would take {size} bytes")
    scattered: Tensor = IndexPutFirstAxis.apply(  # type: ignore[no-untyped-call]
        values, indices, first_axis_dim
    )
    return scattered


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(input[indices], input), for a block that works on some rows and adds its input back.

    Using the second result as the residual sums both gradients in one step.

    Args:
        input: (rows, ...), any dtype.
        indices: (nnz,), int64 or int32, each in [0, rows).

    Returns: the gathered (nnz, ...), and `input` itself: same memory, part of the same graph node.

    Raises: as `index_first_axis`.
    """
    _check_rows("input", input)
    both: tuple[Tensor, Tensor] = IndexFirstAxisResidual.apply(  # type: ignore[no-untyped-call]
        input, _row_indices(indices, input, "input")
    )
    return both


# ---- padded batches -----------------------------------------------------------------------------


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Packs the tokens that a mask selects, sequence after sequence. Undone by `pad_input`.

    Args:
        hidden_states: (batch, seqlen, ...), any dtype; differentiable.
        attention_mask: (batch, seqlen), bool or a number type, nonzero = a token.
        unused_mask: like attention_mask. Its tokens are packed too, without counting as used:
            room that a caller wants to keep allocated.

    Returns:
        tokens: (nnz, ...), those selected by either mask, in order.
        indices: (nnz,) int64, their positions in the batch * seqlen flattened ones.
        cu_seqlens: (batch + 1,) int32, where each sequence starts in `tokens`, and nnz.
        max_seqlen: int, the most tokens packed from one sequence; knowing it costs the wait for the
            device.
        seqused: (batch,) int32, tokens of each sequence that attention_mask alone selects.

    Raises: TypeError for what is no tensor; ValueError for shapes or devices that disagree.
    """
    _check_mask(hidden_states, attention_mask, "attention_mask")
    used = selected = attention_mask != 0
    if unused_mask is not None:
        _check_mask(hidden_states, unused_mask, "unused_mask")
        selected = used | (unused_mask != 0)

    # The zero in front starts cu_seqlens, and gives an empty batch a maximum.
    lengths = F.pad(selected.sum(-1, dtype=torch.int32), (1, 0))
    cu_seqlens = lengths.cumsum(0, dtype=torch.int32)
    max_seqlen, total = torch.stack((lengths.max(), cu_seqlens[-1])).tolist()
    indices = _true_positions(selected, total)
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, cu_seqlens, max_seqlen, used.sum(-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Packs rows that hold several samples each, so that attention stays inside a sample.

    Row `[2, 3, 0, 0, 0, 0]` of attention_mask_in_length says: the first two tokens are a sample,
    the next three another one, the last one is padding.

    Args:
        hidden_states: (batch, seqlen, ...), any dtype; differentiable.
        attention_mask_in_length: (batch, n) integers, the lengths of the samples of each row,
            zeros after them. Upstream wants n = seqlen; any n will do.

    Returns: tokens, indices and max_seqlen as from `unpad_input`, in its order, and cu_seqlens
        (num_samples + 1,) int32, one entry per sample. `pad_input` undoes it.

    Raises: TypeError for lengths that are no integers; ValueError for shapes or devices that
        disagree, for a row whose lengths exceed seqlen, and for negative lengths.
    """
    _check_rows_of_batch(hidden_states, attention_mask_in_length, "attention_mask_in_length")
    if attention_mask_in_length.dtype not in _INTEGERS:
        raise TypeError(
            f"attention_mask_in_length is {attention_mask_in_length.dtype}: expected the lengths "
            "of samples as integers; for a mask of tokens use unpad_input"
        )
    seqlen = hidden_states.shape[1]
    lengths = attention_mask_in_length.long()
    row_totals = lengths.sum(-1)
    is_sample = lengths != 0
    numbers = (F.pad(lengths.flatten(), (1, 0)), F.pad(row_totals, (1, 0)))
    max_seqlen, longest_row, total, num_samples, least = torch.stack(
        (numbers[0].max(), numbers[1].max(), numbers[1].sum(), is_sample.sum(), numbers[0].min())
    ).tolist()
    if least < 0:
        raise ValueError(f"attention_mask_in_length has {least}: expected lengths >= 0")
    if longest_row > seqlen:
        raise ValueError(
            f"attention_mask_in_length has a row whose lengths add up to {longest_row}, but "
            f"hidden_states has {seqlen} tokens per row"
        )
    sample_lengths = lengths.flatten().index_select(0, _true_positions(is_sample, num_samples))
    cu_seqlens = F.pad(sample_lengths.cumsum(0, dtype=torch.int32), (1, 0))
    in_use = torch.arange(seqlen, device=lengths.device) < row_totals.unsqueeze(-1)
    indices = _true_positions(in_use, total)
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, cu_seqlens, max_seqlen


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Puts packed tokens back where `unpad_input` took them from; zeros elsewhere.

    Args:
        hidden_states: (nnz, ...), any dtype; differentiable.
        indices: (nnz,) as from unpad_input.
        batch, seqlen: sizes of the padded batch.

    Returns: (batch, seqlen, ...), dtype of hidden_states.

    Raises: as `index_first_axis`.
    """
    rows = non_negative("batch", batch) * non_negative("seqlen", seqlen)
    padded = _put_rows("hidden_states", hidden_states, indices, rows, "batch and seqlen")
    return padded.view(batch, seqlen, *hidden_states.shape[1:])


# ---- helpers ------------------------------------------------------------------------------------

_MAX_BYTES = 2**47  # no machine has an address for more
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _true_positions(mask: Tensor, count: int) -> Tensor:
    """nonzero() of the flattened mask, whose `count` true elements are known: no synchronisation.

    The n-th true element is the first one at which the running count reaches n.
    """
    running_count = mask.flatten().cumsum(0)
    return torch.searchsorted(running_count, torch.arange(1, count + 1, device=mask.device))


def _check_rows(name: str, tensor: Any) -> None:
    require_tensor(name, tensor)
    if tensor.ndim == 0:
        raise ValueError(f"{name} is a scalar: expected at least one dim, the rows")


def _row_indices(
    indices: Any, rows: Tensor, name: str, count: int | None = None, of: str | None = None
) -> Tensor:
    """`indices` as int64, each of which must be below `count`; those of a device are trusted.

    name: the argument whose rows they are. count, of: a number and where it is from; else the rows.
    """
    require_tensor("indices", indices, "an int64 torch.Tensor")
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"indices has dtype {indices.dtype}: expected torch.int64")
    if indices.ndim != 1:
        raise ValueError(f"indices has shape {tuple(indices.shape)}: expected one dim")
    require_device("indices", indices, rows.device, name)
    count = rows.shape[0] if count is None else count
    if not is_compiling() and readable(indices) and indices.numel():
        least, greatest = (int(x) for x in indices.aminmax())
        if least < 0 or greatest >= count:
            raise ValueError(
                f"indices has {least if least < 0 else greatest}: expected 0 to {count - 1}, the "
                f"rows that {of or name} gives"
            )
    index: Tensor = indices.long()
    return index


def _check_rows_of_batch(hidden_states: Any, mask: Any, name: str) -> None:
    """mask: (batch, any) beside hidden_states (batch, seqlen, ...)."""
    for argument, tensor in (("hidden_states", hidden_states), (name, mask)):
        require_tensor(argument, tensor)
    if hidden_states.ndim < 2:
        raise ValueError(
            f"hidden_states has shape {tuple(hidden_states.shape)}: expected (batch, seqlen, ...)"
        )
    if mask.ndim != 2 or mask.shape[0] != hidden_states.shape[0]:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}: expected 2 dims and the batch of "
            f"hidden_states, {hidden_states.shape[0]}"
        )
    require_device(name, mask, hidden_states.device, "hidden_states")
    if mask.is_meta:
        raise ValueError(f"{name} is a meta tensor: packing has to know how many tokens there are")
    if mask.dtype.is_floating_point and mask.dtype.itemsize == 1 or mask.dtype.is_complex:
        raise TypeError(f"{name} has dtype {mask.dtype}: expected bool or numbers")


def _check_mask(hidden_states: Any, mask: Any, name: str) -> None:
    """mask: (batch, seqlen) beside hidden_states (batch, seqlen, ...)."""
    _check_rows_of_batch(hidden_states, mask, name)
    if mask.shape[1] != hidden_states.shape[1]:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}: expected (batch, seqlen) of hidden_states, "
            f"{tuple(hidden_states.shape[:2])}"
        )
