"""Cross entropy with FlashAttention-2's signatures, in plain PyTorch: `flash_attn.losses` and
`flash_attn.ops.triton.cross_entropy` re-export it.

It has nothing to do with attention: training code imports it wherever it finds flash_attn. Logits
are converted to float32, which upstream's Triton kernel avoids.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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
        precomputed_lse, inplace_backward: savings of upstream's kernel, accepted and not used.
        label_smoothing: as in torch.nn.functional.cross_entropy.
        logit_scale: multiplies the logits.
        lse_square_scale: c adds c * logsumexp(logits) ** 2 to the loss ("z-loss").
        process_group: must be None.

    Returns:
        (losses, z_losses), float32 (batch,). z_losses is the part due to lse_square_scale, which
        losses contains, and is not differentiable. Both are 0 where the label is ignore_index.

    Raises:
        NotImplementedError: process_group is given.
    """
    if process_group is not None:
        raise NotImplementedError(
            "process_group is not supported: logits whose vocabulary is divided among ranks have "
            "no cross entropy here. Gather them first, or use "
            "torch.distributed.tensor.parallel.loss_parallel."
        )
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
        """
        super().__init__()
        if reduction not in ("mean", "none", "sum"):
            raise NotImplementedError(f"reduction is {reduction!r}: expected 'mean', 'none', 'sum'")
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.inplace_backward = inplace_backward
        self.process_group = process_group
        self.return_z_loss = return_z_loss

    def forward(
        self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """input: (batch, vocab_size) logits; target: (batch,) labels."""
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
