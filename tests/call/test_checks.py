"""Every user error names the argument and has its type; what passes becomes the right Problem."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from asked import forward_call
from fakes import qkv, ragged_qkv
from torch import Tensor

import flash_attn
import flash_attn_interface
from flash_attn_interface._common.ask.check import check, check_values
from flash_attn_interface._common.ask.problem import Problem, normalise_window

BF16 = torch.bfloat16


def problem_of(**arguments: Any) -> Problem:
    return check(forward_call(**arguments))


def dense(**changes: Any) -> dict[str, Any]:
    return {**dict(zip("qkv", qkv(), strict=True)), **changes}


def ragged(**changes: Any) -> dict[str, Any]:
    return {**ragged_qkv(), **changes}


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def tensor(*shape: int, dtype: torch.dtype = BF16, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


REJECTED = {
    "q is no tensor": (dense(q=[1.0]), TypeError, "q is list"),
    "v is None": (dense(v=None), TypeError, "v is NoneType"),
    "q is float32": (dense(q=tensor(2, 5, 4, 16, dtype=torch.float32)), TypeError, "q has dtype"),
    "q is fp8": (
        dense(q=tensor(2, 5, 4, 16, dtype=torch.float8_e4m3fn)), NotImplementedError, "fp8"),
    "k has another dtype": (dense(k=tensor(2, 7, 2, 16, dtype=torch.float16)), TypeError, "k has"),
    "v is elsewhere": (dense(v=tensor(2, 7, 1, 24, device="meta")), ValueError, "v is on meta"),
    "q is sparse": (dense(q=tensor(5, 4).to_sparse()), TypeError, "q has layout"),
    "q is packed": (dense(q=tensor(10, 4, 16)), ValueError, r"q has shape .*\(batch, seqlen"),
    "k is packed": (dense(k=tensor(14, 2, 16)), ValueError, "k has shape"),
    "q is a scalar": (dense(q=torch.tensor(1.0, dtype=BF16)), ValueError, "q has shape"),
    "q is dense": (ragged(q=tensor(1, 7, 4, 16)), ValueError, "because cu_seqlens_q"),
    "v is dense": (ragged(v=tensor(1, 7, 1, 24)), ValueError, "because cu_seqlens_k"),
    "batch differs": (dense(q=tensor(3, 5, 4, 16)), ValueError, "3 sequences"),
    "v has another length": (dense(v=tensor(2, 6, 1, 24)), ValueError, "v has shape"),
    "k has another head dim": (dense(k=tensor(2, 7, 2, 8)), ValueError, "k has head_dim 8"),
    "k's heads do not divide": (dense(k=tensor(2, 7, 3, 16)), ValueError, "k has 3 heads"),
    "v's heads do not divide": (dense(v=tensor(2, 7, 3, 24)), ValueError, "v has 3 heads"),
    "k has no head": (dense(k=tensor(2, 7, 0, 16)), ValueError, "k has 0 heads"),
    "q has no head": (dense(q=tensor(2, 5, 0, 16)), ValueError, "0 heads"),
    "no batch": (dict(zip("qkv", qkv(batch=0), strict=True)), ValueError, "0 sequences"),
    "head dim 0": (dense(v=tensor(2, 7, 1, 0)), ValueError, "head_dim is 0"),
    "head dim 577": (
        dense(q=tensor(2, 5, 4, 577), k=tensor(2, 7, 2, 577)), NotImplementedError, "at most 576"),
    "head dim 513 of v": (dense(v=tensor(2, 7, 1, 513)), NotImplementedError, "at most 512"),
    "cu_seqlens is a list": (ragged(cu_seqlens_q=[0, 3, 7]), TypeError, "cu_seqlens_q is list"),
    "cu_seqlens is int64": (
        ragged(cu_seqlens_k=torch.tensor([0, 5, 7])), TypeError, "cu_seqlens_k has dtype"),
    "cu_seqlens is 2-d": (ragged(cu_seqlens_q=int32(0, 3, 7)[None]), ValueError, "batch \\+ 1"),
    "cu_seqlens is empty": (ragged(cu_seqlens_q=int32()), ValueError, "batch \\+ 1"),
    "cu_seqlens of no sequence": (
        ragged(cu_seqlens_q=int32(0), cu_seqlens_k=int32(0)), ValueError, "0 sequences"),
    "cu_seqlens differ in length": (ragged(cu_seqlens_k=int32(0, 7)), ValueError, "2 sequences"),
    "cu_seqlens is strided": (
        ragged(cu_seqlens_k=int32(0, 1, 5, 1, 7, 1)[::2]), ValueError, "cu_seqlens_k has stride"),
    "cu_seqlens is elsewhere": (
        ragged(cu_seqlens_q=int32(0, 3, 7).to("meta")), ValueError, "cu_seqlens_q is on meta"),
    "max_seqlen is missing": (ragged(max_seqlen_q=None), ValueError, "max_seqlen_q is None"),
    "max_seqlen is a float": (ragged(max_seqlen_k=5.0), TypeError, "max_seqlen_k is 5.0"),
    "max_seqlen is negative": (ragged(max_seqlen_k=-1), ValueError, "max_seqlen_k is -1"),
    "seqused has a wrong length": (
        ragged(seqused_k=int32(1, 1, 1)), ValueError, r"expected \(2,\)"),
    "seqused is int64": (dense(seqused_q=torch.tensor([1, 1])), TypeError, "seqused_q has dtype"),
    "window is a number": (dense(window_size=3), TypeError, "window_size is 3"),
    "window is None": (dense(window_size=None), TypeError, "window_size"),
    "window of None": (dense(window_size=(None, 0)), TypeError, "window_size"),
    "window of floats": (dense(window_size=(3.0, 0.0)), TypeError, "window_size"),
    "window of three": (dense(window_size=(1, 2, 3)), ValueError, "has 3 items"),
    "softcap is text": (dense(softcap="30"), TypeError, "softcap is '30'"),
    "softcap is NaN": (dense(softcap=float("nan")), ValueError, "softcap"),
    "scale is a tensor": (dense(softmax_scale=torch.tensor(1.0)), TypeError, "softmax_scale"),
    "scale is infinite": (dense(softmax_scale=float("inf")), ValueError, "softmax_scale"),
    "dropout is None": (dense(dropout_p=None), TypeError, "dropout_p is None"),
    "dropout is 1": (dense(dropout_p=1.0), ValueError, r"dropout_p is 1.0: must be in \[0, 1\)"),
    "dropout is negative": (dense(dropout_p=-0.1), ValueError, "dropout_p"),
    "causal is a tensor": (dense(causal=torch.tensor(True)), TypeError, "causal"),
    "chunk is negative": (dense(attention_chunk=-1), ValueError, "attention_chunk is -1"),
    "chunk is a float": (dense(attention_chunk=4.0), TypeError, "attention_chunk"),
    "slopes are a list": (dense(alibi_slopes=[0.1] * 4), TypeError, "alibi_slopes is list"),
    "slopes are bf16": (dense(alibi_slopes=tensor(4)), TypeError, "alibi_slopes has dtype"),
    "slopes of k's heads": (
        dense(alibi_slopes=torch.ones(2)), ValueError, r"= \(4,\) or \(batch, num_heads_q\)"),
    "slopes of another batch": (dense(alibi_slopes=torch.ones(3, 4)), ValueError, "alibi_slopes"),
    "slopes are elsewhere": (
        dense(alibi_slopes=torch.ones(4, device="meta")), ValueError, "alibi_slopes is on meta"),
}  # fmt: skip


@pytest.mark.parametrize("case", REJECTED)
def test_rejected(case):
    arguments, error, message = REJECTED[case]
    with pytest.raises(error, match=message) as caught:
        problem_of(**arguments)
    assert type(caught.value) is error


@pytest.mark.parametrize("case", REJECTED)
def test_rejected_by_the_public_functions(case):
    """Through the hot path, too, whatever the arguments' types."""
    arguments, error, message = REJECTED[case]
    fa2_only = {"alibi_slopes", "dropout_p"} & set(arguments)
    module = flash_attn if fa2_only else flash_attn_interface
    is_varlen = "cu_seqlens_q" in arguments or {"seqused_q", "seqused_k"} & set(arguments)
    if is_varlen:
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        arguments = {**dict.fromkeys(names), **arguments}
    function = module.flash_attn_varlen_func if is_varlen else module.flash_attn_func
    with pytest.raises(error, match=message):
        function(**arguments)


def test_fa2_varlen_needs_cu_seqlens():
    with pytest.raises(TypeError, match="cu_seqlens_k is None"):
        flash_attn.flash_attn_varlen_func(**ragged(cu_seqlens_k=None))


BAD_LENGTHS = {
    "not from zero": (ragged(cu_seqlens_q=int32(1, 3, 7)), "cu_seqlens_q is .1, 3, 7."),
    "decreasing": (ragged(cu_seqlens_k=int32(0, 8, 7)), "cu_seqlens_k"),
    "past the end": (ragged(cu_seqlens_k=int32(0, 5, 8)), "at most at the 7 rows of k"),
    "longer than stated": (ragged(max_seqlen_q=3), "max_seqlen_q is 3 but .* 4 rows"),
    "more used than there": (ragged(seqused_q=int32(3, 5)), "seqused_q"),
    "negative use": (dense(seqused_k=int32(-1, 5)), "seqused_k"),
    "more used than seqlen": (dense(seqused_k=int32(7, 8)), "seqused_k"),
}


@pytest.mark.parametrize("case", BAD_LENGTHS)
def test_lengths_in_cpu_memory_are_read(case):
    arguments, message = BAD_LENGTHS[case]
    call = forward_call(**arguments)
    with pytest.raises(ValueError, match=message):
        check_values(call, check(call))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cu_seqlens_q": int32(0, 0, 4)},  # an empty sequence and rows that belong to none
        {"seqused_q": int32(2, 0)},
        {"max_seqlen_q": 3, "seqused_q": int32(3, 3)},  # the longest in use
        {"max_seqlen_k": 100},
    ],
)
def test_valid_lengths_pass(changes):
    call = forward_call(**ragged(**changes))
    check_values(call, check(call))


# ---- what passes -------------------------------------------------------------------------------


def test_problem_of_a_dense_call():
    problem = problem_of(**dense())
    assert problem == Problem(
        dtype="bf16", head_dim_qk=16, head_dim_v=24, num_heads_q=4, num_heads_k=2, num_heads_v=1,
        batch=2, seqlen_q=5, seqlen_k=7, total_q=10, total_k=14, softmax_scale=0.25,
        return_lse=False, q_strides=(320, 64, 16), k_strides=(224, 32, 16),
        v_strides=(168, 24, 0), vector_bytes=16,
    )  # fmt: skip
    assert (problem.qhead_per_khead, problem.qhead_per_vhead) == (2, 4)


def test_problem_of_a_ragged_call():
    problem = problem_of(**ragged(seqused_k=int32(5, 1), causal=True))
    assert problem.varlen_q and problem.varlen_k and problem.has_seqused_k
    assert (problem.batch, problem.total_q, problem.seqlen_q, problem.seqlen_k) == (2, 7, 4, 5)
    assert problem.q_strides == (0, 64, 16) and problem.causal
    assert not problem.has_seqused_q


def test_numbers_of_any_kind_are_accepted():
    numpy = pytest.importorskip("numpy")
    problem = problem_of(
        **ragged(max_seqlen_q=torch.tensor(4), max_seqlen_k=numpy.int64(5)),
        window_size=torch.tensor([2, 3]), softcap=30, softmax_scale=numpy.float32(0.5),
    )  # fmt: skip
    assert (problem.seqlen_q, problem.seqlen_k, problem.softcap) == (4, 5, 30.0)
    assert (problem.window_left, problem.window_right, problem.softmax_scale) == (2, 3, 0.5)


def test_a_max_seqlen_on_the_device_is_not_read():
    arguments = {
        name: value.to("meta") if isinstance(value, Tensor) else value
        for name, value in ragged().items()
    }
    arguments["max_seqlen_q"] = torch.tensor(4, device="meta")
    assert problem_of(**arguments).seqlen_q == 7


def test_a_max_seqlen_that_is_too_small_does_not_change_the_window():
    problem = problem_of(**ragged(max_seqlen_q=1, max_seqlen_k=1), causal=True)
    assert problem.causal
    assert problem_of(**ragged(max_seqlen_k=1), window_size=(3, -1)).window_left == 3


def test_options_are_normalised():
    assert problem_of(**dense(softcap=-2.0)).softcap == 0.0
    assert problem_of(**dense(alibi_slopes=torch.ones(2, 4))).alibi_strides == (4, 1)
    assert problem_of(**dense(alibi_slopes=torch.ones(4))).alibi_strides == (0, 1)
    assert problem_of(**dense(alibi_slopes=torch.ones(4, 2).T)).alibi_strides == (1, 2)
    assert not problem_of(**dense(return_softmax=True)).return_softmax
    assert problem_of(**dense(return_softmax=True, dropout_p=0.1)).return_softmax
    assert problem_of(**dense(softcap=3.0, dropout_p=0.1)).softcap == 3.0  # upstream refuses both


@pytest.mark.parametrize(
    ("q", "vector_bytes"),
    [
        (torch.zeros(2, 5, 4, 16), 16),
        (torch.zeros(2, 5, 4, 20)[..., :16], 8),
        (torch.zeros(2, 5, 4, 18)[..., :16], 4),
        (torch.zeros(2, 5, 4, 17)[..., :16], 2),
        (torch.zeros(2, 5, 4, 32)[..., 3:19], 2),  # the pointer
        (torch.zeros(2, 5, 4, 32)[..., 8:24], 16),
        (torch.zeros(2, 4, 5, 16).transpose(1, 2), 16),
    ],
)
def test_vector_bytes(q, vector_bytes):
    # Halving the element size keeps the counts: the views above are rebuilt in bf16.
    base = torch.zeros(q.untyped_storage().size() // 4, dtype=BF16)
    view = base.as_strided(q.shape, q.stride(), q.storage_offset())
    assert problem_of(**dense(q=view)).vector_bytes == vector_bytes


def test_strides_of_axes_of_size_one_do_not_matter():
    q = torch.zeros(1, 5, 1, 16, dtype=BF16)
    odd = q.as_strided(q.shape, (7, 16, 3, 1))
    k, v = torch.zeros(2, 1, 7, 1, 16, dtype=BF16)
    assert problem_of(q=odd, k=k, v=v) == problem_of(q=q, k=k, v=v)


def test_problems_are_values():
    first, second = problem_of(**dense()), problem_of(**dense())
    assert first == second and hash(first) == hash(second)
    assert "bf16 qk16 v24, heads 4/2/1, batch 2, seqlen 5x7" in first.describe()
    window = problem_of(**dense(window_size=(2, 1), softcap=3.0))
    assert window.local and window.features() == ("window(2,1)", "softcap=3")


def visible(causal, left, right, seqlen_q, seqlen_k) -> list[tuple[int, int]]:
    """The documented formula."""
    right = 0 if causal else right
    offset = seqlen_k - seqlen_q
    return [
        (i, j)
        for i, j in itertools.product(range(seqlen_q), range(seqlen_k))
        if (left < 0 or j >= i + offset - left) and (right < 0 or j <= i + offset + right)
    ]


def test_normalised_windows_mean_the_same():
    """Exhaustive on small sizes, also for sequences shorter than the bounds that are known."""
    for bound_q, bound_k in itertools.product(range(4), repeat=2):
        for causal, left, right in itertools.product((False, True), range(-2, 5), range(-2, 5)):
            normal = normalise_window(causal, left, right, bound_q, bound_k)
            assert normal[0] == (normal[1:] == (-1, 0))
            for lengths in itertools.product(range(bound_q + 1), range(bound_k + 1)):
                same = visible(causal, left, right, *lengths) == visible(*normal, *lengths)
                assert same, (causal, left, right, bound_q, bound_k, normal, lengths)


def test_one_query_is_not_causal():
    assert not problem_of(**dense(q=tensor(2, 1, 4, 16), causal=True)).causal


# ---- (batch, num_heads, seqlen, head_dim), as scaled_dot_product_attention takes it --------------


@pytest.mark.parametrize("module", [flash_attn, flash_attn_interface], ids=lambda m: m.__name__)
@pytest.mark.parametrize("seqlens", [(5, 7), (1, 7), (3, 20)])
@pytest.mark.parametrize("heads", [(8, 8, 8), (8, 2, 2), (8, 4, 2)])
def test_heads_before_tokens_are_told_where_they_can_be(module, seqlens, heads):
    """Where sizes fit in this order only. Else nobody can tell."""
    q, k, v = (tensor(2, h, s, 16) for h, s in zip(heads, (*seqlens, seqlens[1]), strict=True))
    with pytest.raises(
        ValueError, match=r"num_heads, seqlen, head_dim\), as all three may be"
    ) as e:
        module.flash_attn_func(q, k, v)
    assert "(batch, seqlen, num_heads, head_dim)" in str(e.value)
    assert "transpose(1, 2)" in str(e.value)
    module.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))


def test_a_query_with_heads_before_tokens_is_told_beside_a_cache():
    cache = tensor(2, 20, 2, 16)
    with pytest.raises(ValueError, match=r"num_heads, seqlen, head_dim\), as q may be"):
        flash_attn.flash_attn_with_kvcache(tensor(2, 8, 1, 16), cache, cache, cache_seqlens=4)


def test_other_errors_of_shape_say_nothing_of_another_layout():
    for k in (tensor(2, 7, 3, 16), tensor(2, 6, 2, 16), tensor(2, 0, 3, 16)):
        with pytest.raises(ValueError) as caught:
            flash_attn.flash_attn_func(tensor(2, 5, 4, 16), k, tensor(2, 7, 2, 16))
        assert "transpose" not in str(caught.value)
