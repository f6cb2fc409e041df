"""Drop-in for FlashAttention-2: re-exports, no logic. The code is in
`flash_attn_interface/api/fa2.py`."""

from pkgutil import extend_path

from flash_attn_interface.compat.missing_modules import install as _name_what_is_missing

from .flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

# flash-attn-4 installs flash_attn/cute without an __init__ of its own; it may sit beside us.
__path__ = extend_path(__path__, __name__)

_name_what_is_missing()  # in the error of an import of what we do not have

# The interface we implement, not our release: clients compare it with what they support.
__version__ = "2.8.3"

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
