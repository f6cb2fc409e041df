"""Forward on problems that hypothesis makes up: any lengths, masks, heads, layouts.

On the simulator the choices that make a new kernel (head dims, dtype, features) are few, so that
kernels are reused.
"""

from __future__ import annotations

import calls
import oracle
import pytest
import torch
from cases import Case
from conftest import Runner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import SEEDS, make_inputs

import flash_attn_interface
from flash_attn_interface.reference.forward import attention_reference


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))


INPUT_SEEDS = st.integers(0, 2**32 - 1)  # drawn too, so that an example can be run again and shrunk

HEADS = [(1, 1, 1), (2, 1, 2), (4, 2, 2), (6, 3, 2), (4, 4, 1)]


@st.composite
def masks(draw: st.DrawFn, longest: int) -> dict[str, object]:
    kind = draw(st.sampled_from(["full", "causal", "window"]))
    if kind == "full":
        return {}
    if kind == "causal":
        return {"causal": True}
    widths = st.integers(-1, longest + 5)
    return {"window_size": (draw(widths), draw(widths))}


@st.composite
def small_cases(draw: st.DrawFn) -> Case:
    """Four kernels at most: full, causal, window, and packed with a window."""
    longest_q, longest_k = draw(st.sampled_from([(90, 90), (150, 60), (60, 150), (150, 400)]))
    options = draw(masks(longest_k))
    case = Case(dtype="bf16", batch=draw(st.integers(1, 2)), **options)
    case = case.but(
        seqlen_q=draw(st.integers(1, longest_q)), seqlen_k=draw(st.integers(1, longest_k))
    )
    case = case.with_heads(*draw(st.sampled_from(HEADS)))
    if "window_size" in options and draw(st.booleans()):
        count = draw(st.integers(1, 3))
        lengths = (
            tuple(draw(st.lists(st.integers(0, longest), min_size=count, max_size=count)))
            for longest in (longest_q, longest_k)
        )
        lengths_q, lengths_k = lengths
        case = case.but(lengths_q=lengths_q, lengths_k=lengths_k, tail=draw(st.integers(0, 5)))
    return case


@st.composite
def any_cases(draw: st.DrawFn) -> Case:
    """The whole product, sizes up to some tiles."""
    longest = draw(st.sampled_from([5, 70, 300, 900]))
    lengths = st.integers(1, longest)
    dims = st.sampled_from([1, 8, 17, 32, 40, 64, 80, 96, 111, 128, 160, 192, 224, 256])
    case = Case(
        dtype=draw(st.sampled_from(["bf16", "fp16"])),
        head_dim_qk=draw(dims),
        head_dim_v=draw(dims),
        batch=draw(st.integers(1, 3)),
        seqlen_q=draw(lengths),
        seqlen_k=draw(lengths),
        softcap=draw(st.sampled_from([0.0, 0.0, 2.0])),
        layout=draw(st.sampled_from(["contiguous", "bhsd", "gaps", "offset"])),
        align_bytes=draw(st.sampled_from([16, 16, 8, 4, 2])),
        **draw(masks(longest)),
    )
    case = case.with_heads(*draw(st.sampled_from(HEADS)))
    if draw(st.booleans()):
        count = draw(st.integers(1, 4))
        some = st.lists(st.integers(0, longest), min_size=count, max_size=count)
        slots_q, slots_k = draw(some), draw(some)
        case = case.but(
            lengths_q=tuple(slots_q), lengths_k=tuple(slots_k), tail=draw(st.integers(0, 9))
        )
    extra = draw(st.sampled_from(["none", "alibi", "chunk", "seqused"]))
    if extra == "alibi":
        case = case.but(alibi=draw(st.sampled_from(["heads", "batched"])))
    elif extra == "chunk":
        case = case.but(attention_chunk=draw(st.integers(1, longest + 9)))
    elif extra == "seqused" and case.varlen:
        case = case.but(
            seqused_q=tuple(draw(st.integers(0, n)) for n in case.lengths_q),
            seqused_k=tuple(draw(st.integers(0, n)) for n in case.lengths_k),
        )
    return case


def check_case(runner: Runner, case: Case, seed: int) -> None:
    SEEDS.seed(seed)
    inputs = make_inputs(case, runner.device)
    out, softmax_lse, _ = calls.forward(runner, case, inputs)
    oracle.check(oracle.expect(case, inputs), out, softmax_lse)


@pytest.mark.sim
@examples(40)
@given(case=small_cases(), seed=INPUT_SEEDS)
def test_simulated(case: Case, seed: int):
    check_case(Runner("sim", torch.device("cpu")), case, seed)


@pytest.mark.sim
@pytest.mark.slow
@examples(60)
@given(case=any_cases(), seed=INPUT_SEEDS)
def test_simulated_product(case: Case, seed: int):
    check_case(Runner("sim", torch.device("cpu")), case, seed)


@pytest.mark.gpu
@examples(25)  # each a new kernel
@given(case=any_cases(), seed=INPUT_SEEDS)
def test_gpu_product(case: Case, seed: int):
    check_case(Runner("gpu", torch.device("cuda")), case, seed)


@pytest.mark.gpu
@examples(200)
@given(case=small_cases(), seed=INPUT_SEEDS)
def test_gpu(case: Case, seed: int):
    check_case(Runner("gpu", torch.device("cuda")), case, seed)


@settings(max_examples=60, deadline=None)
@given(case=any_cases(), seed=INPUT_SEEDS)
def test_reference_keeps_its_own_bounds(case: Case, seed: int):
    """The oracle is not so tight that chance breaks it, over the whole product of cases."""
    SEEDS.seed(seed)
    inputs = make_inputs(case, "cpu")
    out, lse, _ = attention_reference(
        inputs.q, inputs.k, inputs.v, **oracle.reference_arguments(case, inputs)
    )
    oracle.check(oracle.expect(case, inputs), out, lse)


@settings(max_examples=40, deadline=None)
@given(
    seqlen_q=st.integers(1, 12),
    seqlen_k=st.integers(1, 12),
    left=st.integers(-2, 14),
    right=st.integers(-2, 14),
    chunk=st.integers(0, 6),
    causal=st.booleans(),
)
def test_reference_mask_is_the_formula(
    seqlen_q: int, seqlen_k: int, left: int, right: int, chunk: int, causal: bool
):
    """softmax_lse of equal scores counts the visible keys, row by row."""
    q, k = torch.zeros(1, seqlen_q, 1, 2), torch.zeros(1, seqlen_k, 1, 2)
    _, lse, _ = attention_reference(
        q, k, k, causal=causal, window_size=(left, right), attention_chunk=chunk
    )
    assert lse is not None
    off = seqlen_k - seqlen_q

    def visible(i: int, j: int) -> bool:
        limit = 0 if causal else right
        return (
            (left < 0 or j >= i + off - left)
            and (limit < 0 or j <= i + off + limit)
            and (chunk == 0 or (i + off) // chunk == j // chunk)
        )

    counts = [sum(visible(i, j) for j in range(seqlen_k)) for i in range(seqlen_q)]
    torch.testing.assert_close(lse[0, 0].exp(), torch.tensor(counts, dtype=torch.float32))


@pytest.mark.sim
@settings(max_examples=6, deadline=None)
@given(split=st.integers(1, 82), seed=INPUT_SEEDS)
def test_results_over_parts_of_the_keys_merge_by_their_lse(split: int, seed: int):
    """What ring attention relies on: partial outs weighted by exp(lse) give the whole."""
    runner, case = Runner("sim", torch.device("cpu")), Case(batch=1)
    SEEDS.seed(seed)
    inputs = make_inputs(case, "cpu")
    outs, lses = [], []
    for keys in (slice(0, split), slice(split, None)):
        out, lse = runner.call(
            flash_attn_interface.flash_attn_func,
            inputs.q,
            inputs.k[:, keys],
            inputs.v[:, keys],
            return_attn_probs=True,
        )
        outs.append(out.double())
        lses.append(lse.double().transpose(1, 2).unsqueeze(-1))
    total = torch.logaddexp(*lses)
    merged = sum(out * (lse - total).exp() for out, lse in zip(outs, lses, strict=True))
    expected = oracle.expect(case, inputs)
    assert (merged - expected.out).abs().max() <= 2 * expected.out_bound
    assert (total.squeeze(-1).transpose(1, 2) - expected.softmax_lse).abs().max() <= 1e-4
