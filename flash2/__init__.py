"""Attention kernels for sm_80 and up: mma.sync and cp.async. Every GPU since Ampere runs them.

`BACKEND` is what `flash_attn_interface/call/backends.py` loads. Problem -> KernelSpec is
`fwd_tiles.py`, launching is `fwd.py`.
"""

from __future__ import annotations

from .backend import BACKEND

__all__ = ["BACKEND"]
