"""LayerNorm, RMSNorm and cross entropy under FlashAttention-2's names, against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn

SIZE = 24


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def normalised(x: Tensor, rms: bool, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch's; its rms_norm has no bias."""
    if not rms:
        return functional.layer_norm(x, (SIZE,), weight, bias, 1e-6)
    out = functional.rms_norm(x, (SIZE,), weight, 1e-6)
    return out if bias is None else out + bias


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_a_sum(rms: bool, with_bias: bool, dtype: torch.dtype):
    x, residual = draw(2, 5, SIZE, dtype=dtype), draw(2, 5, SIZE)
    weight, bias = draw(SIZE), draw(SIZE) if with_bias else None
    function = rms_norm_fn if rms else layer_norm_fn
    out, total = function(x, weight, bias, residual=residual, prenorm=True)
    assert out.dtype == dtype and total.dtype == torch.float32
    torch.testing.assert_close(total, x.float() + residual)
    want = normalised(x.float() + residual, rms, weight, bias)
    torch.testing.assert_close(out, want.to(dtype), rtol=0.01, atol=1e-5)
    assert torch.equal(function(x, weight, bias, residual=residual), out)


def test_gradients_are_those_of_torch():
    inputs = [draw(3, SIZE).requires_grad_(), draw(SIZE).requires_grad_(), draw(SIZE)]
    inputs[2].requires_grad_()
    weigh = draw(3, SIZE)
    for rms, function in ((False, layer_norm_fn), (True, rms_norm_fn)):
        mine = torch.autograd.grad((function(*inputs) * weigh).sum(), inputs)
        want = torch.autograd.grad((normalised(inputs[0], rms, *inputs[1:]) * weigh).sum(), inputs)
        torch.testing.assert_close(mine, want)


def test_two_inputs_two_weights_and_places_for_results():
    x, x1, weight, weight1 = draw(3, SIZE), draw(3, SIZE), draw(SIZE), draw(SIZE)
    out, residual_out = torch.empty(3, SIZE), torch.empty(3, SIZE)
    first, second, total = layer_norm_fn(
        x, weight, None, x1=x1, weight1=weight1, prenorm=True, out=out, residual_out=residual_out
    )
    assert first is out and total is residual_out
    torch.testing.assert_close(total, x + x1)
    torch.testing.assert_close(first, normalised(x + x1, False, weight, None))
    torch.testing.assert_close(second, normalised(x + x1, False, weight1, None))


def test_row_scale_dtypes_and_zero_centred_weights():
    x, scale, weight = draw(3, SIZE, dtype=torch.bfloat16), draw(3), draw(SIZE)
    out, total = rms_norm_fn(
        x, weight, None, rowscale=scale, prenorm=True, residual_in_fp32=True,
        zero_centered_weight=True, out_dtype=torch.float32,
    )  # fmt: skip
    assert total.dtype == out.dtype == torch.float32
    torch.testing.assert_close(total, x.float() * scale[:, None])
    torch.testing.assert_close(out, normalised(total, True, weight + 1, None))
    with pytest.raises(ValueError, match="rowscale is given together with x1"):
        rms_norm_fn(x, weight, None, x1=x, rowscale=scale)
    with pytest.raises(ValueError, match="residual has shape"):
        rms_norm_fn(x, weight, None, residual=x[:1])


def test_dropout_tells_what_it_kept():
    x, weight = draw(64, SIZE), torch.ones(SIZE)
    _, total, mask, mask1 = layer_norm_fn(
        x, weight, None, dropout_p=0.25, prenorm=True, return_dropout_mask=True
    )
    assert mask1 is None and 0.65 < mask.float().mean() < 0.85
    torch.testing.assert_close(total, x * mask / 0.75)


def test_rms_norm_module():
    module, x = RMSNorm(SIZE, eps=1e-6, dropout_p=0.5), draw(3, SIZE)
    assert module.bias is None and torch.equal(module.weight, torch.ones(SIZE))
    assert not torch.equal(module(x), module.eval()(x))
    torch.testing.assert_close(module(x), functional.rms_norm(x, (SIZE,), eps=1e-6))
    assert not RMSNorm(SIZE, zero_centered_weight=True, dtype=torch.bfloat16).weight.any()


# ---- cross entropy -----------------------------------------------------------------------------

LABELS = torch.tensor([3, -100, 0, 10, 7])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_and_gradient(reduction: str, smoothing: float):
    logits = draw(5, 11).requires_grad_()
    loss = CrossEntropyLoss(reduction=reduction, label_smoothing=smoothing)(logits, LABELS)
    want = functional.cross_entropy(logits, LABELS, reduction=reduction, label_smoothing=smoothing)
    torch.testing.assert_close(loss, want)
    mine, theirs = (torch.autograd.grad(x.sum(), logits)[0] for x in (loss, want))
    torch.testing.assert_close(mine, theirs)


def test_z_loss():
    logits = draw(5, 11, dtype=torch.bfloat16).requires_grad_()
    losses, z_losses = cross_entropy_loss(logits, LABELS, logit_scale=0.5, lse_square_scale=0.1)
    scaled = logits.float() * 0.5
    z = 0.1 * torch.logsumexp(scaled, -1) ** 2 * (LABELS != -100)
    torch.testing.assert_close(z_losses, z)
    want = functional.cross_entropy(scaled, LABELS, reduction="none") + z
    torch.testing.assert_close(losses, want)
    mine, theirs = (torch.autograd.grad(x.sum(), logits)[0] for x in (losses, want))
    torch.testing.assert_close(mine, theirs)
    both: Any = CrossEntropyLoss(lse_square_scale=0.1, logit_scale=0.5, return_z_loss=True)
    loss, z_loss = both(logits, LABELS)
    torch.testing.assert_close(loss, losses.sum() / 4)
    torch.testing.assert_close(z_loss, z_losses.sum() / 4)


def test_what_there_is_not():
    with pytest.raises(NotImplementedError, match="process_group is not supported"):
        cross_entropy_loss(draw(5, 11), LABELS, process_group=object())
    with pytest.raises(NotImplementedError, match="reduction is 'max'"):
        CrossEntropyLoss(reduction="max")
