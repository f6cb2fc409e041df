"""FlashAttention-2's module of this name: a re-export of
`flash_attn_interface.layers.cross_entropy`."""

from flash_attn_interface.layers.cross_entropy import CrossEntropyLoss

__all__ = ["CrossEntropyLoss"]
