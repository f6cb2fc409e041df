"""Which kernel a block speaks to. `union.py` describes blocks."""

from __future__ import annotations

from typing import Literal

# forward: fwd.cu of a tree. backward: its bwd.cu. decode: flash2/decode.cu; of a backend, attention
# over a key and value cache, which flash2/fwd.cu may serve too.
Direction = Literal["forward", "backward", "decode"]
