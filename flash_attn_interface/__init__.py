"""Exact attention for any pair of head dims: FlashAttention-3's functions, on Ampere and newer
GPUs.

`flash_attn` has FlashAttention-2's. `python -m flash_attn_interface` shows and checks an
installation.
"""

from .explain import explain
from .f3b2 import flash_attn_f3b2_func, flash_attn_f3b2_varlen_func
from .functions import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func
from .simulation import simulate
from .version import __version__

__all__ = [
    "__version__",
    "explain",
    "flash_attn_f3b2_func",
    "flash_attn_f3b2_varlen_func",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "simulate",
]
