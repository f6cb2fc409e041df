"""The tolerance rule: how far a kernel may be from the exact result.

The exact result is the reference in float64. The yardstick is an honest implementation in the input
dtype: the same reference computed in 16 bits with its operations reordered. A kernel may be at most
twice as far off as the yardstick. softmax_lse has no 16-bit step in it (inputs are exact, sums are
fp32), so its bound is absolute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from cases import Case
from conftest import Runner
from inputs import Inputs
from torch import Tensor

import flash_attn_interface
from flash_attn_interface.reference.forward import attention_reference


@dataclass(frozen=True)
class Expected:
    """Exact results (float64) and the bounds that a kernel's results must keep."""

    out: Tensor
    softmax_lse: Tensor
    s_dmask: Tensor | None
    out_bound: float
    lse_bound: float


def reference_arguments(case: Case, inputs: Inputs) -> dict[str, Any]:
    """Keyword arguments of attention_reference for this case, without rng_state."""
    return {
        "softmax_scale": case.softmax_scale,
        "causal": case.causal,
        "window_size": case.window_size,
        "attention_chunk": case.attention_chunk,
        "softcap": case.softcap,
        "alibi_slopes": inputs.alibi_slopes,
        "dropout_p": case.dropout_p,
        "cu_seqlens_q": inputs.cu_seqlens_q,
        "cu_seqlens_k": inputs.cu_seqlens_k,
        "seqused_q": inputs.seqused_q,
        "seqused_k": inputs.seqused_k,
    }


def expect(
    case: Case, inputs: Inputs, rng_state: Tensor | None = None, return_softmax: bool = False
) -> Expected:
    """Runs the reference and the yardstick."""
    q, k, v = inputs.q.detach(), inputs.k.detach(), inputs.v.detach()
    arguments = {**reference_arguments(case, inputs), "rng_state": rng_state}
    out, lse, s_dmask = attention_reference(
        q.double(), k.double(), v.double(), **arguments, return_softmax=return_softmax
    )
    yardstick, _, _ = attention_reference(q, k, v, **arguments, upcast=False)
    assert lse is not None
    rounding = _max_abs(out.to(q.dtype).double() - out)  # no 16-bit result can promise better
    yardstick_error = max(_max_abs(yardstick.double() - out), rounding)
    finite_lse = lse[torch.isfinite(lse)]
    largest_lse = _max_abs(finite_lse)
    lse_bound = 2e-5 * max(1.0, largest_lse)
    return Expected(out, lse, s_dmask, 2.0 * yardstick_error + 1e-5, lse_bound)


def check(expected: Expected, out: Tensor, softmax_lse: Tensor | None) -> None:
    """Asserts shape, absence of NaN, empty rows and the bounds."""
    assert out.shape == expected.out.shape, f"out {tuple(out.shape)} != {tuple(expected.out.shape)}"
    _assert_no_nan("out", out)
    empty = expected.softmax_lse == float("-inf")
    rows_without_keys = out[empty.transpose(-1, -2)]
    assert torch.count_nonzero(rows_without_keys) == 0, "a row that sees no key must be exactly 0"
    _assert_close("out", out.double(), expected.out, expected.out_bound)

    if softmax_lse is None:
        return
    assert softmax_lse.dtype == torch.float32
    assert softmax_lse.shape == expected.softmax_lse.shape, (
        f"softmax_lse {tuple(softmax_lse.shape)} != {tuple(expected.softmax_lse.shape)}"
    )
    _assert_no_nan("softmax_lse", softmax_lse)
    wrongly_empty = (softmax_lse == float("-inf")) != empty
    assert not wrongly_empty.any(), (
        f"softmax_lse is -inf, or not, at {_first(wrongly_empty)} against the reference"
    )
    got, want = (
        softmax_lse.double().masked_fill(empty, 0.0),
        expected.softmax_lse.masked_fill(empty, 0.0),
    )
    _assert_close("softmax_lse", got, want, expected.lse_bound)


def check_s_dmask(expected: Expected, s_dmask: Tensor) -> None:
    """Asserts the shape, the signs (negative = dropped) and the range of S_dmask.

    Magnitudes are exp(score - reference), where the reference of a row is a recent maximum of it:
    at most its final maximum, and at most 2^8 too small (kRescaleSlackLog2 in softmax.cuh).
    """
    want = expected.s_dmask
    assert want is not None
    assert s_dmask.shape == want.shape, f"S_dmask {tuple(s_dmask.shape)} != {tuple(want.shape)}"
    _assert_no_nan("S_dmask", s_dmask)
    got = s_dmask.double()
    unvisited = want == 0
    assert (got[unvisited] == 0).all(), (
        f"S_dmask is not 0 at {_first(unvisited & (got != 0))}, where masked"
    )
    wrong_sign = (got * want < 0) | ((got == 0) & (want.abs() > 1e-6))
    assert not wrong_sign.any(), f"S_dmask has the wrong sign at {_first(wrong_sign)}"
    assert _max_abs(got) <= 2.0**8 * 1.01
    too_small = got.abs() < want.abs() * 0.97 - 1e-6
    assert not too_small.any(), f"S_dmask is too small at {_first(too_small)}"


def _assert_no_nan(name: str, x: Tensor) -> None:
    bad = torch.isnan(x)
    assert not bad.any(), f"{name} has {int(bad.sum())} NaN of {x.numel()}, first at {_first(bad)}"


def _assert_close(name: str, got: Tensor, want: Tensor, bound: float) -> None:
    error = (got - want).abs()
    if error.numel() == 0 or float(error.max()) <= bound:
        return
    where = _first(error == error.max())
    raise AssertionError(
        f"{name}: worst error {float(error.max()):.3e} > {bound:.3e} at {where}: "
        f"got {float(got[where]):.6g}, want {float(want[where]):.6g}; "
        f"{int((error > bound).sum())} of {error.numel()} elements exceed the bound"
    )


def _first(mask: Tensor) -> tuple[int, ...]:
    indices = mask.nonzero()
    return tuple(indices[0].tolist()) if len(indices) else ()


def _max_abs(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def check_softcap(runner: Runner, case: Case) -> None:
    """softcap * tanh(score / softcap) for scores of any size. With one key, softmax_lse is it.

    Kernels take a shorter way where all scores of a warp are small. It has no absolute error: there
    the bound is relative, which the general way would miss.
    """
    assert case.softmax_scale is not None
    ratio = torch.logspace(-3, 1.5, 256).mul(torch.tensor([1.0, -1.0]).repeat(128))
    q = torch.zeros(1, 256, 1, 64)
    q[0, :, 0, 5] = ratio * case.softcap / case.softmax_scale
    q = q.to(runner.device, torch.bfloat16)
    k, v = torch.zeros_like(q[:, :1]), torch.ones_like(q[:, :1])
    k[..., 5] = 1.0
    _, softmax_lse = runner.call(
        flash_attn_interface.flash_attn_func,
        *(q, k, v),
        softmax_scale=case.softmax_scale,
        softcap=case.softcap,
        return_attn_probs=True,
    )
    x = q[0, :, 0, 5].double() * case.softmax_scale / case.softcap
    expected = case.softcap * x.tanh()
    error = (softmax_lse[0, 0].double() - expected).abs()
    assert (error <= 2e-6 * expected.abs() + 5e-7 * case.softcap).all()
    if 1e-4 < case.softcap < 1e5:  # else the polynomial leaves the range of fp32
        small = x.abs().view(-1, 64).amax(1, keepdim=True).expand(-1, 64).flatten() < 0.49
        assert small.sum() >= 64
        assert (error <= 2e-6 * expected.abs())[small].all()
