"""`RotaryEmbedding`, the module that makes rotary tables and applies them with rotary.py.

Users import it from `flash_attn.layers.rotary`. Some of them subclass it, or read its tables, so
the names with an underscore below are upstream's and stay: `_update_cos_sin_cache`,
`_compute_inv_freq`, `_cos_cached`, `_sin_cached`, `_cos_k_cached`, `_sin_k_cached`,
`_seq_len_cached`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._common.ask.check_tensors import require_device
from .._common.ask.check_values import bounded, check_factory, flag, non_negative, real
from .rotary import DENSE, KV, QKV, apply_rotary_emb_kv_, apply_rotary_emb_qkv_, rotate_tokens
from .rotary_positions import check_layout

_MAX_DIM = 2**16
_MAX_POSITIONS = 2**31 - 1


def _positive(name: str, value: Any) -> float:
    number = real(name, value)
    if number <= 0.0:
        raise ValueError(f"{name} is {number}: expected a number > 0")
    return number


class RotaryEmbedding(torch.nn.Module):
    """Rotary position embedding (arXiv:2104.09864), or XPos (arXiv:2212.10554) with a scale_base.

    Position p turns pair t by p * base ** (-2 t / dim). XPos also scales pair t of Q by
    scale[t] ** ((p - length // 2) / scale_base) and K by the inverse, with scale[t] = (2 t + 0.4
    dim) / (1.4 dim) and `length` that of the tables: Q and K match only if rotated with the same
    tables, so fix `max_seqlen` where K is kept between calls.

    The tables are in the dtype and on the device of the tokens, made in float32, and kept for the
    longest length so far. `inv_freq`, float32 (dim / 2,), and `scale`, the same or None, are
    buffers that state_dict leaves out. A cast of the module to half precision does not make the
    tables worse: inv_freq is then computed anew.

    Args:
        dim: rotary_dim, even, at most head_dim.
        base: of the geometric sequence of wavelengths.
        interleaved: which lanes make a pair, as in `apply_rotary_emb`.
        scale_base: None, or > 0 for XPos (its paper uses 512).
        device: of the buffers.

    Raises: TypeError for wrong types; ValueError for a dim that is odd or < 2, or a base or
        scale_base that is not positive.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim = bounded("dim", dim, _MAX_DIM)
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"dim is {dim}: expected an even number >= 2")
        self.base = _positive("base", base)
        self.interleaved = flag("interleaved", interleaved)
        self.scale_base = None if scale_base is None else _positive("scale_base", scale_base)
        check_factory(device, None)
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        scale = None if scale_base is None else self._compute_scale(device)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None  # of K; only XPos has others than Q's
        self._sin_k_cached: Tensor | None = None

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotates Q and K in place.

        Args:
            qkv: without kv, as in `apply_rotary_emb_qkv_`; with kv, Q alone, (batch, seqlen,
                num_heads_q, head_dim).
            kv: None or (batch, seqlen_k, 2, num_heads_k, head_dim).
            seqlen_offset: position of the first token, int or (batch,) as in `apply_rotary_emb`.
            max_seqlen: positions that the tables must have. Required with a tensor offset, whose
                values are not read, until the tables have been made.
            num_heads_q: as in `apply_rotary_emb_qkv_`.

        Returns: qkv; with kv, (q, kv). The tensors that were given.

        Raises: ValueError for a tensor offset without tables, and a max_seqlen that is too small;
            otherwise as `apply_rotary_emb`.
        """
        if kv is None:
            check_layout("qkv", qkv, QKV, DENSE)
        else:
            check_layout("qkv", qkv, DENSE, why=", Q alone, because kv is given")
            check_layout("kv", kv, KV)
            require_device("kv", kv, qkv.device, "qkv")
        if not isinstance(seqlen_offset, Tensor):
            seqlen_offset = non_negative("seqlen_offset", seqlen_offset)
        seqlen = qkv.shape[1] if kv is None else max(qkv.shape[1], kv.shape[1])
        if max_seqlen is not None:
            length = bounded("max_seqlen", max_seqlen, _MAX_POSITIONS)
            least = seqlen if isinstance(seqlen_offset, Tensor) else seqlen + seqlen_offset
            if max(length, self._seq_len_cached) < least:
                raise ValueError(f"max_seqlen is {length}: the last token has position {least - 1}")
        elif isinstance(seqlen_offset, Tensor):
            if self._cos_cached is None:
                raise ValueError(
                    "max_seqlen is None: a tensor seqlen_offset needs it in the first call"
                )
            length = self._seq_len_cached
        else:
            length = bounded("seqlen_offset", seqlen + seqlen_offset, _MAX_POSITIONS)
        self._update_cos_sin_cache(length, device=qkv.device, dtype=qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        cos_k, sin_k = self._cos_k_cached, self._sin_k_cached
        assert cos is not None and sin is not None
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q
            )
        q = rotate_tokens(
            "qkv", qkv, cos, sin, seqlen_offset, None, None, self.interleaved, inplace=True
        )
        if cos_k is not None and sin_k is not None:
            cos, sin = cos_k, sin_k
        return q, apply_rotary_emb_kv_(kv, cos, sin, self.interleaved, seqlen_offset)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, base={self.base}, interleaved={self.interleaved}, "
            f"scale_base={self.scale_base}"
        )

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        return 1.0 / self.base ** (self._even_lanes(device) / self.dim)

    def _compute_scale(self, device: torch.device | str | None = None) -> Tensor:
        return (self._even_lanes(device) + 0.4 * self.dim) / (1.4 * self.dim)

    def _even_lanes(self, device: torch.device | str | None) -> Tensor:
        return torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)

    def _update_cos_sin_cache(
        self,
        seqlen: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes tables of at least `seqlen` rows, unless those in place will do."""
        cached = self._cos_cached
        if (
            cached is not None
            and seqlen <= self._seq_len_cached
            and cached.device == device
            and cached.dtype == dtype
        ):
            return
        self._seq_len_cached = max(seqlen, self._seq_len_cached)
        with torch.inference_mode(False):  # its tensors could not be saved for a later backward
            self._make_tables(self._seq_len_cached, device, dtype)

    def _make_tables(
        self, length: int, device: torch.device | None, dtype: torch.dtype | None
    ) -> None:
        position = torch.arange(length, device=device, dtype=torch.float32)
        angle = position.unsqueeze(-1) * self._in_float32("inv_freq", device)
        cos, sin = angle.cos(), angle.sin()
        if self.scale_base is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        power = (position - length // 2) / self.scale_base
        scale = self._in_float32("scale", device) ** power.unsqueeze(-1)
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def _in_float32(self, name: str, device: torch.device | None) -> Tensor:
        """A buffer; its values computed anew where a cast of the module has rounded it."""
        buffer: Tensor = getattr(self, name)
        if buffer.dtype != torch.float32 or buffer.is_meta:
            compute = self._compute_inv_freq if name == "inv_freq" else self._compute_scale
            buffer = compute(device)
        return buffer.to(device)
