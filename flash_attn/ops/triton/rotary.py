"""FlashAttention-2's module of this name: a re-export of `flash_attn_interface.rotary`."""

from flash_attn_interface.rotary import apply_rotary

__all__ = ["apply_rotary"]
