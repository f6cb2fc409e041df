"""FlashAttention-2's module of this name: re-exports of `flash_attn_interface.layers.rotary` and
`flash_attn_interface.layers.rotary_embedding`."""

from flash_attn_interface.layers.rotary import (
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
)
from flash_attn_interface.layers.rotary_embedding import RotaryEmbedding

__all__ = [
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
]
