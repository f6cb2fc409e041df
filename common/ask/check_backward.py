"""User errors of the private backward operations, whose callers bring every tensor themselves.

Called by `flash_attn_interface/call/dispatch.py` once per new combination, like `checks.py`, which
has checked q, k, v and the options by then.
"""

from __future__ import annotations

import torch

from .call import Backward, Call
from .check_overlap import check_outputs
from .check_tensors import require_device, require_shape, require_tensor
from .problem import Problem


def check_backward(problem: Problem, call: Call, tensors: Backward) -> None:
    """That the tensors fit the problem of the call."""
    q, k, v = call.tensors[:3]
    out_shape = (*q.shape[:-1], problem.head_dim_v)
    of_lse = "the queries and heads of q"
    expected: dict[str, tuple[tuple[int, ...], torch.dtype, str]] = {
        "dout": (out_shape, q.dtype, "that of q with the head_dim of v"),
        "out": (out_shape, q.dtype, "that of q with the head_dim of v"),
        "softmax_lse": (problem.lse_shape, torch.float32, of_lse),
        "dlse": (problem.lse_shape, torch.float32, of_lse),
        "dq": (tuple(q.shape), q.dtype, "that of q"),
        "dk": (tuple(k.shape), q.dtype, "that of k"),
        "dv": (tuple(v.shape), q.dtype, "that of v"),
        "rng_state": ((2,), torch.int64, "as the forward returned it"),
    }
    if problem.dropout and tensors.rng_state is None:
        raise ValueError(
            "rng_state is None: with dropout_p > 0 pass the one that the forward returned"
        )
    for name, (shape, dtype, why) in expected.items():
        tensor = getattr(tensors, name)
        if tensor is not None:
            require_tensor(name, tensor)
            if tensor.dtype != dtype:
                raise TypeError(f"{name} has dtype {tensor.dtype}: expected {dtype}, by that of q")
            require_shape(name, tensor, shape, why)
            require_device(name, tensor, q.device)


_MAX_KNOWN = 4096
_known: set[tuple[object, ...]] = set()  # addresses and layouts of gradients found to be apart


def check_gradients(call: Call, backward: Backward) -> None:
    """That these are tensors, and that dq, dk and dv, which the caller brings, overlap nothing, at
    the price of a look-up where addresses come again."""
    q, k, v = call.tensors[:3]
    dout, out, softmax_lse, dq, dk, dv = backward[:6]
    tensors = {
        "q": q, "k": k, "v": v, "dout": dout, "out": out, "softmax_lse": softmax_lse, "dq": dq,
        "dk": dk, "dv": dv,
    }  # fmt: skip
    for name, tensor in tensors.items():
        require_tensor(name, tensor)
    key = (
        q.data_ptr(), k.data_ptr(), v.data_ptr(), dout.data_ptr(), out.data_ptr(),
        softmax_lse.data_ptr(), dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), q.stride(), k.stride(),
        v.stride(), dout.stride(), out.stride(), dq.stride(), dk.stride(), dv.stride(), q.shape,
        k.shape, v.shape,
    )  # fmt: skip
    if key in _known:
        return
    check_outputs(
        {"dq": dq, "dk": dk, "dv": dv},
        {"q": q, "k": k, "v": v, "dout": dout, "out": out, "softmax_lse": softmax_lse},
    )
    if len(_known) >= _MAX_KNOWN:
        _known.clear()
    _known.add(key)
