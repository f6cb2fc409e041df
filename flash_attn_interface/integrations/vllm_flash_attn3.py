"""FlashAttention-3's functions with sinks, as the Hub's `vllm-flash-attn3` has them.

transformers passes the sinks of gpt-oss, MiMo and kin to a function that has an argument `s_aux`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..api import fa3, kvcache
from ..reference.sinks import apply_sinks


def _with_sinks(function: Callable[..., Any], lse_argument: str) -> Callable[..., Any]:
    """`function` with a last argument s_aux; `lse_argument` asks for softmax_lse."""
    signature = inspect.signature(function)
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    s_aux_parameter = inspect.Parameter("s_aux", keyword_only, default=None)

    @functools.wraps(function)
    def call(*arguments: Any, s_aux: Tensor | None = None, **options: Any) -> Any:
        if s_aux is None:
            return function(*arguments, **options)
        bound = signature.bind(*arguments, **options)
        with_lse = bound.arguments.get(lse_argument, False)
        bound.arguments[lse_argument] = True
        out, softmax_lse, *others = function(*bound.args, **bound.kwargs)
        out, softmax_lse = apply_sinks(out, softmax_lse, s_aux)
        return (out, softmax_lse, *others) if with_lse else out

    # Clients look for the name of the argument.
    parameters = [*signature.parameters.values(), s_aux_parameter]
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return call


flash_attn_func = _with_sinks(fa3.flash_attn_func, "return_attn_probs")
flash_attn_varlen_func = _with_sinks(fa3.flash_attn_varlen_func, "return_attn_probs")
flash_attn_with_kvcache = _with_sinks(kvcache.flash_attn_with_kvcache, "return_softmax_lse")
