"""Attention kernels for Hopper (sm_90a): WGMMA and TMA. Distribution `flash-attn-3`.

Nobody needs to import this: `flash_attn_interface` finds `BACKEND` through the entry point group
`flash_attn_interface.backends` and sends it what it serves. Problem -> KernelSpec is `tiles.py`,
launching is `fwd.py`.
"""

from __future__ import annotations

from .backend import BACKEND

__all__ = ["BACKEND"]
