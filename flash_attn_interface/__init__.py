"""Exact attention for any pair of head dims: FlashAttention-3's functions, on Ampere and newer
GPUs.

`flash_attn` has FlashAttention-2's. `python -m flash_attn_interface` shows and checks an
installation.
"""

from .api.combine import flash_attn_combine
from .api.f3b2 import flash_attn_f3b2_func, flash_attn_f3b2_varlen_func
from .api.fa3 import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func
from .api.kvcache import flash_attn_with_kvcache, get_scheduler_metadata
from .call.flops import register as _register_flop_formulas
from .call.simulation import simulate
from .compat.fa3_library import register_where_hopper_is_installed
from .compat.fa3_ops import _flash_attn_backward, _flash_attn_forward
from .tools.explain import explain
from .tools.explain_kv import explain_with_kvcache
from .version import __version__

__all__ = [
    "__version__",
    "_flash_attn_backward",
    "_flash_attn_forward",
    "explain",
    "explain_with_kvcache",
    "flash_attn_combine",
    "flash_attn_f3b2_func",
    "flash_attn_f3b2_varlen_func",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "simulate",
]

_register_flop_formulas()
# PyTorch imports this package and then looks for torch.ops.flash_attn_3.fwd.
register_where_hopper_is_installed()
