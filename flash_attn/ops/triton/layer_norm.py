"""FlashAttention-2's module of this name: re-exports of
`flash_attn_interface.layers.layer_norm`."""

from flash_attn_interface.layers.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn

__all__ = ["RMSNorm", "layer_norm_fn", "rms_norm_fn"]
