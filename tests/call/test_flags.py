"""A flag is a bool, 0 or 1: text, numbers and tensors, which have a truth value too, are no flags.

FlashAttention-2's order of arguments sent to a FlashAttention-3 function turned `causal` on so.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from wrong_argument_cases import FUNCTIONS, Case

import flash_attn
import flash_attn_interface
from flash_attn_interface.call import fa2_ops

FLAGS = (
    "causal", "deterministic", "return_attn_probs", "return_softmax_lse", "rotary_interleaved",
    "pack_gqa", "is_causal", "return_softmax", "zero_tensors", "interleaved", "inplace",
    "conjugate", "prenorm", "residual_in_fp32", "zero_centered_weight", "is_rms_norm",
    "return_dropout_mask", "inplace_backward", "return_z_loss", "has_softcap", "verbose",
)  # fmt: skip
NO_FLAGS: tuple[Any, ...] = (
    "False", "", [], [0], (), {}, 0.0, 1.0, 0.125, 2, -1, torch.tensor(False), torch.tensor(1),
    np.float32(1), np.int64(1), np.array([True]), object(),
)  # fmt: skip
PAIRS = [(case, name) for case in FUNCTIONS for name in case.parameters() if name in FLAGS]


def test_every_flag_is_known():
    """What has a bool as its default is in the list above."""
    for case in FUNCTIONS:
        function = getattr(case.function, "_init_fn", case.function)
        for name, parameter in inspect.signature(function).parameters.items():
            if isinstance(parameter.default, bool):
                assert name in FLAGS, name


@pytest.mark.parametrize(("case", "name"), PAIRS, ids=[f"{c.name}-{n}" for c, n in PAIRS])
def test_only_bools_are_flags(case: Case, name: str):
    good = case.good()
    case.call({**good, name: False})
    for value in NO_FLAGS:
        with pytest.raises(TypeError, match=rf"\b{name}\b is .*expected a bool"):
            case.call({**case.good(), name: value})


@pytest.mark.parametrize("value", [True, 1, np.bool_(True)], ids=repr)
def test_zero_one_and_numpy_bools_are_flags(value: Any):
    q = torch.randn(1, 5, 2, 16).bfloat16()
    want = flash_attn_interface.flash_attn_func(q, q, q, causal=True)
    assert not torch.equal(want, flash_attn_interface.flash_attn_func(q, q, q, causal=False))
    for function in (flash_attn.flash_attn_func, flash_attn_interface.flash_attn_func):
        assert torch.equal(function(q, q, q, causal=value), want)
    out, *_ = fa2_ops._flash_attn_forward(q, q, q, 0.0, 0.25, value, -1, -1, 0.0, None, False)
    assert torch.equal(out, want)
    assert torch.equal(flash_attn_interface.flash_attn_with_kvcache(q, q, q, causal=value), want)


@pytest.mark.filterwarnings("ignore:softmax_scale=0.0")
def test_fa2_order_sent_to_fa3_says_so():
    """flash_attn_func(q, k, v, dropout_p, softmax_scale): the scale became causal."""
    q = torch.randn(1, 5, 2, 16).bfloat16()
    with pytest.raises(TypeError, match="causal is 0.125: .*dropout_p, softmax_scale, causal.*"):
        flash_attn_interface.flash_attn_func(q, q, q, 0.0, 0.125)


def test_a_meta_tensor_among_others_is_no_uninitialised_memory():
    """torch asks the fake for the result of an operation if any argument is a meta tensor."""
    q = torch.randn(1, 5, 2, 16).bfloat16()
    meta = q.to("meta")
    options = (0.0, 0.25, False, -1, -1, 0.0, None, False)
    for position, name in enumerate("kv", start=1):
        tensors = [q, q, q]
        tensors[position] = meta
        with pytest.raises(ValueError, match=f"{name} is on meta but q is on cpu"):
            fa2_ops._flash_attn_forward(*tensors, *options)
        with pytest.raises(ValueError, match=f"{name} is on meta but q is on cpu"):
            flash_attn_interface._flash_attn_forward(*tensors)
    out, lse, *_ = fa2_ops._flash_attn_forward(q, q, q, *options)
    with pytest.raises(ValueError, match="dout is on meta but q is on cpu"):
        fa2_ops._flash_attn_backward(
            meta, q, q, q, out, lse, None, None, None, *options[:6], None, False
        )
    assert fa2_ops._flash_attn_forward(meta, meta, meta, *options)[0].is_meta
