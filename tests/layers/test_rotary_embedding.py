"""The module RotaryEmbedding: its tables, their cache, and that it applies them to Q and K."""

from __future__ import annotations

import pytest
import torch
from rotation import F64, by_complex, close
from torch import Tensor

from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.ops.triton.rotary import apply_rotary

both_pairings = pytest.mark.parametrize("interleaved", [False, True])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def exact_tables(seqlen: int, dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Angles in float64, entry by entry."""
    angle = torch.tensor(
        [[p / base ** (2 * t / dim) for t in range(dim // 2)] for p in range(seqlen)], dtype=F64
    )
    return angle.cos(), angle.sin()


@both_pairings
@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_module_rotates_by_its_frequencies(base: float, interleaved: bool, device: str):
    rotary = RotaryEmbedding(12, base, interleaved, device=device)
    qkv = torch.randn(2, 7, 3, 4, 16, device=device)
    q, k, v = (t.clone() for t in qkv.unbind(2))
    cos, sin = (t.to(device) for t in exact_tables(9, 12, base))
    assert rotary(qkv, seqlen_offset=2) is qkv
    close(qkv[:, :, 0], by_complex(q, cos[2:], sin[2:], interleaved), 1e-5)
    close(qkv[:, :, 1], by_complex(k, cos[2:], sin[2:], interleaved), 1e-5)
    assert torch.equal(qkv[:, :, 2], v)


def test_module_with_separate_kv_and_with_heads():
    rotary = RotaryEmbedding(16)
    q, kv = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 2, 2, 16)
    packed = torch.cat((q, kv.flatten(2, 3)), 2)
    result = rotary(q, kv)
    assert isinstance(result, tuple) and result[0] is q and result[1] is kv
    rotary(packed, num_heads_q=4)
    close(packed, torch.cat((q, kv.flatten(2, 3)), 2))


@pytest.mark.parametrize("separate", [False, True])
def test_xpos_scores_decay_with_distance_only(separate: bool):
    """q(m) . k(n) must be Re(q conj(k) e^{i f (m - n)}) scale^((m - n) / base)."""
    dim, seqlen, scale_base = 8, 6, 32.0
    rotary = RotaryEmbedding(dim, scale_base=scale_base)
    q, k = torch.randn(2, dim, dtype=F64).float()
    rows = torch.stack((q, k, k)).view(1, 1, 3, 1, dim).repeat(1, seqlen, 1, 1, 1)
    if separate:
        out_q, out_kv = rotary(rows[:, :, 0].clone(), rows[:, :, 1:].clone())
        out_k = out_kv[:, :, 0]
    else:
        out_q, out_k, _ = rotary(rows.clone()).unbind(2)
    scores = torch.einsum("bmhd,bnhd->mn", out_q, out_k).to(F64)

    pairs = [torch.complex(*t.to(F64).view(2, -1).unbind()) for t in (q, k)]
    expected = torch.zeros(seqlen, seqlen, dtype=F64)
    for m in range(seqlen):
        for n in range(seqlen):
            for t in range(dim // 2):
                frequency = 10000.0 ** (-2 * t / dim)
                scale = (2 * t + 0.4 * dim) / (1.4 * dim)
                angle = torch.tensor(1j * frequency * (m - n), dtype=torch.complex128).exp()
                turned = (pairs[0][t] * pairs[1][t].conj() * angle).real
                expected[m, n] += turned * scale ** ((m - n) / scale_base)
    close(scores, expected, 1e-4)


def test_xpos_tables_are_centred_in_the_table():
    """Upstream's convention, which callers of apply_rotary_emb_qkv_ can see."""
    rotary = RotaryEmbedding(4, scale_base=8.0)
    rotary._update_cos_sin_cache(6, device=torch.device("cpu"), dtype=torch.float32)
    scale = torch.tensor([(2 * t + 1.6) / 5.6 for t in range(2)])
    power = torch.tensor([(p - 3) / 8.0 for p in range(6)])[:, None]
    cos, _ = exact_tables(6, 4)
    close(rotary._cos_cached, cos * scale**power, 1e-6)
    close(rotary._cos_k_cached, cos / scale**power, 1e-6)


def test_module_has_no_state_to_save():
    rotary = RotaryEmbedding(16, scale_base=512)
    assert not rotary.state_dict() and not list(rotary.parameters())
    assert {name for name, _ in rotary.named_buffers()} == {"inv_freq", "scale"}
    assert rotary.inv_freq.dtype == torch.float32 and rotary.inv_freq.shape == (8,)
    assert "dim=16" in repr(rotary)


def test_tables_grow_and_are_reused():
    rotary = RotaryEmbedding(16)
    rotary(torch.randn(1, 5, 3, 2, 16))
    assert rotary._seq_len_cached == 5 and rotary._cos_cached.shape == (5, 8)
    first = rotary._cos_cached
    rotary(torch.randn(1, 2, 3, 2, 16), seqlen_offset=3)
    assert rotary._cos_cached is first
    rotary(torch.randn(1, 2, 3, 2, 16), max_seqlen=11)
    assert rotary._cos_cached.shape == (11, 8)
    rotary(torch.randn(1, 2, 3, 2, 16).bfloat16())
    assert rotary._cos_cached.shape == (11, 8) and rotary._cos_cached.dtype == torch.bfloat16


def test_a_cast_of_the_module_does_not_cost_precision():
    exact, cast = (
        RotaryEmbedding(16, scale_base=512),
        RotaryEmbedding(16, scale_base=512).bfloat16(),
    )
    assert cast.inv_freq.dtype == torch.bfloat16
    for rotary in (exact, cast):
        rotary._update_cos_sin_cache(300, device=torch.device("cpu"), dtype=torch.float32)
    assert torch.equal(exact._cos_cached, cast._cos_cached)
    assert torch.equal(exact._sin_k_cached, cast._sin_k_cached)


def test_autocast_does_not_cost_precision():
    rotary, plain = RotaryEmbedding(16), RotaryEmbedding(16)
    qkv = torch.randn(1, 300, 3, 2, 16)
    expected = plain(qkv.clone())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rotary(qkv), expected)


@pytest.mark.parametrize("whole_module", [False, True])
def test_tables_made_in_inference_mode_do_not_break_training(whole_module: bool):
    rotary = RotaryEmbedding(16)
    with torch.inference_mode():
        if whole_module:
            rotary = RotaryEmbedding(16)
        rotary(torch.randn(1, 5, 3, 2, 16))
    x = torch.randn(1, 5, 3, 2, 16, requires_grad=True)
    rotary(x * 1).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_tensor_offset_needs_a_length_once():
    rotary = RotaryEmbedding(16)
    qkv, offset = torch.randn(2, 3, 3, 2, 16), torch.tensor([4, 1])
    with pytest.raises(ValueError, match="max_seqlen is None"):
        rotary(qkv, seqlen_offset=offset)
    first = rotary(qkv.clone(), seqlen_offset=offset, max_seqlen=7)
    assert torch.equal(rotary(qkv.clone(), seqlen_offset=offset), first)
    assert torch.equal(rotary(qkv[1:].clone(), seqlen_offset=1), first[1:])


def test_module_compiles_without_graph_breaks():
    rotary, plain = RotaryEmbedding(8), RotaryEmbedding(8)
    x = torch.randn(1, 5, 3, 2, 8, requires_grad=True)
    compiled = torch.compile(lambda x: rotary(x * 1), backend="aot_eager", fullgraph=True)
    expected = plain(x * 1)
    close(compiled(x), expected)
    grad = torch.randn_like(expected)
    close(torch.autograd.grad(compiled(x), x, grad)[0], torch.autograd.grad(expected, x, grad)[0])


def test_subclass_may_use_the_tables_itself():
    """The original ModernBERT code does: packed tokens, in place, from the cached tables."""

    class Unpadded(RotaryEmbedding):
        def forward(self, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
            self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
            qk = qkv[:, :2].view(qkv.shape[0], -1, qkv.shape[-1])
            apply_rotary(
                qk, self._cos_cached, self._sin_cached, seqlen_offsets=0, cu_seqlens=cu_seqlens,
                max_seqlen=max_seqlen, interleaved=False, inplace=True, conjugate=False,
            )  # fmt: skip
            return qkv

    qkv = torch.randn(9, 3, 2, 8)
    expected = [RotaryEmbedding(8)(part[None].clone())[0] for part in qkv.split((4, 5))]
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    close(Unpadded(8)(qkv, cu_seqlens, 5), torch.cat(expected))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="dim is 15"):
        RotaryEmbedding(15)
    with pytest.raises(ValueError, match="scale_base is 0"):
        RotaryEmbedding(16, scale_base=0)
