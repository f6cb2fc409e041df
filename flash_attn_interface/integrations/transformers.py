"""Hugging Face transformers: importing this registers the attention "flexible_attention".

    import flash_attn_interface.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="flexible_attention")

transformers calls `bounds_of_mask` once per kind of layer and forward, and `attention` in each
layer. The name must not contain "flash": transformers claims such names for itself.
docs/integrations/transformers.md is the page for users.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import get_target_dtype
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from ..api.fa2 import flash_attn_func, flash_attn_varlen_func
from ..api.kvcache import flash_attn_with_kvcache

NAME = "flexible_attention"

_ADVICE = 'Choose attn_implementation="sdpa" or "eager" for this model.'
# Closures of transformers.masking_utils, which `attention` serves by its other arguments.
_WINDOWS = ("sliding_window_overlay", "sliding_window_bidirectional_overlay")
_PACKED = ("packed_sequence_mask_function", "remap_positions_for_packed_sequence")


def bounds_of_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **unused: Any,
) -> Tensor | None:
    """transformers' mask in the form that `attention` reads; arguments as of `sdpa_mask`.

    Args:
        q_offset, kv_offset: positions of the first query and of the first key.
        attention_mask: bool (batch, length), False for padding, from position 0.

    Returns:
        None: causal or full attention, aligned at the end, without padding. int32 (batch, 1,
        1, 3): the first key, the end of the keys and the row among the keys of query 0. int64
        (batch, 1, 1, kv_length): number of the sequence that each token of packed sequences belongs
        to. Both have 4 dimensions, because models hand on what has, also from `generate`.

    Raises:
        NotImplementedError: a mask beyond causal, windows, padding and packing, or padding between
            tokens.
    """
    segments = _segments(mask_function)
    if segments is not None:
        return segments[:, None, None].to(torch.int64).expand(batch_size, 1, 1, kv_length)
    last = q_offset - kv_offset + q_length
    keys = torch.arange(kv_length, device=device)
    seen = (keys < last)[None].expand(batch_size, kv_length)
    if attention_mask is not None:
        missing = kv_offset + kv_length - attention_mask.shape[-1]
        given = torch.nn.functional.pad(attention_mask, (0, max(missing, 0)))
        seen = seen & given[:, kv_offset : kv_offset + kv_length].bool()
    begin = torch.where(seen, keys, kv_length).amin(-1)
    end = torch.where(seen, keys + 1, 0).amax(-1)
    begin = torch.minimum(begin, end)  # nothing but padding
    first_query = torch.zeros_like(begin) + (last - q_length)
    bounds = torch.stack((begin, end, first_query), -1)[:, None, None].to(torch.int32)
    if torch.compiler.is_compiling():
        return bounds  # reading values would break the graph
    if attention_mask is not None and bool((seen.sum(-1) != end - begin).any()):
        raise NotImplementedError(
            f"attention_mask has padding between tokens, which {NAME} does not serve: pad all "
            f"sequences on the left, or all on the right without generating further. {_ADVICE}"
        )
    plain = torch.tensor((0, kv_length, kv_length - q_length), dtype=torch.int32, device=device)
    return None if bool((bounds == plain).all()) else bounds


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    deterministic: bool | None = None,
    position_bias: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, as transformers calls it.

    Args:
        query: (batch, num_heads_q, seqlen_q, head_dim_qk).
        key: (batch, num_heads_k, seqlen_k, head_dim_qk).
        value: (batch, num_heads_k, seqlen_k, head_dim_v): head_dim_v is free, nothing is padded.
        attention_mask: what `bounds_of_mask` returned.
        sliding_window: W: a query sees W - 1 keys before it, and as many behind if not causal.
        s_aux: (num_heads_q,): attention sinks.
        position_ids: (batch, seqlen_q): where they start anew, another packed sequence begins.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed sequences, given outright.

    Returns:
        ((batch, seqlen_q, num_heads_q, head_dim_v), None).

    Raises:
        NotImplementedError: a mask that the caller made, or a position bias.
        ValueError, TypeError: as of `flash_attn.flash_attn_func`.
    """
    if position_bias is not None:
        raise NotImplementedError(f"{NAME} does not serve position biases. {_ADVICE}")
    target = get_target_dtype(query, module) if query.is_cuda else None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if target is not None:
        q, k, v = q.to(target), k.to(target), v.to(target)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    options: dict[str, Any] = {
        "softmax_scale": scaling,
        "causal": causal,
        "softcap": softcap or 0.0,
        "s_aux": s_aux,
    }
    if sliding_window is not None:
        options["window_size"] = (sliding_window - 1, 0 if causal else sliding_window - 1)
    training = dropout > 0.0 or (
        torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    )
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    for_training = {
        **options, "dropout_p": dropout, "deterministic": deterministic,
    }  # fmt: skip

    if attention_mask is None and cu_seq_lens_q is None and position_ids is not None:
        attention_mask = _segments_of_positions(position_ids, batch, seqlen_q, seqlen_k)
    is_bounds = attention_mask is not None and _kind(attention_mask, batch) == "bounds"
    results: Any
    if causal and not training and (is_bounds or (attention_mask is None and seqlen_q < seqlen_k)):
        cache: dict[str, Any] = {}
        if attention_mask is not None:
            begin, _, first_query = attention_mask[:, 0, 0].unbind(-1)
            cache["cache_seqlens"] = (first_query + seqlen_q).contiguous()
            cache["cache_leftpad"] = begin.contiguous()
        results = flash_attn_with_kvcache(q, k, v, **cache, **options)
        return results.reshape(batch, seqlen_q, *results.shape[-2:]), None
    if attention_mask is not None:
        if is_bounds:
            cu_seq_lens_q, cu_seq_lens_k = _cu_seqlens_of_bounds(attention_mask, seqlen_q, seqlen_k)
            max_length_q, max_length_k = seqlen_q, seqlen_k
        else:
            cu_seq_lens_q = cu_seq_lens_k = _cu_seqlens_of_segments(attention_mask[:, 0, 0])
            max_length_q = max_length_k = seqlen_q
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        longest_q = q.shape[0] * seqlen_q if max_length_q is None else max_length_q
        longest_k = k.shape[0] * seqlen_k if max_length_k is None else max_length_k
        results = flash_attn_varlen_func(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seq_lens_q.to(torch.int32),
            cu_seq_lens_k.to(torch.int32), longest_q, longest_k, **for_training,
        )  # fmt: skip
    else:
        results = flash_attn_func(q, k, v, **for_training)
    return results.reshape(batch, seqlen_q, *results.shape[-2:]), None


def _kind(mask: Tensor, batch: int) -> str:
    """Which of the two results of `bounds_of_mask` this is."""
    if mask.ndim == 4 and mask.shape[:3] == (batch, 1, 1):
        if mask.dtype == torch.int32 and mask.shape[3] == 3:
            return "bounds"
        if mask.dtype == torch.int64:
            return "segments"
    raise NotImplementedError(
        f"{NAME} does not serve a mask of shape {tuple(mask.shape)} made by the caller: pass the "
        f"padding, (batch, length), to the model. {_ADVICE}"
    )


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    code, cells = function.__code__, function.__closure__ or ()
    return dict(zip(code.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def _segments(mask_function: Callable[..., Any]) -> Tensor | None:
    """Numbers of packed sequences, (batch, seqlen), if the mask has them.

    Raises NotImplementedError for what is not causal, a window or packing, or all of these.
    """
    if mask_function in (causal_mask_function, bidirectional_mask_function):
        return None
    maker = getattr(mask_function, "__qualname__", "").split(".")[0]
    if maker in _WINDOWS:
        return None
    if maker in ("and_masks", *_PACKED):
        inside = _closure(mask_function)
        if maker == "packed_sequence_mask_function":
            numbers: Tensor = inside["packed_sequence_mask"]
            return numbers
        parts = inside["mask_functions"] if maker == "and_masks" else (inside["mask_function"],)
        found = [segments for part in parts if (segments := _segments(part)) is not None]
        return found[0] if found else None
    raise NotImplementedError(
        f"{NAME} serves causal and full attention, windows, padding and packed sequences, but not "
        f"the mask that this model makes with {maker or mask_function}. {_ADVICE}"
    )


def _segments_of_positions(
    positions: Tensor, batch: int, seqlen_q: int, seqlen_k: int
) -> Tensor | None:
    """As `bounds_of_mask` gives them; gpt_oss leaves packing out of its mask."""
    if positions.ndim != 2 or positions.shape[1] != seqlen_q or seqlen_q in (0, 1):
        return None
    if seqlen_q != seqlen_k or torch.compiler.is_compiling():
        return None
    segments = torch.nn.functional.pad((positions.diff(dim=-1) != 1).cumsum(-1), (1, 0))
    if bool((segments[:, -1] == 0).all()):
        return None
    return segments[:, None, None].expand(batch, 1, 1, seqlen_q)


def _cu_seqlens_of_segments(segments: Tensor) -> Tensor:
    """Starts of the sequences among batch * seqlen tokens, and the end. Synchronises."""
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments.diff(dim=-1) != 0
    begins = starts.flatten().nonzero().flatten()
    return torch.nn.functional.pad(begins, (0, 1), value=segments.numel()).to(torch.int32)


def _cu_seqlens_of_bounds(bounds: Tensor, seqlen_q: int, seqlen_k: int) -> tuple[Tensor, Tensor]:
    """Padding as sequences of its own, without reading a value.

    Three sequences per row of the batch: the queries of the padding without keys, the keys of the
    padding without queries, then the tokens. So padding costs no work and gives zeros.
    """
    begin, end, first_query = bounds[:, 0, 0].unbind(-1)
    rows = torch.arange(len(bounds), device=bounds.device, dtype=torch.int32)
    q_begin = (begin - first_query).clamp(0, seqlen_q)
    q_end = torch.maximum((end - first_query).clamp(0, seqlen_q), q_begin)

    def joined(parts: tuple[Tensor, ...], seqlen: int) -> Tensor:
        ends = torch.stack([part + rows * seqlen for part in parts], -1).flatten()
        total = torch.full((2,), len(bounds) * seqlen, device=bounds.device, dtype=torch.int32)
        return torch.cat((torch.zeros_like(total[:1]), ends, total))

    # The keys of the padding before a row's tokens come after its queries: [q | - | tokens].
    cu_q = joined((q_begin, q_begin, q_end), seqlen_q)
    before = torch.cat((torch.zeros_like(end[:1]), end[:-1] - seqlen_k))  # end of the last tokens
    cu_k = joined((before, begin, end), seqlen_k)
    cu_k[-2] = end[-1] + rows[-1] * seqlen_k  # the last padding: queries first, then keys
    return cu_q, cu_k


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, bounds_of_mask)
