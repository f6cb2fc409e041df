"""Forward through the public functions, on the simulator and on the GPU, against the float64
reference.

Cases are in cases.py, tolerances in oracle.py. Inputs lie in NaN, and so does fresh output memory.
"""

from __future__ import annotations

import math
from dataclasses import replace

import calls
import cases
import oracle
import pytest
import torch
from cases import Case, on_both
from conftest import Runner
from inputs import SEEDS, make_inputs
from torch import Tensor

import flash_attn
import flash_attn_interface
from flash_attn_interface._common.ask.call import Tensors
from flash_attn_interface._common.ask.problem import Target
from flash_attn_interface._flash2 import fwd_tiles
from flash_attn_interface._flash2.fwd import ForwardPlan
from flash_attn_interface.tune.measure import make_problem

NEG_INF = float("-inf")


def check_case(runner: Runner, case: Case) -> None:
    inputs = make_inputs(case, runner.device)
    out, softmax_lse, _ = calls.forward(runner, case, inputs)
    assert out.dtype == case.torch_dtype
    assert softmax_lse is not None
    oracle.check(oracle.expect(case, inputs), out, softmax_lse)


@on_both(cases.HEAD_DIMS)
def test_head_dims(runner: Runner, case: Case):
    check_case(runner, case)


@on_both(cases.LENGTHS)
def test_lengths(runner: Runner, case: Case):
    check_case(runner, case)


@on_both(cases.HEADS)
def test_head_counts(runner: Runner, case: Case):
    check_case(runner, case)


@on_both(cases.MASKS)
def test_masks(runner: Runner, case: Case):
    check_case(runner, case)


@on_both(cases.SCORES)
@pytest.mark.filterwarnings("ignore:softmax_scale=0.0")
def test_scores(runner: Runner, case: Case):
    check_case(runner, case)


@on_both(cases.SOFTCAPS)
def test_softcap_of_any_score(runner: Runner, case: Case):
    oracle.check_softcap(runner, case)


@on_both(cases.VARLEN)
def test_varlen(runner: Runner, case: Case):
    check_case(runner, case)


@on_both(cases.LAYOUTS)
def test_layouts(runner: Runner, case: Case):
    check_case(runner, case)


@on_both(cases.COMBINATIONS)
def test_combinations(runner: Runner, case: Case):
    check_case(runner, case)


@pytest.mark.sim
@pytest.mark.parametrize("arch", ["sm_86", "sm_90", "sm_120"])
@pytest.mark.parametrize(
    "case",
    [case.with_dims(128, 256) for case in (cases.HEAD_DIMS[0], cases.VARLEN[1])],
    ids=lambda case: case.id,
)
def test_tiles_of_other_architectures(arch: str, case: Case):
    check_case(Runner("sim", torch.device("cpu"), arch), case)


_WIDE = Case(batch=1, seqlen_q=70, seqlen_k=300).with_dims(256, 256)
IN_CHUNKS = [
    _WIDE.but(seqlen_k=256),  # no tile needs a mask
    _WIDE.but(causal=True, dtype="fp16").with_heads(4, 2, 1).but(seqlen_q=180),
    _WIDE.but(causal=True, seqlen_k=20),  # queries without keys
    _WIDE.but(window_size=(40, 9), seqlen_q=200),
    _WIDE.but(layout="gaps", align_bytes=2, seqlen_k=90),
    _WIDE.but(layout="gaps", align_bytes=8, seqlen_k=90).with_dims(192, 208),
    _WIDE.but(lengths_q=(37, 0, 65, 1), lengths_k=(41, 12, 0, 130), tail=5),
]


@pytest.mark.sim
@pytest.mark.parametrize("case", IN_CHUNKS, ids=lambda case: case.id)
def test_first_keys_that_arrive_in_chunks(case: Case):
    """The tile of wide heads where shared memory has room for it."""
    check_case(Runner("sim", torch.device("cpu"), "sm_90"), case)


@pytest.mark.sim
@pytest.mark.parametrize("causal", [False, True])
def test_chunks_leave_every_bit_as_it_is(causal: bool):
    problem = make_problem("bf16", (256, 256), causal, batch=1, heads=1, seqlen_q=150, seqlen_k=270)
    target = Target("sm_90", 0, simulated=True)
    chunked = fwd_tiles.forward_tile(problem, "sm_90")
    assert chunked.prologue_chunks == 4
    generator = torch.Generator().manual_seed(SEEDS.randrange(2**32))
    q, k, v = (torch.randn(1, n, 1, 256, generator=generator).bfloat16() for n in (150, 270, 270))
    plans = [
        ForwardPlan(problem, target, replace(chunked, prologue_chunks=chunks)) for chunks in (4, 1)
    ]
    first, second = (plan.run(Tensors(q, k, v))[0] for plan in plans)
    assert torch.equal(first, second)


@on_both(cases.LARGE)
def test_large(runner: Runner, case: Case):
    check_case(runner, case)


# Dropout. The mask is exactly the reference's, so results are compared like any other.


@on_both(cases.DROPOUT)
def test_dropout(runner: Runner, case: Case):
    inputs = make_inputs(case, runner.device)
    torch.manual_seed(1234)
    rng_state = calls.draw_rng_state(runner.device)
    torch.manual_seed(1234)
    out, softmax_lse, s_dmask = calls.forward(runner, case, inputs)
    expected = oracle.expect(case, inputs, rng_state, return_softmax=True)
    oracle.check(expected, out, softmax_lse)
    assert s_dmask is not None
    oracle.check_s_dmask(expected, s_dmask)


DROPOUT_CASE = cases.DROPOUT[0]


@on_both([DROPOUT_CASE])
def test_dropout_is_repeated_by_the_same_seed_only(runner: Runner, case: Case):
    inputs = make_inputs(case, runner.device)
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(calls.forward(runner, case, inputs, return_attn_probs=False)[0])
    results.append(calls.forward(runner, case, inputs, return_attn_probs=False)[0])  # next draw
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[2], results[3])


@on_both([DROPOUT_CASE])
def test_dropout_fraction(runner: Runner, case: Case):
    _, _, s_dmask = calls.forward(runner, case, make_inputs(case, runner.device))
    assert s_dmask is not None
    scores = s_dmask[:, :, : case.seqlen_q, : case.seqlen_k]
    dropped = (scores < 0).double().mean().item()
    expected = 1.0 - (math.floor((1.0 - case.dropout_p) * 255.0) + 1.0) / 256.0
    assert abs(dropped - expected) <= 6.0 * math.sqrt(expected / scores.numel()) + 1e-3


@on_both([Case()])
def test_no_dropout_gives_an_empty_s_dmask(runner: Runner, case: Case):
    inputs = make_inputs(case, runner.device)
    result = runner.call(
        flash_attn.flash_attn_func, inputs.q, inputs.k, inputs.v, return_attn_probs=True
    )
    assert len(result) == 3
    assert result[2].shape == (0,)


# Relations between calls that hold bit by bit, because they are the same arithmetic.


@on_both([Case(), Case(causal=True), cases.VARLEN[0]])
def test_results_are_repeatable_and_do_not_depend_on_the_lse(runner: Runner, case: Case):
    inputs = make_inputs(case, runner.device)
    out, softmax_lse, _ = calls.forward(runner, case, inputs)
    again, softmax_lse_again, _ = calls.forward(runner, case, inputs)
    without, _, _ = calls.forward(runner, case, inputs, return_attn_probs=False)
    assert torch.equal(out, again)
    assert torch.equal(out, without)
    assert softmax_lse is not None
    assert softmax_lse_again is not None
    assert torch.equal(softmax_lse, softmax_lse_again)


@on_both([Case(causal=True, batch=3)])
def test_a_sequence_does_not_depend_on_its_batch(runner: Runner, case: Case):
    inputs = make_inputs(case, runner.device)
    out, _, _ = calls.forward(runner, case, inputs)
    alone = runner.call(
        flash_attn_interface.flash_attn_func,
        *(x[1:2] for x in (inputs.q, inputs.k, inputs.v)),
        causal=True,
    )
    assert torch.equal(out[1:2], alone)


@on_both([Case(causal=True), Case(causal=True, seqlen_q=140, seqlen_k=40)])
def test_causal_is_a_window_without_left_and_with_right_zero(runner: Runner, case: Case):
    inputs = make_inputs(case, runner.device)
    causal, _, _ = calls.forward(runner, case, inputs)
    window, _, _ = calls.forward(runner, case.but(causal=False, window_size=(-1, 0)), inputs)
    forced, _, _ = calls.forward(runner, case.but(causal=True, window_size=(-1, 7)), inputs)
    assert torch.equal(causal, window)
    assert torch.equal(causal, forced)


@on_both([Case(window_size=(17, 9))])
@pytest.mark.parametrize("as_type", [list, torch.tensor])
def test_window_may_be_any_pair(runner: Runner, case: Case, as_type: type):
    inputs = make_inputs(case, runner.device)
    out, _, _ = calls.forward(runner, case, inputs)
    pair = as_type(case.window_size)
    other = runner.call(
        flash_attn_interface.flash_attn_func, inputs.q, inputs.k, inputs.v, window_size=pair
    )
    assert torch.equal(out, other)


@on_both([Case(causal=True, seqlen_q=50, seqlen_k=50).with_dims(32, 32)])
def test_packed_functions_are_views(runner: Runner, case: Case):
    qkv = torch.randn(2, 50, 3, 2, 32, dtype=case.torch_dtype, device=runner.device)
    q, k, v = qkv.unbind(2)
    expected = runner.call(flash_attn.flash_attn_func, q, k, v, causal=True)
    for out in (
        runner.call(flash_attn.flash_attn_qkvpacked_func, qkv, causal=True),
        runner.call(flash_attn.flash_attn_kvpacked_func, q, qkv[:, :, 1:], causal=True),
        runner.call(flash_attn_interface.flash_attn_qkvpacked_func, qkv, causal=True),
        runner.call(
            flash_attn_interface.flash_attn_qkvpacked_func,
            qkv.flatten(2, 3),
            causal=True,
            num_heads_q=2,
        ),
    ):
        assert torch.equal(out, expected)


@on_both([cases.VARLEN[0].but(lengths_k=(37, 0, 65, 1), causal=True).with_dims(32, 32)])
def test_packed_varlen_functions_are_views(runner: Runner, case: Case):
    inputs = make_inputs(case, runner.device)
    qkv = torch.stack([inputs.q, inputs.k, inputs.v], dim=1)
    cu_seqlens, longest = inputs.cu_seqlens_q, inputs.max_seqlen_q
    expected, _, _ = calls.forward(runner, case, inputs)
    packed = runner.call(
        flash_attn.flash_attn_varlen_qkvpacked_func, qkv, cu_seqlens, longest, causal=True
    )
    kv_packed = runner.call(
        flash_attn.flash_attn_varlen_kvpacked_func,
        inputs.q,
        qkv[:, 1:],
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        causal=True,
    )
    assert torch.equal(packed, expected)
    assert torch.equal(kv_packed, expected)


@on_both([Case(causal=True, seqlen_q=50, seqlen_k=50)])
def test_a_last_dim_with_gaps_is_copied(runner: Runner, case: Case):
    inputs = make_inputs(case, runner.device)
    expected, _, _ = calls.forward(runner, case, inputs)
    q, k, v = (
        torch.stack([x, x * math.nan], dim=-1)[..., 0] for x in (inputs.q, inputs.k, inputs.v)
    )
    assert q.stride(-1) == 2
    out = runner.call(flash_attn_interface.flash_attn_func, q, k, v, causal=True)
    assert torch.equal(out, expected)


@on_both([cases.VARLEN[0].but(causal=True)])
def test_packed_sequences_equal_separate_calls(runner: Runner, case: Case):
    """Bounds only: packed and dense may cut tiles differently."""
    inputs = make_inputs(case, runner.device)
    out, _, _ = calls.forward(runner, case, inputs)
    assert inputs.cu_seqlens_q is not None
    assert inputs.cu_seqlens_k is not None
    starts_q, starts_k = inputs.cu_seqlens_q.tolist(), inputs.cu_seqlens_k.tolist()
    rows_q, rows_k = slice(*starts_q[2:4]), slice(*starts_k[2:4])
    alone = runner.call(
        flash_attn_interface.flash_attn_func,
        inputs.q[None, rows_q],
        inputs.k[None, rows_k],
        inputs.v[None, rows_k],
        causal=True,
    )
    bound = oracle.expect(case, inputs).out_bound
    assert (out[rows_q].double() - alone[0].double()).abs().max() <= 2 * bound


# Sizes at the edge.


def qkv_of(runner: Runner, seqlen_q: int, seqlen_k: int) -> tuple[Tensor, Tensor, Tensor]:
    def tensor(seqlen: int, dim: int) -> Tensor:
        return torch.randn(2, seqlen, 2, dim, device=runner.device).bfloat16()

    return tensor(seqlen_q, 32), tensor(seqlen_k, 32), tensor(seqlen_k, 64)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 5), (0, 0), (3, 0)])
def test_no_queries_or_no_keys(runner: Runner, seqlen_q: int, seqlen_k: int):
    q, k, v = qkv_of(runner, seqlen_q, seqlen_k)
    out, lse = runner.call(
        flash_attn_interface.flash_attn_func, q, k, v, causal=True, return_attn_probs=True
    )
    assert out.shape == (2, seqlen_q, 2, 64)
    assert lse.shape == (2, 2, seqlen_q)
    assert torch.count_nonzero(out) == 0
    assert (lse == NEG_INF).all()


@pytest.mark.sim
def test_a_max_seqlen_that_is_too_small_is_an_error_where_lengths_can_be_read():
    case = cases.VARLEN[0].but(max_seqlen="small")
    runner = Runner("sim", torch.device("cpu"))
    with pytest.raises(ValueError, match="max_seqlen"):
        calls.forward(runner, case, make_inputs(case, "cpu"))


@on_both([Case(batch=3, seqlen_q=5, seqlen_k=7).with_heads(300, 300, 300)])
def test_many_units_are_decoded_right(runner: Runner, case: Case):
    check_case(runner, case)


@on_both([Case(q_factor=3000.0, dtype="bf16"), Case(q_factor=3000.0, causal=True, dtype="bf16")])
def test_scores_far_beyond_exp_range(runner: Runner, case: Case):
    """Scores of +-10^4: without a running maximum exp would overflow; here it selects one key."""
    inputs = make_inputs(case, runner.device)
    out, softmax_lse, _ = calls.forward(runner, case, inputs)
    oracle.check(oracle.expect(case, inputs), out, softmax_lse)


@on_both([Case(causal=True)])
def test_neg_inf_free_when_all_scores_are_very_negative(runner: Runner, case: Case):
    """Rows whose every score is below -10^4 are not empty.

    Not far below: the exponent is an fp32 of the score's size, so at 10^5 the largest probability
    comes out as 2^(+-0.01) and rounds to a neighbour of 1.
    """
    inputs = make_inputs(case, runner.device)
    inputs.q.copy_(torch.full_like(inputs.q, 300.0))
    inputs.k.copy_(-10.0 - inputs.k.abs() * 5.0)
    out, softmax_lse, _ = calls.forward(runner, case, inputs)
    oracle.check(oracle.expect(case, inputs), out, softmax_lse)
