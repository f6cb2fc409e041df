"""FlashAttention-3's functions, as the Hub's `vllm-flash-attn3` has them.

transformers passes the sinks of gpt-oss, MiMo and kin to a function that has an argument `s_aux`.
"""

from __future__ import annotations

from ..api.fa3 import flash_attn_func, flash_attn_varlen_func
from ..api.kvcache import flash_attn_with_kvcache

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
