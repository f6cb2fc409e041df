"""FlashAttention-2's extension module: re-exports of `flash_attn_interface.compat.fa2_extension`.

There is no compiled extension. Clients import this to prove that flash-attn works, and call its
functions by position.
"""

from flash_attn_interface.compat.fa2_extension import bwd, fwd, fwd_kvcache, varlen_bwd, varlen_fwd

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]
