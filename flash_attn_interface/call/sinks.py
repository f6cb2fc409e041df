"""Attention sinks: which way a call with `s_aux` takes. Called by `autograd.py` and its like.

Where nothing records or watches the call, the kernels end their rows with the sinks. Any other call
is the one without sinks, and `apply_sinks` on its results: then gradients reach q, k, v and s_aux
through out and softmax_lse, and compilers and subclasses see PyTorch's operations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._common.ask.call import Call
from ..reference.sinks import apply_sinks
from .backends import ForwardResult
from .sharding import on_one_mesh
from .watchers import all_plain


def takes_no_gradient(s_aux: Tensor) -> bool:
    """Whether kernels may take it as it is: it is plain, and nothing asks for its gradient."""
    return all_plain(s_aux) and not (torch.is_grad_enabled() and s_aux.requires_grad)


def for_kernels(call: Call) -> Call:
    """The call with sinks as kernels read them: float32, contiguous."""
    tensors = call.tensors
    assert tensors.s_aux is not None
    s_aux = tensors.s_aux.float().contiguous()
    return call._replace(tensors=tensors._replace(s_aux=s_aux))


def composed(call: Call, attention: Callable[[Call], ForwardResult]) -> ForwardResult:
    """The results of `attention` without sinks, then with them."""
    tensors, options = call.tensors, call.options
    without = call._replace(
        tensors=tensors._replace(s_aux=None), options=options._replace(return_lse=True)
    )
    out, softmax_lse, s_dmask = attention(without)
    assert softmax_lse is not None
    out, softmax_lse, s_aux = on_one_mesh((out, softmax_lse, tensors.s_aux))
    out, softmax_lse = apply_sinks(out, softmax_lse, s_aux)
    return out, softmax_lse if options.return_lse else None, s_dmask
