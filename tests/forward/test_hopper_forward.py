"""The Hopper forward through the public functions, on the simulator and on an H100, against the
float64 reference. Cases and bounds are those of the Ampere forward, which also serves what the
Hopper tree refuses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import calls
import cases
import hopper_tree
import oracle
import pytest
import torch
from cases import Case
from conftest import Runner
from inputs import make_inputs

import flash_attn
import flash_attn_interface
from flash_attn_interface._common.ask.problem import Problem, Target
from flash_attn_interface._common.launch import kernels
from flash_attn_interface.call import backends, dispatch
from flash_attn_interface.reference.forward import attention_reference

ARCH = "sm_90a"


@pytest.fixture(autouse=True)
def hopper_plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Installs the tree and collects the plans it makes in this test."""
    tree = hopper_tree.load().BACKEND
    plans = []

    def plan_forward(problem: Problem, target: Target) -> Any:
        plans.append(type(tree).plan_forward(tree, problem, target))
        return plans[-1]

    monkeypatch.setattr(tree, "plan_forward", plan_forward)
    monkeypatch.setattr(backends, "hopper", lambda: tree)
    dispatch.forget_plans()
    yield plans
    dispatch.forget_plans()


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> Runner:
    """Where `param` says: the simulator as an H100, or an H100."""
    device = torch.device("cuda" if request.param == "gpu" else "cpu")
    return Runner(request.param, device, ARCH)


def on_hopper(some: Iterable[Case]) -> pytest.MarkDecorator:
    """Parametrises (machine, case) like `cases.on_both`."""
    params = []
    for case in some:
        if not case.only_gpu:
            params.append(pytest.param("sim", case, id=f"sim-{case.id}", marks=pytest.mark.sim))
        marks = [pytest.mark.gpu, pytest.mark.hopper]
        params.append(pytest.param("gpu", case, id=f"gpu-{case.id}", marks=marks))
    return pytest.mark.parametrize(("machine", "case"), params, indirect=["machine"])


def check_case(machine: Runner, case: Case, plans: list[Any]) -> None:
    inputs = make_inputs(case, machine.device)
    out, softmax_lse, _ = calls.forward(machine, case, inputs)
    assert plans, "the call did not reach the Hopper tree"
    assert softmax_lse is not None
    oracle.check(oracle.expect(case, inputs), out, softmax_lse)


def serves(case: Case) -> bool:
    """TMA needs strides of 16 bytes, so dims that are multiples of 8 in contiguous tensors."""
    dims = (case.head_dim_qk, case.head_dim_v)
    return case.align_bytes == 16 and all(d % 8 == 0 for d in dims)


WIDE = Case(seqlen_q=150, seqlen_k=200, batch=1)  # several tiles of queries and of keys
DIMS = [
    *cases.HEAD_DIMS,
    *[
        WIDE.with_dims(*dims).but(causal=True)
        for dims in [(16, 16), (80, 80), (112, 48), (160, 224)]
    ],
    *[WIDE.with_dims(*dims) for dims in [(72, 104), (256, 192), (64, 256)]],
]


@on_hopper(filter(serves, DIMS))
def test_head_dims(machine: Runner, case: Case, hopper_plans: list[Any]):
    check_case(machine, case, hopper_plans)


LONG = [
    Case(seqlen_q=sq, seqlen_k=sk, batch=1, causal=causal).with_dims(*dims).with_heads(4, 2, 1)
    for sq, sk in [(500, 333), (333, 700), (1, 300), (300, 1)]
    for causal, dims in [(True, (64, 64)), (False, (128, 128)), (True, (128, 128))]
]


@on_hopper([*cases.LENGTHS, *LONG])
def test_lengths(machine: Runner, case: Case, hopper_plans: list[Any]):
    check_case(machine, case, hopper_plans)


@on_hopper(cases.HEADS)
def test_head_counts(machine: Runner, case: Case, hopper_plans: list[Any]):
    check_case(machine, case, hopper_plans)


@on_hopper(
    [
        *cases.MASKS,
        # Warpgroups of one tile that see different key tiles, or none.
        Case(attention_chunk=64, seqlen_q=400, seqlen_k=450, batch=1).with_dims(64, 64),
        Case(attention_chunk=100, seqlen_q=450, seqlen_k=400, batch=1).with_dims(128, 128),
        Case(window_size=(30, 10), seqlen_q=500, seqlen_k=400, batch=1).with_dims(256, 256),
        # Both edges in one key tile, edges between a lane's columns, tiles of 112 and 128 keys.
        Case(window_size=(3, 2), seqlen_q=300, seqlen_k=300, batch=1).with_dims(80, 80),
        Case(window_size=(127, 1), seqlen_q=300, seqlen_k=407, batch=1).with_dims(64, 64),
        Case(window_size=(200, -1), seqlen_q=300, seqlen_k=300, batch=1).with_dims(128, 128),
        # A warpgroup lets more key tiles pass, to its left or right, than the rings hold, and the
        # next tile is drawn only then.
        Case(attention_chunk=1024, seqlen_q=1152, seqlen_k=1152, batch=1)
        .with_dims(64, 64)
        .with_heads(1, 1, 1),
        Case(attention_chunk=960, seqlen_q=1100, seqlen_k=1100, batch=1)
        .with_dims(128, 128)
        .with_heads(1, 1, 1),
    ]
)
def test_masks(machine: Runner, case: Case, hopper_plans: list[Any]):
    check_case(machine, case, hopper_plans)


@on_hopper([*cases.SCORES, Case(softmax_scale=-0.3)])
@pytest.mark.filterwarnings("ignore:softmax_scale=0.0")
def test_scores(machine: Runner, case: Case, hopper_plans: list[Any]):
    check_case(machine, case, hopper_plans)


@on_hopper(cases.SOFTCAPS)
def test_softcap_of_any_score(machine: Runner, case: Case, hopper_plans: list[Any]):
    oracle.check_softcap(machine, case)
    assert hopper_plans


MANY = Case(lengths_q=tuple(range(1, 70)), lengths_k=tuple(range(70, 1, -1)), causal=True)


@on_hopper(
    [
        *[c for c in cases.VARLEN if sum(c.lengths_q) and sum(c.lengths_k)],
        *[c.with_dims(128, 128) for c in cases.VARLEN[:2]],
        MANY,  # more sequences than a warp has lanes
        MANY.but(lengths_q=(200, 3, 129), lengths_k=(190, 130, 260), seqused_k=(60, 0, 200)),
    ]
)
def test_varlen(machine: Runner, case: Case, hopper_plans: list[Any]):
    check_case(machine, case, hopper_plans)


@pytest.mark.parametrize(
    ("machine", "layout"),
    [
        pytest.param(machine, layout, marks=marks)
        for machine, marks in [
            ("sim", [pytest.mark.sim]),
            ("gpu", [pytest.mark.gpu, pytest.mark.hopper]),
        ]
        for layout in ("contiguous", "bhsd", "slice", "one-row", "mixed")
    ],
    indirect=["machine"],
)
def test_partly_used_batches(machine: Runner, layout: str, hopper_plans: list[Any]):
    """(batch, rows, heads, dim) with seqused: behind the rows in use lie NaN and other rows."""
    batch, rows, used = 4, 150, [150, 0, 33, 129]
    if layout == "one-row":
        rows, used = 1, [1, 0, 1, 1]
    values = []
    for dim in (64, 128):
        x = torch.randn(batch, rows, 2, dim, device=machine.device).to(torch.bfloat16)
        for b, count in enumerate(used):
            x[b, count:] = float("nan")
        if layout == "bhsd" or (layout == "mixed" and dim == 128):
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "slice":  # of a larger cache
            whole = torch.full((batch, rows + 13, 2, dim), float("nan"), dtype=x.dtype)
            whole = whole.to(x.device)
            whole[:, :rows] = x
            x = whole[:, :rows]
        values.append(x)
    k, v = values
    q = torch.randn(batch, 70, 4, 64, device=machine.device).to(torch.bfloat16)
    seqused_k = torch.tensor(used, dtype=torch.int32, device=machine.device)
    for causal in (False, True):
        out, lse = machine.call(
            flash_attn_interface.flash_attn_varlen_func, q, k, v, None, None, None, None,
            seqused_k=seqused_k, causal=causal, return_attn_probs=True,
        )  # fmt: skip
        for b, count in enumerate(used):
            want, want_lse, _ = attention_reference(
                *(x[b : b + 1].double() for x in (q, k[:, :count], v[:, :count])), causal=causal
            )
            assert want_lse is not None
            assert (out[b].double() - want[0]).abs().max() < 2e-2
            assert torch.allclose(lse[b].double(), want_lse[0], rtol=1e-4, atol=1e-4)
    assert len(hopper_plans) == 2


def test_sequences_that_are_no_whole_rows_apart_are_refused():
    problem = Problem(
        "bf16", 64, 64, 2, 2, 2, 2, 9, 9, 18, 18, 0.1, has_seqused_k=True,
        q_strides=(1152, 128, 64), k_strides=(1160, 128, 64), v_strides=(1152, 128, 64),
    )  # fmt: skip
    reason = TREE.BACKEND.refuses_forward(problem, Target(ARCH, 0))
    assert reason is not None and "k's batch stride of 1160" in reason


@on_hopper(filter(serves, cases.LAYOUTS))
def test_layouts(machine: Runner, case: Case, hopper_plans: list[Any]):
    check_case(machine, case, hopper_plans)


@on_hopper(cases.COMBINATIONS)
def test_combinations(machine: Runner, case: Case, hopper_plans: list[Any]):
    check_case(machine, case, hopper_plans)


@on_hopper(filter(serves, cases.LARGE))
def test_large(machine: Runner, case: Case, hopper_plans: list[Any]):
    check_case(machine, case, hopper_plans)


@on_hopper([*cases.DROPOUT, cases.DROPOUT[0].with_dims(128, 128).but(softcap=3.0)])
def test_dropout(machine: Runner, case: Case, hopper_plans: list[Any]):
    """The mask is exactly the reference's."""
    inputs = make_inputs(case, machine.device)
    torch.manual_seed(1234)
    rng_state = calls.draw_rng_state(machine.device)
    torch.manual_seed(1234)
    out, _, _ = calls.forward(machine, case, inputs, return_attn_probs=False)
    assert hopper_plans
    oracle.check(oracle.expect(case, inputs, rng_state), out, None)


@on_hopper([Case(), Case(causal=True), cases.VARLEN[1]])
def test_results_are_repeatable(machine: Runner, case: Case, hopper_plans: list[Any]):
    """Whoever draws which tile; and the counter of tiles is left as it was found."""
    inputs = make_inputs(case, machine.device)
    first, lse, _ = calls.forward(machine, case, inputs)
    second, lse_again, _ = calls.forward(machine, case, inputs)
    assert lse is not None and lse_again is not None
    assert torch.equal(first, second) and torch.equal(lse, lse_again)
    if machine.name == "sim":
        assert [int(plan._own_counter) for plan in hopper_plans] == [0] * len(hopper_plans)


TREE = hopper_tree.load()
TILE = TREE.fwd_tiles.ForwardTile
TILES = {
    "ping-pong": TILE(2, 128, ping_pong=True),
    "ping-pong-of-three": TILE(3, 64, num_stages=2, ping_pong=True),
    "one-q-buffer": TILE(2, 128, num_q_buffers=1),
    "three-by-64": TILE(3, 64, num_stages=3),
    "narrow-swizzles": TILE(2, 96, swizzle_qk=64, swizzle_v=32),
    "p-in-smem": TILE(2, 64, p_in_smem=True),
    "p-in-smem-under-o": TILE(3, 80, num_q_buffers=1, ping_pong=True, p_in_smem=True),
}


@pytest.mark.parametrize("name", TILES)
@on_hopper(
    [
        Case(causal=True, seqlen_q=400, seqlen_k=500, batch=1).with_dims(64, 64),
        Case(attention_chunk=70, seqlen_q=400, seqlen_k=400, batch=1).with_dims(64, 64),
        cases.VARLEN[1].but(lengths_q=(200, 3, 129), lengths_k=(190, 130, 260)).with_dims(96, 96),
    ]
)
def test_other_tiles(
    machine: Runner, case: Case, name: str, hopper_plans: list[Any], monkeypatch: pytest.MonkeyPatch
):
    """Ways through the kernel that the table of tiles does not take today."""
    monkeypatch.setattr(TREE.fwd_tiles, "forward_tile", lambda problem: TILES[name])
    check_case(machine, case, hopper_plans)


@pytest.mark.sim
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    "case", [Case(causal=True, seqlen_q=300, seqlen_k=300).with_dims(128, 128), cases.VARLEN[1]]
)
def test_any_order_of_warps(case: Case, seed: int, hopper_plans: list[Any]):
    from flash_attn_interface._common.sim import launcher

    with launcher.checks(seed=seed):
        check_case(Runner("sim", torch.device("cpu"), ARCH), case, hopper_plans)


WIDE_V = Case(seqlen_q=150, seqlen_k=200, batch=1)


@on_hopper(
    [
        WIDE_V.with_dims(64, 512).but(causal=True),
        WIDE_V.with_dims(32, 264).but(softcap=3.0).with_heads(4, 2, 1),
        cases.VARLEN[1].with_dims(64, 320),
    ]
)
def test_wide_v(machine: Runner, case: Case, hopper_plans: list[Any]):
    """Two warpgroups share the columns of O."""
    check_case(machine, case, hopper_plans)


@on_hopper(
    [
        WIDE_V.with_dims(512, 64).but(causal=True),
        WIDE_V.with_dims(264, 40).but(window_size=(60, 9)).with_heads(4, 2, 1),
        WIDE_V.with_dims(576, 256).but(softcap=3.0, dtype="fp16"),
        cases.VARLEN[1].with_dims(512, 128),
        WIDE_V.with_dims(384, 192).but(alibi="heads"),
    ]
)
def test_wide_q(machine: Runner, case: Case, hopper_plans: list[Any]):
    check_case(machine, case, hopper_plans)


@on_hopper([Case(dropout_p=0.17).with_dims(512, 256), Case(dropout_p=0.17).with_dims(320, 64)])
def test_dropout_beside_a_wide_q(machine: Runner, case: Case, hopper_plans: list[Any]):
    test_dropout(machine, case, hopper_plans)


@pytest.mark.sim
@pytest.mark.parametrize("dims", [(64, 512), (264, 40)], ids=str)
def test_the_ampere_tree_serves_the_backward_of_wide_heads(dims: tuple[int, int]):
    tensors = [
        torch.randn(1, 9, 1, dim).to(torch.bfloat16).requires_grad_() for dim in (dims[0], *dims)
    ]
    machine = Runner("sim", torch.device("cpu"), ARCH)
    out = machine.call(flash_attn_interface.flash_attn_func, *tensors)
    grads = machine.call(torch.autograd.grad, out.float().square().sum(), tensors)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    want, _, _ = attention_reference(*exact)
    for got, wanted in zip(grads, torch.autograd.grad(want.square().sum(), exact), strict=True):
        assert (got.double() - wanted).abs().max() < 2**-5 * wanted.abs().max()


GQA = Case(batch=3, seqlen_q=5, seqlen_k=300, causal=True).with_dims(64, 64)


@pytest.mark.parametrize("group", [2, 3, 5, 8])
@on_hopper(
    [
        GQA,
        GQA.but(causal=False, window_size=(90, 20), seqlen_q=70).with_dims(128, 128),
        GQA.but(attention_chunk=70, softcap=2.0).with_dims(32, 264),
        cases.VARLEN[1].but(lengths_q=(20, 0, 3, 1), lengths_k=(190, 30, 0, 260), causal=True),
        cases.VARLEN[1].but(
            lengths_q=(70, 3, 9), lengths_k=(190, 130, 60), seqused_q=(20, 3, 0),
            seqused_k=(60, 0, 50), tail=7,
        ),
    ]
)  # fmt: skip
def test_heads_that_share_keys_share_tiles(
    machine: Runner, case: Case, group: int, hopper_plans: list[Any]
):
    """pack_gqa. Heads 0 to group - 1 and the next ones share a head of k, and more one of v."""
    case = case.with_heads(2 * group, 2, 1)
    inputs = make_inputs(case, machine.device)
    expected = oracle.expect(case, inputs)
    for pack_gqa in (True, False):
        out, lse, _ = calls.forward(machine, case, inputs, pack_gqa=pack_gqa)
        assert (hopper_plans[-1].gqa_group > 1) is pack_gqa
        oracle.check(expected, out, lse)


def test_when_heads_share_tiles():
    """Where it saves tiles, and those are more than the SMs."""

    def group(**changes: Any) -> int:
        problem = Problem(
            "bf16", 128, 128, 32, 8, 8, 64, 1, 999, 64, 64 * 999, 0.1,
            k_strides=(999 * 1024, 1024, 128), v_strides=(999 * 1024, 1024, 128),
        )  # fmt: skip
        return TREE.gqa_packing.group_size(replace(problem, **changes), 2)

    assert group() == 4
    assert group(batch=1, total_q=1) == 1  # 32 CTAs, of which none waits
    assert group(batch=1, total_q=1, pack_gqa=True) == 4
    assert group(seqlen_q=4096, total_q=64 * 4096) == 1  # full tiles anyway
    assert group(pack_gqa=False) == group(alibi=True) == group(dropout_p=0.1, pack_gqa=True) == 1
    assert group(num_heads_q=24, num_heads_k=2, num_heads_v=3, pack_gqa=True) == 4
    assert group(num_heads_q=67, num_heads_k=1, num_heads_v=1, pack_gqa=True) == 1  # 67 > 64 rows


def test_tall_tiles_are_for_many_rows():
    """192 rows of three consumers, P in shared memory: not for a few tiles, windows or chunks."""
    problem = Problem("bf16", 128, 128, 16, 16, 16, 4, 4096, 4096, 4 * 4096, 4 * 4096, 0.1)

    def tall(**changes: Any) -> bool:
        return TREE.fwd_tiles.forward_tile(replace(problem, **changes)).p_in_smem

    assert tall() and tall(causal=True, window_right=0) and tall(head_dim_qk=64)
    assert not tall(seqlen_k=512)
    assert not tall(batch=1, total_q=4096)
    assert not tall(batch=64, seqlen_q=1, total_q=64)
    assert not tall(window_left=100) and not tall(attention_chunk=256) and not tall(softcap=9.0)


def test_o_lies_over_p_where_it_fits():
    tile = TILE(3, 128, num_q_buffers=1, p_in_smem=True)
    q, k, v, p = 3 * 64 * 64 * 2, 2 * 128 * 64 * 2, 2 * 128 * 128 * 2, 3 * 64 * 128 * 2
    assert tile.smem_bytes(64, 128) == q + k + v + p + TREE.fwd_tiles.SMEM_TAIL_BYTES
    assert replace(tile, num_q_buffers=2).smem_bytes(64, 128) - tile.smem_bytes(64, 128) == 3 * q
    assert replace(tile, p_in_smem=False).smem_bytes(64, 128) == tile.smem_bytes(64, 128) + q - p


def test_sm_margin_leaves_sms_to_others():
    problem = Problem("bf16", 64, 64, 64, 64, 64, 8, 999, 999, 999 * 8, 999 * 8, 0.1)
    grids = [
        TREE.BACKEND.plan_forward(replace(problem, sm_margin=margin), Target(ARCH, 99)).grid
        for margin in (0, 32, 10_000)
    ]
    assert grids == [132, 100, 1]


@pytest.mark.sim
def test_sm_margin_reaches_the_plan(hopper_plans: list[Any]):
    machine = Runner("sim", torch.device("cpu"), ARCH)
    x = torch.randn(1, 400, 2, 64, dtype=torch.bfloat16)
    results = [
        machine.call(flash_attn_interface.flash_attn_func, x, x, x, sm_margin=margin)
        for margin in (0, 1)
    ]
    assert [plan.grid for plan in hopper_plans] == [2, 1]
    assert torch.equal(*results)


@pytest.mark.sim
def test_s_dmask_comes_from_the_ampere_kernels(hopper_plans: list[Any]):
    case = cases.DROPOUT[0]
    machine = Runner("sim", torch.device("cpu"), ARCH)
    inputs = make_inputs(case, machine.device)
    result = machine.call(
        flash_attn.flash_attn_func, inputs.q, inputs.k, inputs.v, 0.17, return_attn_probs=True
    )
    assert not hopper_plans and result[2].numel() > 0


def test_kernels_are_loaded_at_the_first_run_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "load", lambda spec, target: pytest.fail("loaded while planning"))
    problem = Problem("bf16", 64, 64, 2, 2, 2, 1, 9, 9, 9, 9, 0.1)
    assert TREE.BACKEND.plan_forward(problem, Target(ARCH, 0)).grid == 2
