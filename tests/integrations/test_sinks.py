"""Sinks as an epilogue: against the softmax that has them, with gradients."""

from __future__ import annotations

import pytest
import torch

from flash_attn_interface import flash_attn_varlen_func
from flash_attn_interface.reference.forward import attention_reference
from flash_attn_interface.reference.sinks import apply_sinks


def inputs() -> list[torch.Tensor]:
    """q, k and v of three keys and five queries, s_aux; float64, for the reference."""
    shapes = ((2, 5, 4, 6), (2, 3, 2, 6), (2, 3, 2, 3), (4,))
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


def reference(q, k, v) -> tuple[torch.Tensor, torch.Tensor]:
    """Without sinks; causal, aligned at the end: the first two of five queries see no key."""
    out, lse, *_ = attention_reference(q, k, v, causal=True, return_lse=True)
    return out, lse


def expected(q, k, v, s_aux) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax over one logit more."""
    k, v = (x.repeat_interleave(2, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    hidden = torch.ones(5, 3, dtype=torch.bool).tril(-2).logical_not()
    scores = scores.masked_fill(hidden, -torch.inf)
    logits = torch.cat((scores, s_aux[None, :, None, None].expand(2, 4, 5, 1)), -1)
    out = torch.einsum("bhij,bjhd->bihd", logits.softmax(-1)[..., :-1], v)
    return out, logits.logsumexp(-1)


def test_out_lse_and_all_gradients():
    tensors = inputs()
    found, right = apply_sinks(*reference(*tensors[:3]), tensors[3]), expected(*tensors)
    torch.testing.assert_close(found, right)
    upstream = [torch.randn_like(x) for x in right]
    got = torch.autograd.grad(found, tensors, upstream)
    torch.testing.assert_close(got, torch.autograd.grad(right, tensors, upstream))


def test_minus_infinity_is_no_sink():
    """Neither values nor gradients turn into nan."""
    q, k, v, _ = inputs()
    s_aux = torch.full((4,), -torch.inf, dtype=torch.float64, requires_grad=True)
    plain = reference(q, k, v)
    found = apply_sinks(*plain, s_aux)
    torch.testing.assert_close(found, plain)
    loss = found[0].sum() + found[1][:, :, 2:].sum()
    gradients = torch.autograd.grad(loss, (q, k, v, s_aux))
    assert all(g.isfinite().all() for g in gradients) and not gradients[3].any()


def test_packed_results_of_the_public_function():
    tensors = [x.detach() for x in inputs()]
    cu_q, cu_k = (torch.tensor((0, n, 2 * n), dtype=torch.int32) for n in (5, 3))
    packed = [x.flatten(0, 1).half() for x in tensors[:3]]
    results = flash_attn_varlen_func(*packed, cu_q, cu_k, 5, 3, causal=True, return_attn_probs=True)
    out, lse = apply_sinks(*results, tensors[3].float())
    want_out, want_lse = expected(*tensors)
    assert out.dtype == torch.float16 and lse.dtype == torch.float32
    close = {"rtol": 0.01, "atol": 0.01, "check_dtype": False}
    torch.testing.assert_close(out, want_out.flatten(0, 1), **close)
    torch.testing.assert_close(lse, want_lse.transpose(0, 1).flatten(1, 2), **close)


@pytest.mark.parametrize("shape", [(), (3,), (1, 4)])
def test_wrong_shape_of_sinks(shape):
    out, lse = torch.zeros(2, 5, 4, 6), torch.zeros(2, 4, 5)
    with pytest.raises(ValueError, match=r"s_aux has shape .* expected \(num_heads_q,\)"):
        apply_sinks(out, lse, torch.zeros(shape))


def test_wrong_shape_of_lse():
    with pytest.raises(ValueError, match="softmax_lse has shape"):
        apply_sinks(torch.zeros(2, 5, 4, 6), torch.zeros(2, 5, 4), torch.zeros(4))
