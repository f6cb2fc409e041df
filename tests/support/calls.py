"""Calls the public function that serves a case.

FlashAttention-2's for dropout and ALiBi, else FlashAttention-3's.
"""

from __future__ import annotations

from typing import Any

import torch
from cases import Case
from conftest import Runner
from inputs import Inputs
from torch import Tensor

import flash_attn
import flash_attn_interface


def forward(
    runner: Runner,
    case: Case,
    inputs: Inputs,
    return_attn_probs: bool = True,
    **hints: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, softmax_lse, s_dmask); what the call does not return is None.

    hints: further arguments of FlashAttention-3's functions.
    """
    qkv = (inputs.q, inputs.k, inputs.v)
    options: dict[str, Any] = {
        "softmax_scale": case.softmax_scale,
        "causal": case.causal,
        "window_size": case.window_size,
        "softcap": case.softcap,
        "return_attn_probs": return_attn_probs,
    }
    lengths = {
        "cu_seqlens_q": inputs.cu_seqlens_q,
        "cu_seqlens_k": inputs.cu_seqlens_k,
        "max_seqlen_q": inputs.max_seqlen_q,
        "max_seqlen_k": inputs.max_seqlen_k,
    }
    if case.alibi or case.dropout_p > 0.0:
        assert not (case.attention_chunk or case.seqused_q or case.seqused_k), (
            "no function has both"
        )
        options |= {"alibi_slopes": inputs.alibi_slopes, "dropout_p": case.dropout_p}
        function = flash_attn.flash_attn_varlen_func if case.varlen else flash_attn.flash_attn_func
    else:
        options |= {"attention_chunk": case.attention_chunk, **hints}
        if case.varlen:
            lengths |= {"seqused_q": inputs.seqused_q, "seqused_k": inputs.seqused_k}
        module = flash_attn_interface
        function = module.flash_attn_varlen_func if case.varlen else module.flash_attn_func
    if case.varlen:
        options |= lengths
    result = runner.call(function, *qkv, **options)
    if not return_attn_probs:
        return result, None, None
    return (*result, None)[:3]


def draw_rng_state(device: torch.device) -> Tensor:
    """The (seed, offset) that the next dropout call draws after the same torch.manual_seed."""
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)
