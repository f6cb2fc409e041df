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

# ---- rows of a tensor ---------------------------------------------------------------------------


class IndexFirstAxis(torch.autograd.Function):
    """The row gather behind `index_first_axis`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.first_axis_dim = input.shape[0]
        return input.index_select(0, indices)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        zeros = grad_output.new_zeros(ctx.first_axis_dim, *grad_output.shape[1:])
        return zeros.index_add(0, indices, grad_output), None


class IndexPutFirstAxis(torch.autograd.Function):
    """The row scatter behind `index_put_first_axis`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
        ctx.save_for_backward(indices)
        zeros = values.new_zeros(first_axis_dim, *values.shape[1:])
        return zeros.index_copy_(0, indices, values)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        return grad_output.index_select(0, indices), None, None


class IndexFirstAxisResidual(torch.autograd.Function):
    """The row gather behind `index_first_axis_residual`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(indices)
        return input.index_select(0, indices), input.detach()

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

    Raises: TypeError for indices that are no integers; ValueError for wrong shapes or devices.
    """
    _check_rows("input", input)
    gathered: Tensor = IndexFirstAxis.apply(  # type: ignore[no-untyped-call]
        input, _row_indices(indices, input)
    )
    return gathered


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros whose rows `indices` are `values`; differentiable in values.

    Args:
        values: (nnz, ...), any dtype.
        indices: (nnz,), int64 or int32, distinct, each in [0, first_axis_dim).
        first_axis_dim: number of rows of the result.

    Returns: (first_axis_dim, ...), dtype of values.

    Raises: TypeError for indices that are no integers; ValueError for wrong shapes or devices.
    """
    _check_rows("values", values)
    indices = _row_indices(indices, values)
    if values.shape[0] != indices.shape[0]:
        raise ValueError(
            f"values has {values.shape[0]} rows, but indices has {indices.shape[0]} entries: "
            "expected one index per row"
        )
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

    Raises: TypeError for indices that are no integers; ValueError for wrong shapes or devices.
    """
    _check_rows("input", input)
    both: tuple[Tensor, Tensor] = IndexFirstAxisResidual.apply(  # type: ignore[no-untyped-call]
        input, _row_indices(indices, input)
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
        disagree, and for a row whose lengths exceed seqlen.
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
    max_seqlen, longest_row, total, num_samples = torch.stack(
        (numbers[0].max(), numbers[1].max(), numbers[1].sum(), is_sample.sum())
    ).tolist()
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

    Raises: TypeError for indices that are no integers; ValueError for wrong shapes or devices.
    """
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.view(batch, seqlen, *hidden_states.shape[1:])


# ---- helpers ------------------------------------------------------------------------------------

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _true_positions(mask: Tensor, count: int) -> Tensor:
    """nonzero() of the flattened mask, whose `count` true elements are known: no synchronisation.

    The n-th true element is the first one at which the running count reaches n.
    """
    running_count = mask.flatten().cumsum(0)
    return torch.searchsorted(running_count, torch.arange(1, count + 1, device=mask.device))


def _check_rows(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}: expected a torch.Tensor")
    if tensor.ndim == 0:
        raise ValueError(f"{name} is a scalar: expected at least one dim, the rows")


def _row_indices(indices: Any, rows: Tensor) -> Tensor:
    """`indices` as int64."""
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int64, torch.int32):
        kind = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"indices is {kind}: expected an int64 tensor")
    if indices.ndim != 1:
        raise ValueError(f"indices has shape {tuple(indices.shape)}: expected one dim")
    if indices.device != rows.device:
        raise ValueError(
            f"indices is on {indices.device}, the rows are on {rows.device}: expected one device"
        )
    return indices.long()


def _check_rows_of_batch(hidden_states: Any, mask: Any, name: str) -> None:
    """mask: (batch, any) beside hidden_states (batch, seqlen, ...)."""
    for argument, tensor in (("hidden_states", hidden_states), (name, mask)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{argument} is {type(tensor).__name__}: expected a torch.Tensor")
    if hidden_states.ndim < 2:
        raise ValueError(
            f"hidden_states has shape {tuple(hidden_states.shape)}: expected (batch, seqlen, ...)"
        )
    if mask.ndim != 2 or mask.shape[0] != hidden_states.shape[0]:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}: expected 2 dims and the batch of "
            f"hidden_states, {hidden_states.shape[0]}"
        )
    if mask.device != hidden_states.device:
        raise ValueError(
            f"{name} is on {mask.device}, hidden_states on {hidden_states.device}: "
            "expected one device"
        )


def _check_mask(hidden_states: Any, mask: Any, name: str) -> None:
    """mask: (batch, seqlen) beside hidden_states (batch, seqlen, ...)."""
    _check_rows_of_batch(hidden_states, mask, name)
    if mask.shape[1] != hidden_states.shape[1]:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}: expected (batch, seqlen) of hidden_states, "
            f"{tuple(hidden_states.shape[:2])}"
        )
