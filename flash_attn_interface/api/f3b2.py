"""flash_attn_f3b2_func: the Hopper forward with the Ampere backward ("FA3 forward, FA2 backward").

On sm_90 with the Hopper tree installed the forward is that tree's where it serves the call;
everywhere else, and for every backward, the Ampere kernels run. Signatures are those of
`fa3.py`.
"""

from __future__ import annotations

from torch import Tensor

from .._common.ask.call import DENSE, Call, Options, Sequences, Tensors
from ..call.autograd import attention
from .fa3 import OutAndLse, WindowSize, _check_hints, _result

_BACKWARD = "flash2"


def flash_attn_f3b2_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | bool | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: WindowSize = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Tensor | OutAndLse:
    """`flash_attn_func` whose backward is always the Ampere one.

    Args:
        qv: must be None, or a bool, which is taken as `deterministic`: that is the sixth positional
            parameter of the function of this name in FlexHeadFA.
        q, k, v, softmax_scale, causal, q_descale, k_descale, v_descale, window_size,
            attention_chunk, softcap, num_splits, pack_gqa, deterministic, sm_margin,
            return_attn_probs: as in `flash_attn_func`.
        s_aux: attention sinks, as in `flash_attn_func`.

    Returns:
        As `flash_attn_func`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `flash_attn_func`.
    """
    if isinstance(qv, bool):
        qv, deterministic = None, qv or deterministic
    _check_hints(softmax_scale, qv, q_descale, k_descale, v_descale, num_splits, sm_margin)
    options = Options(
        softmax_scale, causal, window_size, attention_chunk, softcap, 0.0, return_attn_probs, False,
        deterministic, None, _BACKWARD, sm_margin, pack_gqa,
    )  # fmt: skip
    out, softmax_lse, _ = attention(Call(Tensors(q, k, v, s_aux=s_aux), DENSE, None, options))
    return _result(out, softmax_lse)


def flash_attn_f3b2_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: WindowSize = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Tensor | OutAndLse:
    """`flash_attn_varlen_func` whose backward is always the Ampere one.

    Args:
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k,
            softmax_scale, causal, qv, q_descale, k_descale, v_descale, window_size,
            attention_chunk, softcap, num_splits, pack_gqa, deterministic, sm_margin,
            return_attn_probs: as in `flash_attn_varlen_func`.
        s_aux: attention sinks, as in `flash_attn_func`.

    Returns:
        As `flash_attn_varlen_func`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `flash_attn_varlen_func`.
    """
    _check_hints(softmax_scale, qv, q_descale, k_descale, v_descale, num_splits, sm_margin)
    options = Options(
        softmax_scale, causal, window_size, attention_chunk, softcap, 0.0, return_attn_probs, False,
        deterministic, None, _BACKWARD, sm_margin, pack_gqa,
    )  # fmt: skip
    tensors = Tensors(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, s_aux=s_aux)
    lengths = Sequences(max_seqlen_q, max_seqlen_k)
    out, softmax_lse, _ = attention(Call(tensors, lengths, None, options))
    return _result(out, softmax_lse)
