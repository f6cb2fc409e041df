"""FlashAttention-2's module of this name: a re-export of `flash_attn_interface.layers.rotary`."""

from flash_attn_interface.layers.rotary import apply_rotary

__all__ = ["apply_rotary"]
