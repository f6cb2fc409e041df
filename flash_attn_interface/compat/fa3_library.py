"""The operations of FlashAttention-3's C++ library: `torch.ops.flash_attn_3.fwd` and its like.

PyTorch ("FA3" of torch.nn.attention) and xformers call them, and take their presence for that of
FlashAttention-3. So they are registered only where the Hopper distribution is installed: by `import
flash_attn_interface`, since that is what PyTorch imports, and by `import flash_attn_3._C`, since
that is what xformers imports.

Clients compare the schemas, letter for letter: argument names, defaults, alias annotations.
"""

from __future__ import annotations

import importlib.util
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..api import kvcache
from ..api.combine import flash_attn_combine
from ..call.custom_op import arguments_of, on_one_device
from ..call.gradients import empty_gradient
from ..call.ops import Results
from .fa3_ops import (
    _flash_attn_forward,
    backward,
    check_forward_out,
    fake_forward,
    fake_softmax_d,
    no_accumulators,
)

NAMESPACE = "flash_attn_3"

SCHEMAS = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, "
    "Tensor? q_v=None, Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, "
    "Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, "
    "Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, "
    "Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0.0, "
    "bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, int num_splits=0, "
    "bool? pack_gqa=None, int sm_margin=0) -> (Tensor(out!), Tensor, Tensor, Tensor)",
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(dq!)? dq=None, Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None, Tensor? seqused_q=None, Tensor? seqused_k=None, "
    "int? max_seqlen_q=None, int? max_seqlen_k=None, float? softmax_scale=None, "
    "bool is_causal=False, int window_size_left=-1, int window_size_right=-1, float softcap=0.0, "
    "bool deterministic=False, int sm_margin=0) -> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, "
    "Tensor, Tensor, Tensor, Tensor)",
    "fwd_combine(Tensor out_partial, Tensor lse_partial, Tensor(out!)? out=None, "
    "ScalarType? out_dtype=None) -> (Tensor(out!), Tensor)",
    "get_scheduler_metadata(int batch_size, int max_seqlen_q, int max_seqlen_k, int num_heads, "
    "int num_heads_k, int headdim, int headdim_v, ScalarType qkv_dtype, Tensor seqused_k, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? leftpad_k=None, int? page_size=None, int max_seqlen_k_new=0, "
    "bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "int attention_chunk=0, bool has_softcap=False, int num_splits=0, bool? pack_gqa=None, "
    "int sm_margin=0) -> Tensor",
)

# torch leaves out trailing arguments that equal the schema's defaults, so these have the same ones.


def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    q_v: Tensor | None = None,
    out: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    kv_batch_idx: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    seqlens_rotary: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    is_rotary_interleaved: bool = False,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Results:
    """`_flash_attn_forward`, except that the first result is the argument out if there is one."""
    if out is not None:
        check_forward_out("out", out, q, k, v, k_new)
    with torch.no_grad():
        result, *others = _flash_attn_forward._init_fn(
            q, k, v, k_new, v_new, q_v, None, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new,
            seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k,
            rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale, softmax_scale,
            is_causal, window_size_left, window_size_right, attention_chunk, softcap,
            is_rotary_interleaved, scheduler_metadata, num_splits, pack_gqa, sm_margin,
        )  # fmt: skip
        return (result if out is None else out.copy_(result), *others)


def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> tuple[Tensor, ...]:
    """(dq, dk, dv, softmax_d) and four workspaces, which are empty."""
    with torch.no_grad():
        softmax_d, *gradients = backward(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, seqused_q,
            seqused_k, max_seqlen_q, max_seqlen_k, softmax_scale, is_causal, window_size_left,
            window_size_right, softcap, deterministic,
        )  # fmt: skip
    return (*gradients, softmax_d, *no_accumulators(q), *no_accumulators(q))


def fwd_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`flash_attn_combine`."""
    with torch.no_grad():
        result, softmax_lse = flash_attn_combine(out_partial, lse_partial, out, out_dtype)
    return result, softmax_lse


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads: int,
    num_heads_k: int,
    headdim: int,
    headdim_v: int,
    qkv_dtype: torch.dtype,
    seqused_k: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """`get_scheduler_metadata` of the public functions, in another order."""
    return kvcache.get_scheduler_metadata(
        batch_size, max_seqlen_q, max_seqlen_k, num_heads, num_heads_k, headdim, seqused_k,
        qkv_dtype, headdim_v, cu_seqlens_q, cu_seqlens_k_new, leftpad_k, page_size,
        max_seqlen_k_new, is_causal, (window_size_left, window_size_right), attention_chunk,
        has_softcap, num_splits, pack_gqa, sm_margin,
    )  # fmt: skip


def _fwd_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    q_v: Tensor | None = None,
    out: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    *others: object,
    **keywords: object,
) -> Results:
    result, *rest = fake_forward(q, v, cu_seqlens_q)
    return (result if out is None else out, *rest)  # type: ignore[return-value]


def _bwd_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    *others: object,
    **keywords: object,
) -> tuple[Tensor, ...]:
    gradients = [
        empty_gradient(tensor) if given is None else given
        for given, tensor in zip((dq, dk, dv), (q, k, v), strict=True)
    ]
    softmax_d = fake_softmax_d(q, cu_seqlens_q)
    return (*gradients, softmax_d, *no_accumulators(q), *no_accumulators(q))


_lock = threading.Lock()
_library: torch.library.Library | None = None  # its operations live as long as it does


def register() -> None:
    """Define the operations, once; leave those that somebody else has defined before."""
    global _library
    with _lock:
        if _library is not None:
            return
        if hasattr(getattr(torch.ops, NAMESPACE), "fwd"):
            warnings.warn(
                f"flash_attn_interface: another package has registered torch.ops.{NAMESPACE}.fwd, "
                "which stays as it is. PyTorch's and xformers' FlashAttention-3 will be that one; "
                "uninstall it to use the kernels of this package there.",
                stacklevel=2,
            )
            return
        library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
        for schema in SCHEMAS:
            library.define(schema)
        for kernel in (fwd, bwd, fwd_combine, get_scheduler_metadata):
            library.impl(kernel.__name__, kernel, "CompositeExplicitAutograd")
        fakes: tuple[Any, ...] = (_fwd_fake, _bwd_fake)
        for schema, fake in zip(SCHEMAS, fakes, strict=False):
            names = [argument.name for argument in arguments_of(schema)]
            name = schema[: schema.index("(")]
            checked = on_one_device(fake, names)
            torch.library.register_fake(f"{NAMESPACE}::{name}", checked, lib=library)
        _library = library


def register_where_hopper_is_installed() -> None:
    """Looks for the distribution's folder; does not import it."""
    try:
        spec = importlib.util.find_spec(NAMESPACE)
    except (ImportError, ValueError):  # half imported, or hidden from an import system
        return
    folders = (spec.submodule_search_locations or ()) if spec is not None else ()
    # Not FlashAttention-3's own package of this name, whose _C is a binary that registers these.
    if any(Path(folder, "_C.py").is_file() for folder in folders):
        register()
