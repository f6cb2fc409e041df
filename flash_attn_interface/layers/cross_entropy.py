"""Cross entropy with FlashAttention-2's signatures, in plain PyTorch: `flash_attn.losses` and
`flash_attn.ops.triton.cross_entropy` re-export it.

It has nothing to do with attention: training code imports it wherever it finds flash_attn. Logits
are converted to float32, which upstream's Triton kernel avoids.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .._common.ask.check_tensors import (
    require_device,
    require_floating,
    require_shape,
    require_tensor,
)
from .._common.ask.check_values import flag, integer, real, shown
from ..call.watchers import readable


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Losses of rows, differentiable.

    Args:
        logits: (batch, vocab_size), any floating-point dtype.
        labels: (batch,), integers below vocab_size, or ignore_index.
        precomputed_lse: float (batch,), a saving of upstream's kernel, accepted and not used.
        inplace_backward: likewise.
        label_smoothing: as in torch.nn.functional.cross_entropy.
        logit_scale: multiplies the logits.
        lse_square_scale: c adds c * logsumexp(logits) ** 2 to the loss ("z-loss").
        process_group: must be None.

    Returns:
        (losses, z_losses), float32 (batch,). z_losses is the part due to lse_square_scale, which
        losses contains, and is not differentiable. Both are 0 where the label is ignore_index.

    Raises:
        TypeError: an argument's type or dtype is wrong.
        ValueError: shapes or devices disagree, or a number is out of range. The values of labels
            are checked for CPU tensors.
        NotImplementedError: process_group is given.
    """
    _check(logits, labels, precomputed_lse)
    label_smoothing = _smoothing(label_smoothing)
    logit_scale = real("logit_scale", logit_scale)
    lse_square_scale = real("lse_square_scale", lse_square_scale)
    ignore_index = _ignore_index(ignore_index)
    flag("inplace_backward", inplace_backward)
    if process_group is not None:
        raise NotImplementedError(
            "process_group is not supported: logits whose vocabulary is divided among ranks have "
            "no cross entropy here. Gather them first, or use "
            "torch.distributed.tensor.parallel.loss_parallel."
        )
    if not is_compiling() and readable(labels):
        _check_labels(labels, ignore_index, logits.shape[1])
    scaled = logits.float() * logit_scale
    losses = nn.functional.cross_entropy(
        scaled,
        labels.long(),
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    if lse_square_scale == 0.0:
        return losses, torch.zeros_like(losses)
    z_losses = lse_square_scale * torch.logsumexp(scaled, -1).square()
    z_losses = z_losses.masked_fill(labels == ignore_index, 0.0)
    return losses + z_losses, z_losses.detach()


class CrossEntropyLoss(nn.Module):
    """`cross_entropy_loss` as a module."""

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: Any = None,
        return_z_loss: bool = False,
    ) -> None:
        """reduction: "mean" over the labels that are not ignored, "sum" or "none".

        return_z_loss: forward returns (loss, z_loss). Others as in `cross_entropy_loss`.

        Raises: TypeError, ValueError for wrong arguments; NotImplementedError for another
        reduction, as upstream's.
        """
        super().__init__()
        if not isinstance(reduction, str) or reduction not in ("mean", "none", "sum"):
            raise NotImplementedError(
                f"reduction is {shown(reduction)}: expected 'mean', 'none', 'sum'"
            )
        self.ignore_index = _ignore_index(ignore_index)
        self.reduction = reduction
        self.label_smoothing = _smoothing(label_smoothing)
        self.logit_scale = real("logit_scale", logit_scale)
        self.lse_square_scale = real("lse_square_scale", lse_square_scale)
        self.inplace_backward = flag("inplace_backward", inplace_backward)
        self.process_group = process_group
        self.return_z_loss = flag("return_z_loss", return_z_loss)

    def forward(
        self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """input: (batch, vocab_size) logits; target: (batch,) labels. Raises as
        `cross_entropy_loss`."""
        _check(input, target, precomputed_lse, "input", "target")
        if not is_compiling() and readable(target):
            _check_labels(target, self.ignore_index, input.shape[1], "target")
        losses, z_losses = cross_entropy_loss(
            input,
            target,
            precomputed_lse=precomputed_lse,
            label_smoothing=self.label_smoothing,
            logit_scale=self.logit_scale,
            lse_square_scale=self.lse_square_scale,
            ignore_index=self.ignore_index,
            inplace_backward=self.inplace_backward,
            process_group=self.process_group,
        )
        loss, z_loss = (self._reduced(each, target) for each in (losses, z_losses))
        return (loss, z_loss) if self.return_z_loss else loss

    def _reduced(self, losses: Tensor, target: Tensor) -> Tensor:
        if self.reduction == "none":
            return losses
        total = losses.sum()
        return total if self.reduction == "sum" else total / (target != self.ignore_index).sum()


def _check(
    logits: Any,
    labels: Any,
    precomputed_lse: Any,
    name_logits: str = "logits",
    name_labels: str = "labels",
) -> None:
    require_floating(name_logits, logits)
    if logits.ndim != 2:
        raise ValueError(
            f"{name_logits} has shape {tuple(logits.shape)}: expected (batch, vocab_size)"
        )
    require_tensor(name_labels, labels)
    if labels.dtype not in _INTEGERS:
        raise TypeError(f"{name_labels} has dtype {labels.dtype}: expected integers")
    given = [(name_labels, labels)]
    if precomputed_lse is not None:
        require_floating("precomputed_lse", precomputed_lse)
        given.append(("precomputed_lse", precomputed_lse))
    for name, tensor in given:
        require_shape(name, tensor, logits.shape[:1], f"the batch of {name_logits}")
        require_device(name, tensor, logits.device, name_logits)


def _check_labels(labels: Tensor, ignore_index: int, vocab_size: int, name: str = "labels") -> None:
    """Of labels that can be read without waiting."""
    labels = labels.long()
    known = (labels == ignore_index) | ((labels >= 0) & (labels < vocab_size))
    if not bool(known.all()):
        raise ValueError(
            f"{name} has {int(labels[~known][0])}: expected ignore_index ({ignore_index}) or 0 to "
            f"{vocab_size - 1}, the columns of the logits (input)"
        )


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _smoothing(value: Any) -> float:
    number = real("label_smoothing", value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"label_smoothing is {number}: expected 0 to 1")
    return number


def _ignore_index(value: Any) -> int:
    index = integer("ignore_index", value)
    if not -(2**63) <= index < 2**63:
        raise ValueError(f"ignore_index is {index}: no label has that value")
    return index
