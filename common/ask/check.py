"""check(call): the one entry of all checks, from a Call to the Problem that it states.

Called by `flash_attn_interface/call/dispatch.py` and by `explain`. The rules stand in `checks.py`
and, of calls over a key and value cache, in `check_kv.py`.
"""

from __future__ import annotations

from .call import Call
from .check_kv import check_cache
from .check_kv_values import check_cache_values
from .checks import check_forward, check_lengths
from .problem import Problem


def check(call: Call) -> Problem:
    """The Problem. TypeError, ValueError or NotImplementedError for a call that states none.

    Reads no memory of a device. Tensors have contiguous last dims.
    """
    return check_forward(call) if call.cache is None else check_cache(call)


def check_values(call: Call, problem: Problem) -> None:
    """Read lengths, indices and tables, and reject those that point outside."""
    if call.cache is None:
        check_lengths(call.tensors, problem)
    else:
        check_cache_values(call, problem)
