"""Attention kernels for Hopper (sm_90a): WGMMA and TMA. Distribution `flash-attn-3`.

Nobody needs to import this: `flash_attn_interface` finds `BACKEND` through the entry point group
`flash_attn_interface.backends` and sends it what it serves. Problem -> KernelSpec is
`fwd_tiles.py`, launching is `fwd.py`; `bwd_tiles.py` and `bwd.py` likewise.
"""

from __future__ import annotations

from pathlib import Path

from .version import RELEASE

# Before anything else is imported, which in another release may be missing or different.
try:
    from flash_attn_interface.version import RELEASE as INTERFACE_RELEASE
except ImportError as error:
    raise ImportError(
        f"flash_attn_3 needs the distribution flash-attn of the same project, which is not "
        f"installed ({error}); the flash-attn of a package index is another one. In the checkout: "
        f"pip install . && cd hopper && pip install ."
    ) from error

if INTERFACE_RELEASE != RELEASE:
    raise ImportError(
        f"flash_attn_3: this is release {RELEASE} of the distribution flash-attn-3, but flash-attn "
        f"is of release {INTERFACE_RELEASE}. Install both from the same checkout."
    )

from flash_attn_interface._common.runtime import source_state

source_state.check(Path(__file__).resolve().parent)

from .backend import BACKEND  # noqa: E402

__all__ = ["BACKEND"]
