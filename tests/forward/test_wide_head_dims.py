"""Head dims beyond 256, up to 576 of q and k and 512 of v: the reference, the Ampere forward and
decoding on the archs that differ in shared memory, and what refuses the rest. The Hopper forward's
own: test_hopper_forward.py and test_hopper_forward_wide.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import cache_cases
import calls
import oracle
import pytest
import test_backward as backward_tests
import torch
from cache_cases import CacheCase, call, make_cache
from cases import Case
from conftest import Runner
from inputs import make_inputs
from test_compile_flash2 import FEATURES, problem
from test_forward import check_case

import flash_attn
import flash_attn_interface
from flash_attn_interface._common.runtime import arch as arch_table
from flash_attn_interface._flash2 import part_tiles
from flash_attn_interface.call import backends, dispatch

PAIRS = [(512, 512), (576, 512), (256, 512), (512, 64), (320, 384), (264, 40)]
SIM_ARCHS = ("sm_80", "sm_86", "sm_90")


@pytest.fixture(autouse=True)
def without_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On an H100 too, the Ampere tree is what is tested here."""
    monkeypatch.setattr(backends, "hopper", lambda: None)
    dispatch.forget_plans()
    yield
    dispatch.forget_plans()


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> Runner:
    """A simulated GPU of this arch, or the GPU."""
    if request.param == "gpu":
        return Runner("gpu", torch.device("cuda"))
    return Runner("sim", torch.device("cpu"), request.param)


def everywhere(some: Iterable[Any], archs: Iterable[str] = SIM_ARCHS) -> pytest.MarkDecorator:
    """Parametrises (machine, case): each case on the simulated archs and on the GPU."""
    params = []
    for case in some:
        for arch in archs:
            params.append(pytest.param(arch, case, id=f"{arch}-{case.id}", marks=pytest.mark.sim))
        params.append(pytest.param("gpu", case, id=f"gpu-{case.id}", marks=pytest.mark.gpu))
    return pytest.mark.parametrize(("machine", "case"), params, indirect=["machine"])


# ---- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", PAIRS, ids=str)
def test_the_reference_agrees_with_torch(dims: tuple[int, int]):
    """Forward and backward of CPU tensors in bf16, against torch in float64."""
    shapes = ((2, 7, 2, dims[0]), (2, 9, 2, dims[0]), (2, 9, 2, dims[1]))
    ours = [torch.randn(shape).to(torch.bfloat16).requires_grad_() for shape in shapes]
    theirs = [x.detach().double().transpose(1, 2).requires_grad_() for x in ours]
    out = flash_attn_interface.flash_attn_func(*ours)
    expected = torch.nn.functional.scaled_dot_product_attention(*theirs)
    dout = torch.randn_like(out)
    out.backward(dout)
    expected.backward(dout.double().transpose(1, 2))
    results = [(out, expected)] + [(x.grad, y.grad) for x, y in zip(ours, theirs, strict=True)]
    for got, want in results:
        assert got is not None and want is not None
        error = (got.double() - want.transpose(1, 2)).abs().max()
        assert error < 2**-6 * want.abs().max()  # two roundings to bf16


@pytest.mark.parametrize("name", ["k", "v"])
def test_beyond_the_limits(name: str):
    dims = {"k": (577, 8), "v": (8, 513)}[name]
    q, k, v = (torch.zeros(1, 3, 1, dim, dtype=torch.bfloat16) for dim in (dims[0], *dims))
    with pytest.raises(NotImplementedError, match=f"{name}: head_dim is {max(dims)}, at most"):
        flash_attn_interface.flash_attn_func(q, k, v)


# ---- the Ampere forward --------------------------------------------------------------------------

_SMALL = Case(seqlen_q=70, seqlen_k=83, batch=1)
FORWARD = [
    _SMALL.with_dims(512, 64).but(causal=True),
    _SMALL.with_dims(264, 40).with_heads(4, 2, 1).but(window_size=(30, 9)),
    _SMALL.with_dims(576, 256).but(softcap=3.0, dtype="fp16"),
    _SMALL.with_dims(320, 192).but(alibi="heads"),
    _SMALL.with_dims(575, 33),
    Case(lengths_q=(37, 0, 65), lengths_k=(41, 12, 90), causal=True).with_dims(512, 128),
    # V in two parts.
    _SMALL.with_dims(512, 512).but(causal=True),
    _SMALL.with_dims(576, 512).with_heads(4, 2, 1),
    _SMALL.with_dims(320, 384).but(softcap=3.0, window_size=(30, 9)),
    _SMALL.with_dims(40, 300).but(alibi="heads", layout="bhsd"),
    _SMALL.with_dims(33, 257).but(dtype="fp16", align_bytes=2, layout="gaps"),
    Case(lengths_q=(37, 0, 65), lengths_k=(41, 12, 90), tail=5).with_dims(256, 512),
]


@everywhere(FORWARD, ("sm_80", "sm_86"))
def test_forward(machine: Runner, case: Case):
    check_case(machine, case)


@everywhere(
    [
        _SMALL.with_dims(512, 256).but(dropout_p=0.17),
        _SMALL.with_dims(264, 320).but(dropout_p=0.17, causal=True),
    ],
    ("sm_80", "sm_86"),
)
def test_dropout(machine: Runner, case: Case):
    """The mask is exactly the reference's."""
    inputs = make_inputs(case, machine.device)
    torch.manual_seed(1234)
    rng_state = calls.draw_rng_state(machine.device)
    torch.manual_seed(1234)
    out, _, _ = calls.forward(machine, case, inputs, return_attn_probs=False)
    oracle.check(oracle.expect(case, inputs, rng_state), out, None)


@everywhere([_SMALL.with_dims(72, 320).but(dropout_p=0.17)], ("sm_80",))
def test_s_dmask_of_a_v_in_two_parts(machine: Runner, case: Case):
    inputs = make_inputs(case, machine.device)
    narrow = replace(inputs, v=inputs.v[..., :64])
    torch.manual_seed(7)
    want = calls.forward(machine, case, narrow)
    torch.manual_seed(7)
    got = calls.forward(machine, case, inputs)
    assert torch.allclose(got[1], want[1]) and torch.allclose(got[2], want[2])


def test_pages_of_a_v_in_two_parts():
    """The bits of packed keys, as of narrower values."""
    q = torch.randn(70, 2, 72).to(torch.bfloat16)
    k, v = (torch.randn(5 * 16, 1, dim).to(torch.bfloat16) for dim in (72, 320))
    ends_q, ends_k = (torch.tensor(ends, dtype=torch.int32) for ends in ((0, 70), (0, 80)))
    order = torch.tensor([3, 0, 4, 1, 2])
    pages = [torch.empty(5, 16, *x.shape[1:], dtype=x.dtype) for x in (k, v)]
    for x, of_x in zip((k, v), pages, strict=True):
        of_x[order] = x.view(5, 16, *x.shape[1:])
    runner = Runner("sim", torch.device("cpu"))
    function = flash_attn.flash_attn_varlen_func
    packed = runner.call(function, q, k, v, ends_q, ends_k, 70, 80, causal=True)
    table = order.to(torch.int32)[None]
    paged = runner.call(function, q, *pages, ends_q, ends_k, 70, 80, causal=True, block_table=table)
    assert torch.equal(packed, paged)


@pytest.mark.parametrize("arch", arch_table.known_archs())
def test_every_pair_has_a_forward_tile(arch: str):
    """Planning only; validate() checks shared memory and threads against the arch."""
    for feature in FEATURES:
        for head_dim_qk in range(264, 577, 24):
            for head_dim_v in (8, 64, 128, 200, 256, 257, 384, 512):
                asked = problem((head_dim_qk, head_dim_v), feature, "bf16")
                specs = part_tiles.forward_specs(asked, arch)
                assert sum(int(spec["head_dim_v"]) for spec in specs) == head_dim_v


# ---- decoding ------------------------------------------------------------------------------------

_CACHE = CacheCase(num_splits=1, seqlens=(0, 70, 33), capacity=100)
_SPLIT = _CACHE.but(num_splits=3, page_size=16)
DECODE = [
    _CACHE.with_dims(512, 512),
    _SPLIT.with_dims(512, 512).but(seqlen_new=1, rotary_dim=512),
    _SPLIT.with_dims(576, 512).with_heads(16, 1, 1).but(seqlen_q=2, seqlen_new=2, causal=True),
    _SPLIT.with_dims(256, 512).but(dtype="fp16", window_size=(20, 0)),
    _SPLIT.with_dims(512, 64).but(seqlen_new=3, rotary_dim=64, interleaved=False),
    _SPLIT.with_dims(320, 384).but(lengths_q=(1, 0, 4), softcap=2.0),
    _SPLIT.with_dims(264, 40).with_heads(8, 2, 4),
    _SPLIT.with_dims(575, 511).but(alibi=True),
    _SPLIT.with_dims(576, 184).with_heads(40, 1, 1).but(rotary_dim=576, seqlen_new=1),
]


@everywhere(DECODE)
def test_decode(machine: Runner, case: CacheCase):
    tensors = make_cache(case, machine.device)
    expected, k_cache, v_cache = cache_cases.expect(case, tensors)
    out, lse = machine.call(call, case, tensors)
    oracle.check(expected, out, lse)
    if case.seqlen_new:
        for name, wanted in (("k_cache", k_cache), ("v_cache", v_cache)):
            assert torch.allclose(tensors[name].float(), wanted.float(), equal_nan=True, atol=2e-2)


@everywhere([_CACHE.with_dims(512, 256).but(seqlen_q=80, seqlens=(90, 80), causal=True)], ["sm_86"])
def test_prefill_into_a_cache(machine: Runner, case: CacheCase):
    """One split is the forward, where it has such a V."""
    test_decode(machine, case)


def test_qv_goes_with_narrower_queries():
    case = CacheCase(qv=True).with_dims(264, 64).with_heads(8, 1, 1)
    with pytest.raises(NotImplementedError, match="beside qv, head_dim_qk is limited to 256"):
        Runner("sim", torch.device("cpu")).call(call, case, make_cache(case, "cpu"))


# ---- the Ampere backward -------------------------------------------------------------------------

BACKWARD = [
    _SMALL.with_dims(512, 64).but(causal=True),
    _SMALL.with_dims(264, 40).with_heads(8, 2, 4).but(window_size=(30, 9)),
    _SMALL.with_dims(320, 192).with_heads(4, 2, 1).but(softcap=3.0, dtype="fp16"),
    _SMALL.with_dims(575, 33).but(alibi="heads"),
    _SMALL.with_dims(384, 128).but(dropout_p=0.17),
    Case(lengths_q=(37, 0, 65), lengths_k=(41, 12, 90), causal=True).with_dims(576, 64),
]


@everywhere(BACKWARD, ("sm_80", "sm_86"))
def test_backward(machine: Runner, case: Case):
    backward_tests.check_case(machine, case, with_dlse=case.causal)


IN_PARTS = [
    _SMALL.with_dims(512, 512).but(causal=True),
    _SMALL.with_dims(40, 300).with_heads(8, 2, 4).but(softcap=3.0, layout="fused", seqlen_k=70),
    _SMALL.with_dims(264, 320).but(dropout_p=0.17, alibi="heads", dtype="fp16"),
    _SMALL.with_dims(33, 257).with_heads(4, 2, 1).but(layout="gaps", align_bytes=2),
    Case(lengths_q=(37, 0, 65), lengths_k=(41, 12, 90), causal=True, tail=5).with_dims(320, 384),
]


@everywhere(IN_PARTS, ("sm_80", "sm_86"))
def test_backward_in_parts(machine: Runner, case: Case):
    """Of V's columns, two of them or more: sm_86 has no tile of (512, 256)."""
    one = backward_tests.Call(case, machine.device, with_dlse=not case.dropout_p)
    for _ in range(2):  # plans are run again
        grads, softmax_d = one.run(machine)
        backward_tests.check(one, grads)
    assert not torch.isnan(softmax_d[..., : case.seqlen_q if not case.varlen else 37]).any()


@everywhere([_SMALL.with_dims(576, 256), _SMALL.with_dims(512, 200).but(causal=True)], ("sm_80",))
def test_backward_of_the_widest(machine: Runner, case: Case):
    backward_tests.check_case(machine, case)


@everywhere([_SMALL.with_dims(512, 64).but(causal=True).with_heads(4, 2, 1)], ("sm_80",))
@pytest.mark.parametrize("head_dim_v", [64, 320])
def test_deterministic_backward(machine: Runner, case: Case, head_dim_v: int):
    one = backward_tests.Call(case.but(head_dim_v=head_dim_v), machine.device)
    grads, _ = one.run(machine, deterministic=True)
    backward_tests.check(one, grads)
    again, _ = one.run(machine, deterministic=True)
    assert all(torch.equal(x, y) for x, y in zip(grads, again, strict=True))


def test_gradients_through_the_public_function():
    q, k, v = (
        torch.randn(1, 9, 1, dim, dtype=torch.bfloat16, requires_grad=True)
        for dim in (264, 264, 40)
    )
    runner = Runner("sim", torch.device("cpu"))
    out = runner.call(flash_attn_interface.flash_attn_func, q, k, v)
    dout = torch.randn_like(out)
    grads = runner.call(torch.autograd.grad, out, (q, k, v), dout)
    wide = [x.detach().double().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*wide).transpose(1, 2)
    for got, want in zip(grads, torch.autograd.grad(expected, wide, dout.double()), strict=True):
        error = (got.double() - want.transpose(1, 2)).abs().max()
        assert error < 2**-6 * want.abs().max()


@pytest.mark.parametrize("arch", arch_table.known_archs())
def test_every_pair_has_a_backward(arch: str):
    """Planning only. On an A100 and an H100 in at most two parts."""
    for head_dim_qk in range(8, 577, 71):
        for head_dim_v in (8, 64, 200, 256, 257, 384, 512):
            asked = problem((head_dim_qk, head_dim_v), "dropout", "bf16")
            parts = part_tiles.backward_parts(asked, arch)
            assert sum(columns for _, columns in parts) == head_dim_v
            assert len(parts) == 1 or head_dim_qk + head_dim_v > 256
            if arch in ("sm_80", "sm_90"):
                assert len(parts) == (1 if head_dim_v <= 256 else 2)
