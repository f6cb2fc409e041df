"""The reference, by which all else is judged: against SDPA, hand-worked cases and gradcheck."""

from __future__ import annotations

import math
from typing import Any

import cases
import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import Case
from inputs import make_inputs
from torch import Tensor

from flash_attn_interface._common.launch import philox
from flash_attn_interface.reference.forward import attention_reference

NEG_INF = float("-inf")


def visible(seqlen_q: int, seqlen_k: int, **options: Any) -> list[str]:
    """The mask as strings, 'x' = seen, read off the probabilities of equal scores."""
    q = torch.zeros(1, seqlen_q, 1, 4)
    k = torch.zeros(1, seqlen_k, 1, 4)
    v = torch.eye(seqlen_k).view(1, seqlen_k, 1, seqlen_k)
    out, lse, _ = attention_reference(q, k, v, **options)
    assert lse is not None
    keys_seen = (out > 0).sum(-1).squeeze(-1)
    torch.testing.assert_close(lse[:, 0], keys_seen.float().log())  # log 0 = -inf
    return ["".join("x" if p > 0 else "." for p in row) for row in out[0, :, 0]]


# Masks, worked by hand. off = seqlen_k - seqlen_q.


def test_causal_is_aligned_bottom_right_with_more_keys_than_queries():
    assert visible(2, 5, causal=True) == ["xxxx.", "xxxxx"]


def test_causal_leaves_the_first_rows_empty_with_more_queries_than_keys():
    assert visible(5, 2, causal=True) == ["..", "..", "..", "x.", "xx"]


def test_window_has_both_ends_included():
    assert visible(5, 5, window_size=(1, 2)) == ["xxx..", "xxxx.", ".xxxx", "..xxx", "...xx"]


def test_window_is_aligned_bottom_right():
    assert visible(2, 5, window_size=(1, 0)) == ["..xx.", "...xx"]


def test_left_window_with_more_queries_than_keys_reaches_the_last_column():
    # Dao-AILab/flash-attention#895: an unlimited right side must not become "right = seqlen_k".
    assert visible(5, 2, window_size=(1, -1)) == ["xx", "xx", "xx", "xx", "xx"]
    assert visible(5, 3, window_size=(0, -1)) == ["xxx", "xxx", "xxx", ".xx", "..x"]


def test_right_window_wider_than_keys_still_leaves_rows_empty():
    assert visible(6, 2, window_size=(-1, 2)) == ["..", "..", "x.", "xx", "xx", "xx"]


def test_causal_forces_the_right_window_to_zero():
    assert visible(4, 4, causal=True, window_size=(1, 3)) == visible(4, 4, window_size=(1, 0))


def test_window_minus_one_zero_is_causal_and_any_negative_is_unlimited():
    assert visible(3, 5, window_size=(-7, 0)) == visible(3, 5, causal=True)
    assert visible(3, 4, window_size=(-2, -3)) == ["xxxx"] * 3


@pytest.mark.parametrize("as_type", [list, tuple, torch.tensor])
def test_window_may_be_any_pair(as_type: Any):
    assert visible(3, 3, window_size=as_type([0, 1])) == ["xx.", ".xx", "..x"]


def test_chunk_is_counted_in_key_positions():
    assert visible(5, 5, attention_chunk=2) == ["xx...", "xx...", "..xx.", "..xx.", "....x"]
    assert visible(2, 5, attention_chunk=2) == ["..xx.", "....x"]
    assert visible(3, 5, attention_chunk=2, causal=True) == ["..x..", "..xx.", "....x"]


def test_chunk_floors_negative_positions():
    # off = -3: positions -3 -2 -1 0 1; with truncation -1 would fall into the chunk of 0.
    assert visible(5, 2, attention_chunk=2) == ["..", "..", "..", "xx", "xx"]


# Scores.


def test_alibi_is_the_distance_to_the_aligned_position():
    q, k = torch.zeros(1, 2, 1, 8), torch.zeros(1, 3, 1, 8)
    v = torch.eye(3).view(1, 3, 1, 3)
    out, lse, _ = attention_reference(q, k, v, alibi_slopes=torch.tensor([0.5]))
    bias = torch.tensor([[-0.5, 0.0, -0.5], [-1.0, -0.5, 0.0]])
    torch.testing.assert_close(out[0, :, 0], bias.softmax(-1))
    assert lse is not None
    torch.testing.assert_close(lse[0, 0], bias.logsumexp(-1))


def test_lse_under_causal_and_alibi_is_the_documented_one():
    # FlashAttention-2 returns an lse that is larger by slope * (i + off) here.
    k = torch.zeros(1, 4, 1, 8)
    _, lse, _ = attention_reference(k, k, k, causal=True, alibi_slopes=torch.tensor([1.0]))
    expected = [math.log(sum(math.exp(-d) for d in range(i + 1))) for i in range(4)]
    assert lse is not None
    torch.testing.assert_close(lse[0, 0], torch.tensor(expected))


def test_softcap_comes_before_alibi():
    q = torch.full((1, 1, 1, 1), 10.0)
    k = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    _, lse, _ = attention_reference(
        q, k, k, softmax_scale=1.0, softcap=2.0, alibi_slopes=torch.tensor([3.0])
    )
    scores = [2.0 * math.tanh(10.0 / 2.0) - 3.0, 0.0]
    assert lse is not None
    assert lse.item() == pytest.approx(math.log(sum(map(math.exp, scores))), rel=1e-6)


def test_default_scale_is_that_of_the_query_and_key_head_dim():
    q, k, v = torch.randn(1, 3, 2, 6), torch.randn(1, 4, 2, 6), torch.randn(1, 4, 2, 20)
    default, _, _ = attention_reference(q, k, v)
    explicit, _, _ = attention_reference(q, k, v, softmax_scale=6**-0.5)
    assert torch.equal(default, explicit)


@pytest.mark.parametrize("heads", [(4, 4, 4), (6, 2, 2), (4, 1, 1)])
@pytest.mark.parametrize("mode", ["full", "causal", "bias"])
def test_agrees_with_sdpa(heads: tuple[int, int, int], mode: str):
    q, k, v = (
        torch.randn(2, length, num_heads, dim, dtype=torch.float64)
        for length, num_heads, dim in zip((9, 12, 12), heads, (8, 8, 24), strict=True)
    )
    off = torch.arange(9).unsqueeze(1) + 3 - torch.arange(12)
    slopes = torch.rand(4 if heads[0] == 4 else 6, dtype=torch.float64)
    mask = {"full": None, "causal": off >= 0, "bias": -slopes.view(-1, 1, 1) * off.abs()}[mode]
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)
    out, _, _ = attention_reference(
        q, k, v, causal=mode == "causal", alibi_slopes=slopes if mode == "bias" else None
    )
    torch.testing.assert_close(out, expected)


def test_key_and_value_heads_have_their_own_groups():
    # 32 query, 4 key, 16 value heads: query head h reads key head h // 8 and value head h // 2.
    q, k, v = torch.randn(1, 3, 32, 4), torch.randn(1, 5, 4, 4), torch.randn(1, 5, 16, 6)
    out, lse, _ = attention_reference(q, k, v)
    assert lse is not None
    for head in range(32):
        scores = q[0, :, head] @ k[0, :, head // 8].T / 2.0
        torch.testing.assert_close(out[0, :, head], scores.softmax(-1) @ v[0, :, head // 2])
        torch.testing.assert_close(lse[0, head], scores.logsumexp(-1))


# Lengths.


def test_no_keys_at_all():
    q, k, v = torch.randn(2, 3, 4, 8), torch.empty(2, 0, 2, 8), torch.empty(2, 0, 2, 16)
    out, lse, _ = attention_reference(q, k, v)
    assert out.shape == (2, 3, 4, 16)
    assert torch.count_nonzero(out) == 0
    assert lse is not None
    assert (lse == NEG_INF).all()


def test_no_queries_at_all():
    k, v = torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 16)
    out, lse, _ = attention_reference(torch.empty(2, 0, 4, 8), k, v, causal=True)
    assert out.shape == (2, 0, 4, 16)
    assert lse is not None
    assert lse.shape == (2, 4, 0)


@pytest.mark.parametrize("case", cases.VARLEN, ids=lambda case: case.id)
def test_packed_sequences_equal_separate_calls(case: Case):
    case = case.but(seqused_q=(), seqused_k=())
    inputs = make_inputs(case, "cpu")
    arguments = oracle.reference_arguments(case, inputs)
    out, lse, _ = attention_reference(inputs.q, inputs.k, inputs.v, **arguments)
    assert lse is not None
    starts_q, starts_k = inputs.cu_seqlens_q.tolist(), inputs.cu_seqlens_k.tolist()
    for b in range(case.sequences):
        rows_q = slice(starts_q[b], starts_q[b + 1])
        rows_k = slice(starts_k[b], starts_k[b + 1])
        slopes = arguments["alibi_slopes"]
        one = {**arguments, "cu_seqlens_q": None, "cu_seqlens_k": None}
        one["alibi_slopes"] = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
        out_one, lse_one, _ = attention_reference(
            inputs.q[None, rows_q], inputs.k[None, rows_k], inputs.v[None, rows_k], **one
        )
        assert lse_one is not None
        torch.testing.assert_close(out[rows_q], out_one[0])
        torch.testing.assert_close(lse[:, rows_q], lse_one[0])
    assert torch.count_nonzero(out[starts_q[-1] :]) == 0
    assert (lse[:, starts_q[-1] :] == NEG_INF).all()


def test_seqused_counts_lengths_and_alignment():
    case = Case(lengths_q=(5, 4), lengths_k=(6, 7), seqused_q=(3, 0), seqused_k=(2, 7), causal=True)
    inputs = make_inputs(case, "cpu")  # unused rows are NaN
    out, lse, _ = attention_reference(
        inputs.q, inputs.k, inputs.v, **oracle.reference_arguments(case, inputs)
    )
    expected, expected_lse, _ = attention_reference(
        inputs.q[None, :3], inputs.k[None, :2], inputs.v[None, :2], causal=True
    )
    assert lse is not None
    assert expected_lse is not None
    torch.testing.assert_close(out[:3], expected[0])
    torch.testing.assert_close(lse[:, :3], expected_lse[0])
    assert torch.count_nonzero(out[3:]) == 0
    assert (lse[:, 3:] == NEG_INF).all()


def test_dense_seqused():
    q, k, v = torch.randn(2, 4, 2, 8), torch.randn(2, 6, 2, 8), torch.randn(2, 6, 2, 8)
    used = torch.tensor([2, 6], dtype=torch.int32)
    out, lse, _ = attention_reference(q, k, v, seqused_k=used)
    expected, expected_lse, _ = attention_reference(q[:1], k[:1, :2], v[:1, :2])
    torch.testing.assert_close(out[:1], expected)
    torch.testing.assert_close(lse[:1], expected_lse)
    expected, _, _ = attention_reference(q[1:], k[1:], v[1:])
    torch.testing.assert_close(out[1:], expected)


def test_groups_of_a_large_dense_batch_agree(monkeypatch: pytest.MonkeyPatch):
    case = Case(batch=5, alibi="batched", dropout_p=0.3)
    inputs = make_inputs(case, "cpu")
    arguments = oracle.reference_arguments(case, inputs)
    arguments["rng_state"] = torch.tensor([3, 4])
    whole = attention_reference(inputs.q, inputs.k, inputs.v, **arguments, return_softmax=True)
    limit = 2 * case.num_heads_q * case.seqlen_q * case.seqlen_k
    monkeypatch.setattr("flash_attn_interface.reference.forward._MAX_SCORES_AT_ONCE", limit)
    groups = attention_reference(inputs.q, inputs.k, inputs.v, **arguments, return_softmax=True)
    for one, other in zip(whole, groups, strict=True):
        torch.testing.assert_close(one, other)


# Gradients.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (1, 0)},
        {"softcap": 1.5, "causal": True},
        {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])},
        {"dropout_p": 0.4, "rng_state": torch.tensor([5, 6])},
        {"attention_chunk": 2},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_gradients_of_out_and_lse(options: dict[str, Any]):
    # More queries than keys, so causal and windowed calls have empty rows.
    q = torch.randn(1, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, 3, 1, 4, dtype=torch.float64, requires_grad=True)

    def finite_results(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, _ = attention_reference(q, k, v, **options)
        assert lse is not None
        return out, torch.where(lse == NEG_INF, 0.0, lse)

    assert torch.autograd.gradcheck(finite_results, (q, k, v))


def test_gradients_of_packed_sequences():
    cu_seqlens_q = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    cu_seqlens_k = torch.tensor([0, 3, 4, 4], dtype=torch.int32)
    q = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    k = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(5, 1, 2, dtype=torch.float64, requires_grad=True)

    def out_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _, _ = attention_reference(
            q, k, v, causal=True, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k
        )
        return out

    assert torch.autograd.gradcheck(out_only, (q, k, v))


def test_gradients_of_empty_rows_are_zero():
    q = torch.randn(1, 5, 1, 4, requires_grad=True)
    k = torch.randn(1, 2, 1, 4, requires_grad=True)
    v = torch.randn(1, 2, 1, 4, requires_grad=True)
    out, lse, _ = attention_reference(q, k, v, causal=True)
    assert lse is not None
    (out.sum() + lse[:, :, 3:].sum()).backward()
    for x in (q, k, v):
        assert torch.isfinite(x.grad).all()
    assert torch.count_nonzero(q.grad[:, :3]) == 0


# Dropout. The mask itself: test_philox.py.


def test_dropout_scales_survivors_and_leaves_lse_alone():
    q, k, v = torch.randn(1, 20, 2, 8), torch.randn(1, 40, 2, 8), torch.randn(1, 40, 2, 8)
    state = torch.tensor([9, 10])
    out, lse, s_dmask = attention_reference(
        q, k, v, dropout_p=0.3, rng_state=state, return_softmax=True
    )
    _, lse_without, _ = attention_reference(q, k, v)
    assert lse is not None
    assert s_dmask is not None
    torch.testing.assert_close(lse, lse_without)
    assert s_dmask.shape == (1, 2, 128, 128)
    keep = philox.keep_mask(state, 0.3, 1, 2, 20, 40)
    magnitudes = s_dmask[:, :, :20, :40]
    assert torch.equal(magnitudes >= 0, keep)
    assert torch.count_nonzero(s_dmask[:, :, 20:]) + torch.count_nonzero(s_dmask[..., 40:]) == 0
    p = magnitudes.abs() / magnitudes.abs().sum(-1, keepdim=True)
    expected = torch.einsum("bhij,bjhd->bihd", p * keep / 0.7, v)
    torch.testing.assert_close(out, expected)


# The oracle and the inputs it is fed.


ALL_CASES = [
    *cases.MASKS,
    *cases.SCORES,
    *cases.DROPOUT,
    *cases.VARLEN,
    *cases.LAYOUTS,
    *cases.HEADS,
]


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.id)
def test_float32_reference_passes_the_oracle(case: Case):
    """What CPU tensors get from the public functions meets the bounds set for kernels."""
    inputs = make_inputs(case, "cpu")
    state = torch.tensor([1, 2]) if case.dropout_p else None
    expected = oracle.expect(case, inputs, state, return_softmax=True)
    out, lse, s_dmask = attention_reference(
        inputs.q,
        inputs.k,
        inputs.v,
        **oracle.reference_arguments(case, inputs),
        rng_state=state,
        return_softmax=True,
    )
    assert s_dmask is not None
    oracle.check(expected, out, lse)
    oracle.check_s_dmask(expected, s_dmask)


def test_oracle_notices_an_error():
    case = Case()
    inputs = make_inputs(case, "cpu")
    expected = oracle.expect(case, inputs)
    out = expected.out.to(case.torch_dtype)
    oracle.check(expected, out, expected.softmax_lse.float())
    wrong = out.clone()
    wrong[0, 3, 1, 5] += 8 * expected.out_bound
    with pytest.raises(AssertionError, match="out: worst error"):
        oracle.check(expected, wrong, None)
    with pytest.raises(AssertionError, match="NaN"):
        oracle.check(expected, out * float("nan"), None)
    with pytest.raises(AssertionError, match="softmax_lse: worst error"):
        oracle.check(expected, out, expected.softmax_lse.float() + 1e-3)


@pytest.mark.parametrize("case", cases.LAYOUTS, ids=lambda case: case.id)
def test_inputs_lie_in_poisoned_memory_with_the_alignment_asked_for(case: Case):
    inputs = make_inputs(case, "cpu")
    alignments = []
    for x in (inputs.q, inputs.k, inputs.v):
        storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        assert (
            torch.isnan(storage).sum()
            >= storage.numel() - inputs.q.numel() - inputs.k.numel() - inputs.v.numel()
        )
        assert torch.isfinite(x).all()
        numbers = [x.data_ptr() % 4096] + [2 * stride for stride in x.stride()[:-1]]
        alignments.append(math.gcd(16, *numbers))
    assert min(alignments) == (case.align_bytes if case.layout in ("offset", "gaps") else 16)
