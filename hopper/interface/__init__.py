"""Installed as `flash_attn_3.flash_attn_interface`: the objects of the package
`flash_attn_interface`, not copies, under the other name by which clients import them.

The folder has another name than the package, so that Python started in `hopper/` finds the right
`flash_attn_interface`.
"""

from flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    flash_attn_combine,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
)

__all__ = [
    "_flash_attn_backward",
    "_flash_attn_forward",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]
