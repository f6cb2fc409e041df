"""Attention kernels for Hopper (sm_90a): WGMMA and TMA. Distribution `flash-attn-3`.

Nobody needs to import this: `flash_attn_interface` finds `BACKEND` through the entry point group
`flash_attn_interface.backends` and sends it what it serves. Problem -> KernelSpec is `tiles.py`,
launching is `fwd.py`.
"""

from __future__ import annotations

from flash_attn_interface.version import RELEASE as INTERFACE_RELEASE

from .version import RELEASE

# Before anything else is imported, which in another release may be missing or different.
if INTERFACE_RELEASE != RELEASE:
    raise ImportError(
        f"flash_attn_3: this is release {RELEASE} of the distribution flash-attn-3, but flash-attn "
        f"is of release {INTERFACE_RELEASE}. Install both from the same checkout."
    )

from .backend import BACKEND

__all__ = ["BACKEND"]
