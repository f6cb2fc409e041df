"""The public functions with arguments that are right, for test_wrong_arguments.py."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import flash_attn
import flash_attn_interface as fa3
from flash_attn import bert_padding
from flash_attn.flash_attn_interface import flash_attn_gpu
from flash_attn.layers import rotary
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
from flash_attn.ops.triton.rotary import apply_rotary
from flash_attn_interface.call import fa2_ops
from flash_attn_interface.reference.sinks import apply_sinks

BF16 = torch.bfloat16

# Other names of the same: views of a packed tensor, FlashAttention-2's and -3's names.
ALSO_NAMED = {
    "softmax_lse": ("lse",),
    "block_table": ("page_table",),
    "seqlens_rotary": ("rotary_seqlens",),
    "kv_batch_idx": ("cache_batch_idx",),
    "leftpad_k": ("cache_leftpad",),
    "window_size_left": ("window_size",),
    "window_size_right": ("window_size",),
    "qkv": ("q", "k", "v"),
    "kv": ("k", "v"),
    "cu_seqlens": ("cu_seqlens_q", "cu_seqlens_k"),
    "max_seqlen": ("max_seqlen_q", "max_seqlen_k"),
    "k_new": ("k",),
    "v_new": ("v",),
    "sequed_q": ("seqused_q",),
    "sequed_k": ("seqused_k",),
    "seqlen_offset": ("seqlen_offsets",),
    "k": ("k_cache",),  # of a private function that serves caches too
    "v": ("v_cache",),
    "seqused_k": ("cache_seqlens",),
}


@dataclass(frozen=True)
class Case:
    """A function, and how to make arguments for it, by name, that it accepts."""

    name: str
    function: Callable[..., Any]
    good: Callable[[], dict[str, Any]]
    positional: bool = False  # it takes no keywords

    def parameters(self) -> list[str]:
        return [
            name
            for name, parameter in inspect.signature(self._plain()).parameters.items()
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]

    def call(self, arguments: dict[str, Any]) -> Any:
        if not self.positional:
            return self.function(**arguments)
        names = self.parameters()
        return self.function(*(arguments[name] for name in names))

    def _plain(self) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(self.function, "_init_fn", self.function)
        return function


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape).to(dtype)


def dense() -> dict[str, Any]:
    return {
        "q": normal(2, 3, 4, 16), "k": normal(2, 5, 2, 16), "v": normal(2, 5, 2, 24),
    }  # fmt: skip


def ragged() -> dict[str, Any]:
    return {
        "q": normal(5, 4, 16), "k": normal(7, 2, 16), "v": normal(7, 2, 24),
        "cu_seqlens_q": ints(0, 2, 5), "cu_seqlens_k": ints(0, 3, 7),
        "max_seqlen_q": 3, "max_seqlen_k": 4,
    }  # fmt: skip


def packed(*names: str) -> dict[str, Any]:
    arguments = ragged()
    return {name: arguments[name] for name in names}


def paged_varlen() -> dict[str, Any]:
    pages = {"k": normal(4, 4, 2, 16), "v": normal(4, 4, 2, 24), "block_table": ints(0, 1)[:, None]}
    return {**ragged(), **pages}


def cache() -> dict[str, Any]:
    return {
        "q": normal(2, 1, 4, 32), "k_cache": normal(2, 8, 2, 32), "v_cache": normal(2, 8, 2, 48),
        "k": normal(2, 1, 2, 32), "v": normal(2, 1, 2, 48), "cache_seqlens": ints(3, 5),
        "rotary_cos": normal(8, 8), "rotary_sin": normal(8, 8), "cache_batch_idx": ints(1, 0),
        "cache_leftpad": ints(0, 1),
    }  # fmt: skip


def paged_cache(table: str) -> dict[str, Any]:
    pages = {"k_cache": normal(4, 4, 2, 32), "v_cache": normal(4, 4, 2, 48)}
    shared = {name: x for name, x in cache().items() if name in ("q", "k", "v", "cache_seqlens")}
    return {**shared, **pages, table: ints(0, 1, 2, 3).view(2, 2)}


def ragged_cache() -> dict[str, Any]:
    return {
        **paged_cache("page_table"), "q": normal(3, 4, 32), "cu_seqlens_q": ints(0, 1, 3),
        "max_seqlen_q": 2, "k": normal(3, 2, 32), "v": normal(3, 2, 48),
        "cu_seqlens_k_new": ints(0, 1, 3), "rotary_cos": normal(8, 8), "rotary_sin": normal(8, 8),
        "rotary_seqlens": ints(0, 1),
        "scheduler_metadata": torch.zeros(3, dtype=torch.int32),
    }  # fmt: skip


OPTIONS = {
    "dropout_p": 0.0, "softmax_scale": 0.25, "causal": False, "window_size_left": -1,
    "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None,
}  # fmt: skip


def fa2_private(arguments: dict[str, Any]) -> dict[str, Any]:
    return {**arguments, **OPTIONS, "return_softmax": False}


def gradients(arguments: dict[str, Any]) -> dict[str, Any]:
    """Everything of a backward but its options."""
    if "cu_seqlens_q" in arguments:
        forward = fa2_ops._flash_attn_varlen_forward
    else:
        forward = fa2_ops._flash_attn_forward
    out, softmax_lse, *_ = forward(**fa2_private(arguments))
    q, k, v = (arguments[name] for name in "qkv")
    made = {f"d{name}": torch.empty_like(x) for name, x in (("q", q), ("k", k), ("v", v))}
    return {**arguments, **made, "dout": torch.randn_like(out), "out": out,
            "softmax_lse": softmax_lse}  # fmt: skip


def fa2_backward(arguments: dict[str, Any]) -> dict[str, Any]:
    return {**gradients(arguments), **OPTIONS, "deterministic": False, "rng_state": None}


def extension(arguments: dict[str, Any]) -> dict[str, Any]:
    """All parameters of the raw functions, which have no defaults."""
    none = dict.fromkeys(("out", "seqused_k", "leftpad_k", "block_table", "generator"))
    numbers = {"zero_tensors": False, "return_softmax": False, "num_splits": 0}
    return {**none, **OPTIONS, **numbers, **arguments}


def extension_backward(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"zero_tensors": False, "generator": None, **fa2_backward(arguments)}


def extension_cache() -> dict[str, Any]:
    none = dict.fromkeys(("block_table", "out"))
    return {**none, **OPTIONS, "rotary_interleaved": True, "num_splits": 0, **cache()}


def tables() -> dict[str, Any]:
    return {"cos": torch.rand(6, 4), "sin": torch.rand(6, 4)}


def hidden() -> dict[str, Any]:
    return {"hidden_states": normal(2, 4, 3), "attention_mask": torch.ones(2, 4, dtype=torch.int64)}


def norms() -> dict[str, Any]:
    return {"x": normal(2, 3, 8), "weight": torch.ones(8), "bias": torch.zeros(8),
            "residual": normal(2, 3, 8)}  # fmt: skip


def logits() -> dict[str, Any]:
    return {"logits": torch.randn(4, 7), "labels": torch.tensor([0, 3, 6, -100])}


def partials() -> dict[str, Any]:
    return {"out_partial": torch.randn(3, 2, 4, 2, 8), "lse_partial": torch.randn(3, 2, 4, 2),
            "out": torch.empty(2, 4, 2, 8)}  # fmt: skip


def metadata() -> dict[str, Any]:
    return {"batch_size": 2, "max_seqlen_q": 1, "max_seqlen_k": 8, "num_heads_q": 4,
            "num_heads_kv": 2, "headdim": 32, "cache_seqlens": ints(3, 5)}  # fmt: skip


def shapes() -> dict[str, Any]:
    return {"q": (2, 3, 4, 16), "k": (2, 5, 2, 16), "v": (2, 5, 2, 24)}


FUNCTIONS = [
    Case("flash_attn.flash_attn_func", flash_attn.flash_attn_func, dense),
    Case("flash_attn.flash_attn_kvpacked_func", flash_attn.flash_attn_kvpacked_func,
         lambda: {"q": normal(2, 3, 4, 16), "kv": normal(2, 5, 2, 2, 16)}),
    Case("flash_attn.flash_attn_qkvpacked_func", flash_attn.flash_attn_qkvpacked_func,
         lambda: {"qkv": normal(2, 3, 3, 4, 16)}),
    Case("flash_attn.flash_attn_varlen_func", flash_attn.flash_attn_varlen_func, ragged),
    Case("flash_attn.flash_attn_varlen_func-paged", flash_attn.flash_attn_varlen_func,
         paged_varlen),
    Case("flash_attn.flash_attn_varlen_kvpacked_func", flash_attn.flash_attn_varlen_kvpacked_func,
         lambda: {**packed("q", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
                  "kv": normal(7, 2, 2, 16)}),
    Case("flash_attn.flash_attn_varlen_qkvpacked_func", flash_attn.flash_attn_varlen_qkvpacked_func,
         lambda: {"qkv": normal(5, 3, 4, 16), "cu_seqlens": ints(0, 2, 5), "max_seqlen": 3}),
    Case("flash_attn.flash_attn_with_kvcache", flash_attn.flash_attn_with_kvcache, cache),
    Case("flash_attn.flash_attn_with_kvcache-paged", flash_attn.flash_attn_with_kvcache,
         lambda: paged_cache("block_table")),
    Case("flash_attn_func", fa3.flash_attn_func, dense),
    Case("flash_attn_varlen_func", fa3.flash_attn_varlen_func,
         lambda: {**ragged(), "seqused_q": ints(1, 2), "seqused_k": ints(2, 3)}),
    Case("flash_attn_qkvpacked_func", fa3.flash_attn_qkvpacked_func,
         lambda: {"qkv": normal(2, 3, 8, 16), "num_heads_q": 4}),
    Case("flash_attn_f3b2_func", fa3.flash_attn_f3b2_func, dense),
    Case("flash_attn_f3b2_varlen_func", fa3.flash_attn_f3b2_varlen_func, ragged),
    Case("flash_attn_with_kvcache", fa3.flash_attn_with_kvcache, cache),
    Case("flash_attn_with_kvcache-ragged", fa3.flash_attn_with_kvcache, ragged_cache),
    Case("flash_attn_combine", fa3.flash_attn_combine, partials),
    Case("get_scheduler_metadata", fa3.get_scheduler_metadata, metadata),
    Case("explain", fa3.explain, dense),
    Case("explain-shapes", fa3.explain, shapes),
    Case("explain_with_kvcache", fa3.explain_with_kvcache, cache),
    Case("_flash_attn_forward-fa2", fa2_ops._flash_attn_forward, lambda: fa2_private(dense())),
    Case("_flash_attn_varlen_forward", fa2_ops._flash_attn_varlen_forward,
         lambda: {**fa2_private(ragged()), "seqused_k": ints(2, 3), "leftpad_k": ints(0, 1)}),
    Case("_flash_attn_varlen_forward-paged", fa2_ops._flash_attn_varlen_forward,
         lambda: fa2_private(paged_varlen())),
    Case("_flash_attn_backward-fa2", fa2_ops._flash_attn_backward,
         lambda: fa2_backward(dense())),
    Case("_flash_attn_varlen_backward", fa2_ops._flash_attn_varlen_backward,
         lambda: fa2_backward(ragged())),
    Case("_flash_attn_forward-fa3", fa3._flash_attn_forward, dense),
    Case("_flash_attn_forward-fa3-varlen", fa3._flash_attn_forward, ragged),
    Case("_flash_attn_backward-fa3", fa3._flash_attn_backward, lambda: gradients(dense())),
    Case("_flash_attn_backward-fa3-varlen", fa3._flash_attn_backward, lambda: gradients(ragged())),
    Case("flash_attn_2_cuda.fwd", flash_attn_gpu.fwd, lambda: extension(dense()), positional=True),
    Case("flash_attn_2_cuda.varlen_fwd", flash_attn_gpu.varlen_fwd, lambda: extension(ragged()),
         positional=True),
    Case("flash_attn_2_cuda.bwd", flash_attn_gpu.bwd, lambda: extension_backward(dense()),
         positional=True),
    Case("flash_attn_2_cuda.varlen_bwd", flash_attn_gpu.varlen_bwd,
         lambda: extension_backward(ragged()), positional=True),
    Case("flash_attn_2_cuda.fwd_kvcache", flash_attn_gpu.fwd_kvcache, extension_cache,
         positional=True),
    Case("apply_rotary_emb", rotary.apply_rotary_emb,
         lambda: {"x": normal(2, 5, 3, 16), **tables()}),
    Case("apply_rotary_emb-packed", rotary.apply_rotary_emb,
         lambda: {"x": normal(5, 3, 16), **tables(), "cu_seqlens": ints(0, 2, 5), "max_seqlen": 3,
                  "seqlen_offsets": ints(1, 2)}),
    Case("apply_rotary", apply_rotary, lambda: {"x": normal(2, 5, 3, 16), **tables()}),
    Case("apply_rotary_emb_qkv_", rotary.apply_rotary_emb_qkv_,
         lambda: {"qkv": normal(2, 5, 8, 16), **tables(), "num_heads_q": 4,
                  "cos_k": torch.rand(6, 4), "sin_k": torch.rand(6, 4)}),
    Case("apply_rotary_emb_kv_", rotary.apply_rotary_emb_kv_,
         lambda: {"kv": normal(2, 5, 2, 3, 16), **tables()}),
    Case("apply_rotary_emb_torch", rotary.apply_rotary_emb_torch,
         lambda: {"x": normal(2, 6, 3, 16), **tables()}),
    Case("RotaryEmbedding", rotary.RotaryEmbedding, lambda: {"dim": 8}),
    Case("RotaryEmbedding.forward", rotary.RotaryEmbedding(8).forward,
         lambda: {"qkv": normal(2, 5, 3, 2, 16)}),
    Case("RotaryEmbedding.forward-kv", rotary.RotaryEmbedding(8, scale_base=512).forward,
         lambda: {"qkv": normal(2, 5, 2, 16), "kv": normal(2, 5, 2, 2, 16)}),
    Case("unpad_input", bert_padding.unpad_input, hidden),
    Case("unpad_input_for_concatenated_sequences",
         bert_padding.unpad_input_for_concatenated_sequences,
         lambda: {"hidden_states": normal(2, 4, 3),
                  "attention_mask_in_length": torch.tensor([[1, 2, 0, 0], [3, 0, 0, 0]])}),
    Case("pad_input", bert_padding.pad_input,
         lambda: {"hidden_states": normal(3, 5), "indices": torch.tensor([0, 2, 5]), "batch": 2,
                  "seqlen": 4}),
    Case("index_first_axis", bert_padding.index_first_axis,
         lambda: {"input": normal(6, 5), "indices": torch.tensor([0, 2, 5])}),
    Case("index_first_axis_residual", bert_padding.index_first_axis_residual,
         lambda: {"input": normal(6, 5), "indices": torch.tensor([0, 2, 5])}),
    Case("index_put_first_axis", bert_padding.index_put_first_axis,
         lambda: {"values": normal(3, 5), "indices": torch.tensor([0, 2, 5]), "first_axis_dim": 6}),
    Case("cross_entropy_loss", cross_entropy_loss, logits),
    Case("CrossEntropyLoss", CrossEntropyLoss, dict),
    Case("CrossEntropyLoss.forward", CrossEntropyLoss().forward,
         lambda: {"input": torch.randn(4, 7), "target": torch.tensor([0, 3, 6, -100])}),
    Case("layer_norm_fn", layer_norm_fn, norms),
    Case("layer_norm_fn-all", layer_norm_fn,
         lambda: {**norms(), "x1": normal(2, 3, 8), "weight1": torch.ones(8),
                  "bias1": torch.ones(8), "dropout_p": 0.1, "prenorm": True,
                  "return_dropout_mask": True, "out": normal(2, 3, 8),
                  "residual_out": normal(2, 3, 8)}),
    Case("rms_norm_fn", rms_norm_fn, lambda: {**norms(), "rowscale": torch.ones(2, 3)}),
    Case("RMSNorm", RMSNorm, lambda: {"hidden_size": 8}),
    Case("apply_sinks", apply_sinks,
         lambda: {"out": normal(2, 3, 4, 16), "softmax_lse": torch.randn(2, 4, 3),
                  "s_aux": torch.zeros(4)}),
    Case("RMSNorm.forward", RMSNorm(8).forward, lambda: {"x": torch.randn(2, 3, 8)}),
]  # fmt: skip
