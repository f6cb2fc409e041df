"""torch.autocast: the public functions cast float32 inputs as torch's own attention does.

`cast` is called by `autograd.py`, `paged.py` and the kvcache functions. The operations of
`fa2_ops.py` and their like take tensors as they are, as upstream's do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._common.ask.check_tensors import DTYPE_NAMES, autocasts


def cast(*tensors: Any, like: Any = None) -> tuple[Any, ...]:
    """The tensors, those of float32 in the 16-bit dtype that another has, or else in autocast's.

    Nothing is cast where autocast is off, and nothing but float32 ever; casts have gradients.
    like: a tensor that is not cast itself, a cache, and whose dtype comes first.
    """
    floats = [x for x in (like, *tensors) if isinstance(x, Tensor)]
    if not any(x.dtype is torch.float32 for x in floats) or not autocasts(floats[-1]):
        return tensors
    dtype = next(
        (x.dtype for x in floats if x.dtype in DTYPE_NAMES),
        torch.get_autocast_dtype(floats[-1].device.type),
    )
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.dtype is torch.float32 else x for x in tensors
    )
