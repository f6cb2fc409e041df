"""FlashAttention-2's private operations, as ring attention and TransformerEngine call them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import gradients
import oracle
import pytest
import torch
from conftest import Runner, _runner
from torch import Tensor
from torch.library import opcheck

import flash_attn.flash_attn_interface as fa2
from flash_attn_interface import simulate
from flash_attn_interface._common import env
from flash_attn_interface.call import dispatch
from flash_attn_interface.reference.forward import attention_reference

BF16 = torch.bfloat16
INF = float("inf")

QKV = "q, k, v"
CU = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
BACKWARD = "dout, q, k, v, out, softmax_lse, dq, dk, dv"
WINDOW = "window_size_left, window_size_right"
SIGNATURES = {
    "_flash_attn_forward": f"{QKV}, dropout_p, softmax_scale, causal, {WINDOW}, softcap, "
    "alibi_slopes, return_softmax",
    "_flash_attn_varlen_forward": f"{QKV}, {CU}, dropout_p, softmax_scale, causal, "
    "window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, "
    "return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False, "
    "num_splits=0",
    "_flash_attn_backward": f"{BACKWARD}, dropout_p, softmax_scale, causal, {WINDOW}, softcap, "
    "alibi_slopes, deterministic, rng_state=None",
    "_flash_attn_varlen_backward": f"{BACKWARD}, {CU}, dropout_p, softmax_scale, causal, {WINDOW}, "
    "softcap, alibi_slopes, deterministic, rng_state=None, zero_tensors=False",
}


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("sim", marks=pytest.mark.sim),
        pytest.param("gpu", marks=pytest.mark.gpu),
    ]
)
def machine(request: pytest.FixtureRequest) -> Iterator[Runner]:
    """`cpu`: plain CPU tensors, served by the reference."""
    dispatch.forget_plans()
    yield _runner("gpu" if request.param == "gpu" else "sim") if request.param != "cpu" else None
    dispatch.forget_plans()


def call(machine: Runner | None, function: Any, *args: Any, **kwargs: Any) -> Any:
    if machine is None:
        return function(*args, **kwargs)
    return machine.call(function, *args, **kwargs)


def draw(machine: Runner | None, *shape: int) -> Tensor:
    return torch.randn(shape, device=machine.device if machine else "cpu").to(BF16)


def options(**changes: Any) -> dict[str, Any]:
    """What every operation takes."""
    plain = {
        "dropout_p": 0.0,
        "softmax_scale": 0.3,
        "causal": False,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
    }
    return plain | changes


def forward(machine: Runner | None, q: Tensor, k: Tensor, v: Tensor, **changes: Any) -> Any:
    return call(
        machine, fa2._flash_attn_forward, q, k, v, **options(**changes), return_softmax=False
    )


# ---- what clients inspect ----------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str):
    function = getattr(fa2, name)
    shown = []
    for parameter in inspect.signature(function._init_fn).parameters.values():
        default = "" if parameter.default is parameter.empty else f"={parameter.default}"
        shown.append(parameter.name + default)
    assert ", ".join(shown) == SIGNATURES[name]
    assert inspect.getfullargspec(function._init_fn).args == [
        part.split("=")[0] for part in SIGNATURES[name].split(", ")
    ]


@pytest.mark.parametrize("name", SIGNATURES)
def test_operations_are_registered(name: str):
    function = getattr(fa2, name)
    assert isinstance(function, torch.library.CustomOpDef)
    packet = getattr(torch.ops.flash_attn, name)
    assert getattr(fa2, name.replace("_flash", "_wrapped_flash")) is packet
    mutated = [
        argument.name
        for argument in packet.default._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    assert mutated == (["dq", "dk", "dv"] if "backward" in name else [])


# ---- dense -------------------------------------------------------------------------------------


def test_four_results_by_position(machine):
    q, k, v = draw(machine, 2, 19, 4, 24), draw(machine, 2, 23, 2, 24), draw(machine, 2, 23, 1, 40)
    arguments = (q, k, v, 0.0, 0.3, True, -1, -1, 0.0, None, False)
    out, lse, s_dmask, rng_state = call(machine, fa2._wrapped_flash_attn_forward, *arguments)
    want, want_lse, _ = attention_reference(q, k, v, softmax_scale=0.3, causal=True)
    torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)
    assert s_dmask.shape == (0,) and rng_state.shape == (2,) and rng_state.dtype == torch.int64
    dropped = call(machine, fa2._flash_attn_forward, *arguments[:3], 0.3, *arguments[4:-1], True)
    assert dropped[2].shape == (2, 4, 128, 128) and dropped[3].any()


def test_gradients_into_strided_slices(machine):
    q, k, v = draw(machine, 2, 19, 4, 24), draw(machine, 2, 23, 2, 24), draw(machine, 2, 23, 1, 40)
    out, lse, _, _ = forward(machine, q, k, v, causal=True)
    dout = draw(machine, *out.shape)
    buffers = [
        torch.full((*x.shape[:2], 2 * x.shape[2], x.shape[3]), 7.0, device=x.device, dtype=BF16)
        for x in (q, k, v)
    ]
    slices = [buffer[:, :, ::2] for buffer in buffers]
    softmax_d = call(
        machine, fa2._flash_attn_backward, dout, q, k, v, out, lse, *slices,
        **options(causal=True), deterministic=False,
    )  # fmt: skip
    gradients.check(slices, (q, k, v), (dout,), softmax_scale=0.3, causal=True)
    assert all((buffer[:, :, 1::2] == 7.0).all() for buffer in buffers)
    assert softmax_d.shape == (2, 4, 128) and softmax_d.dtype == torch.float32
    expected = (dout.float() * out.float()).sum(-1).transpose(1, 2)
    torch.testing.assert_close(softmax_d[..., :19], expected, rtol=1e-4, atol=1e-4)


def test_gradients_that_nobody_wants(machine):
    q, k, v = (draw(machine, 1, 9, 2, 16) for _ in range(3))
    out, lse, _, _ = forward(machine, q, k, v)
    dv = torch.empty_like(v)
    arguments = (out, q, k, v, out, lse)
    keywords = {**options(), "deterministic": True}
    call(machine, fa2._flash_attn_backward, *arguments, None, None, dv, **keywords)
    again = torch.empty_like(v)
    call(machine, fa2._flash_attn_backward, *arguments, None, None, again, **keywords)
    assert dv.any() and torch.equal(dv, again)
    assert call(
        machine, fa2._wrapped_flash_attn_backward, *arguments, None, None, None, **keywords
    ).shape == (1, 2, 128)


def test_dropout_is_replayed(machine):
    q, k, v = (draw(machine, 1, 37, 2, 16) for _ in range(3))
    out, lse, _, rng_state = forward(machine, q, k, v, dropout_p=0.4)
    dout = draw(machine, *out.shape)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    keywords = {**options(dropout_p=0.4), "deterministic": False}
    arguments = (dout, q, k, v, out, lse, *grads)
    call(machine, fa2._flash_attn_backward, *arguments, **keywords, rng_state=rng_state)
    gradients.check(
        grads, (q, k, v), (dout,), softmax_scale=0.3, dropout_p=0.4, rng_state=rng_state
    )
    with pytest.raises(ValueError, match="rng_state is None"):
        call(machine, fa2._flash_attn_backward, *arguments, **keywords)


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse) over all keys, from those over parts of them."""
    lse = torch.logsumexp(torch.stack([lse for _, lse in parts]), 0)
    out = sum(out.double() * torch.exp(one - lse).transpose(1, 2)[..., None] for out, one in parts)
    assert isinstance(out, Tensor)
    return out.to(BF16), lse


def test_a_ring_of_key_blocks(machine):
    """Each step has other keys, q all the same; causal: the first block comes before all q."""
    q, k, v = draw(machine, 1, 33, 4, 24), draw(machine, 1, 66, 2, 24), draw(machine, 1, 66, 1, 40)
    blocks = [slice(0, 33), slice(33, 66)]
    parts = []
    for keys, causal in zip(blocks, (False, True), strict=True):
        parts.append(forward(machine, q, k[:, keys], v[:, keys], causal=causal)[:2])
    out, lse = merge(parts)
    want, want_lse, _ = attention_reference(q, k, v, softmax_scale=0.3, causal=True)
    torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)

    dout = draw(machine, *out.shape)
    dq_sum = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    for keys, causal in zip(blocks, (False, True), strict=True):
        dq = torch.empty_like(q)
        call(
            machine, fa2._flash_attn_backward, dout, q, k[:, keys], v[:, keys], out, lse, dq,
            dk[:, keys], dv[:, keys], **options(causal=causal), deterministic=False,
        )  # fmt: skip
        dq_sum += dq
    exact = gradients.reference_gradients(
        q, k, v, (dout,), torch.float64, softmax_scale=0.3, causal=True
    )
    for name, mine, theirs in zip(("dq", "dk", "dv"), (dq_sum, dk, dv), exact, strict=True):
        oracle._assert_close(name, mine.double(), theirs, 0.02 * float(theirs.abs().max()))


@pytest.mark.parametrize("sign", [INF, -INF])
def test_an_infinite_lse_of_either_sign_is_an_empty_row(machine, sign: float):
    q, k, v = draw(machine, 1, 9, 2, 16), draw(machine, 1, 4, 2, 16), draw(machine, 1, 4, 2, 16)
    out, lse, _, _ = forward(machine, q, k, v, causal=True)
    assert lse[:, :, :5].isneginf().all() and not out[:, :5].any()
    lse = torch.where(lse.isinf(), sign, lse)
    dout = draw(machine, *out.shape)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    call(
        machine, fa2._flash_attn_backward, dout, q, k, v, out, lse, *grads, **options(causal=True),
        deterministic=False,
    )  # fmt: skip
    gradients.check(grads, (q, k, v), (dout,), softmax_scale=0.3, causal=True)
    assert not grads[0][:, :5].any()


def test_errors_name_the_argument():
    q, k, v = (draw(None, 1, 9, 2, 16) for _ in range(3))
    out, lse, _, _ = forward(None, q, k, v)
    arguments: dict[str, Any] = {"dout": out, "q": q, "k": k, "v": v, "out": out}
    arguments |= {"softmax_lse": lse, "dq": q.clone(), "dk": k.clone(), "dv": v.clone()}
    for name, wrong, error in (
        ("dout", out[:, :3], ValueError),
        ("softmax_lse", lse.double(), TypeError),
        ("softmax_lse", lse.transpose(1, 2), ValueError),
        ("dk", k.float(), TypeError),
        ("out", out[..., :3], ValueError),
    ):
        with pytest.raises(error, match=f"^{name} has"):
            fa2._flash_attn_backward(
                **(arguments | {name: wrong}), **options(), deterministic=False
            )


# ---- varlen ------------------------------------------------------------------------------------


def ragged(machine: Runner | None) -> dict[str, Any]:
    def ends(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=machine.device if machine else "cpu")

    return {
        "q": draw(machine, 44, 4, 24),
        "k": draw(machine, 44, 2, 24),
        "v": draw(machine, 44, 1, 40),
        "cu_seqlens_q": ends(0, 20, 20, 37),
        "cu_seqlens_k": ends(0, 9, 21, 40),
        "max_seqlen_q": 20,
        "max_seqlen_k": 19,
    }


@pytest.mark.parametrize("zero_tensors", [False, True])
def test_varlen(machine, zero_tensors: bool):
    inputs = ragged(machine)
    q, k, v, cu_q, cu_k, *longest = inputs.values()
    out, lse, s_dmask, rng_state = call(
        machine, fa2._flash_attn_varlen_forward, **inputs, **options(causal=True),
        zero_tensors=zero_tensors,
    )  # fmt: skip
    reference = {
        "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "softmax_scale": 0.3, "causal": True
    }  # fmt: skip
    want, want_lse, _ = attention_reference(q, k, v, **reference)
    torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)
    assert not out[37:].any() and lse[:, 37:].isneginf().all() and lse.shape == (4, 44)
    assert s_dmask.shape == (0,) and rng_state.shape == (2,)

    dout = draw(machine, *out.shape)
    grads = [torch.full_like(x, float("nan")) for x in (q, k, v)]
    softmax_d = call(
        machine, fa2._flash_attn_varlen_backward, dout, q, k, v, out, lse, *grads, cu_q, cu_k,
        *longest, **options(causal=True), deterministic=True, zero_tensors=zero_tensors,
    )  # fmt: skip
    gradients.check(grads, (q, k, v), (dout,), **reference)
    assert not grads[0][37:].any() and not grads[1][40:].any() and not grads[2][40:].any()
    assert softmax_d.shape == (4, 44 + 3 * 128)
    expected = (dout.float() * out.float()).sum(-1).T
    torch.testing.assert_close(softmax_d[:, :20], expected[:, :20], rtol=1e-4, atol=1e-4)
    third = slice(20 + 2 * 128, 37 + 2 * 128)
    torch.testing.assert_close(softmax_d[:, third], expected[:, 20:37], rtol=1e-4, atol=1e-4)


def test_varlen_with_fewer_keys(machine):
    inputs = ragged(machine)
    seqused_k = torch.tensor([4, 0, 19], dtype=torch.int32, device=inputs["q"].device)
    out, *_ = call(
        machine, fa2._flash_attn_varlen_forward, **inputs, **options(), seqused_k=seqused_k
    )
    q, k, v, cu_q, cu_k, *_ = inputs.values()
    want, _, _ = attention_reference(
        q, k, v, softmax_scale=0.3, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, seqused_k=seqused_k
    )
    torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)


# ---- torch's own checks, and differentiation ---------------------------------------------------


def test_opcheck_of_the_dense_operations(machine):
    q, k, v = (draw(machine, 1, 9, 2, 16) for _ in range(3))
    plain = tuple(options().values())
    with simulate_or_not(machine):
        tensors = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        opcheck(fa2._flash_attn_forward, (*tensors, *plain, False), atol=0.02, rtol=0.02)
        out, lse, _, _ = fa2._flash_attn_forward(q, k, v, *plain, False)
        results = [torch.empty_like(x) for x in (q, k, v)]
        opcheck(fa2._flash_attn_backward, (out, q, k, v, out, lse, *results, *plain, False))


def test_opcheck_of_the_varlen_operations():
    q, k, v, *lengths = ragged(None).values()
    plain = tuple(options().values())
    tensors = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    opcheck(fa2._flash_attn_varlen_forward, (*tensors, *lengths, *plain), atol=0.02, rtol=0.02)
    out, lse, _, _ = fa2._flash_attn_varlen_forward(q, k, v, *lengths, *plain)
    results = [torch.empty_like(x) for x in (q, k, v)]
    arguments = (out, q, k, v, out, lse, *results, *lengths, *plain, False)
    opcheck(fa2._flash_attn_varlen_backward, arguments)


def simulate_or_not(machine: Runner | None) -> Any:
    import contextlib

    simulated = machine is not None and machine.name == "sim"
    return simulate(machine.arch) if simulated else contextlib.nullcontext()


def test_the_forwards_are_differentiable(machine):
    inputs = ragged(machine)
    q, k, v, *lengths = inputs.values()
    reference = {"cu_seqlens_q": lengths[0], "cu_seqlens_k": lengths[1], "softmax_scale": 0.3}

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return tuple(fa2._flash_attn_varlen_forward(q, k, v, *lengths, **options())[:2])

    with simulate_or_not(machine):
        _, weights, found = gradients.results_and_gradients(function, (q, k, v), weigh_lse=True)
    gradients.check(found, (q, k, v), weights, **reference)


def test_a_forced_reference_serves_them(monkeypatch):
    monkeypatch.setenv(env.FORCE_BACKEND.name, "reference")
    q, k, v = (draw(None, 1, 9, 2, 16) for _ in range(3))
    with simulate("sm_80"):
        out, lse, _, _ = forward(None, q, k, v)
        grads = [torch.empty_like(x) for x in (q, k, v)]
        fa2._flash_attn_backward(out, q, k, v, out, lse, *grads, **options(), deterministic=False)
    gradients.check(grads, (q, k, v), (out,), softmax_scale=0.3)


def test_the_backward_of_a_sequence_without_keys(machine):
    """Its gradients are zero, and those of its neighbours as always."""
    q, k, v = draw(machine, 24, 4, 16), draw(machine, 13, 2, 16), draw(machine, 13, 2, 32)
    lengths = {
        f"cu_seqlens_{name}": torch.tensor(ends, dtype=torch.int32, device=q.device)
        for name, ends in {"q": (0, 9, 17, 24), "k": (0, 7, 7, 13)}.items()
    }
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with nullcontext() if machine is None else machine.active():
        out, *_ = fa2._flash_attn_varlen_forward(
            q, k, v, *lengths.values(), 9, 7, **options(causal=True)
        )
        dout = draw(machine, *out.shape)
        grads = torch.autograd.grad(out, leaves, dout)
    assert not grads[0][9:17].any()
    plain = [x.detach() for x in leaves]
    gradients.check(grads, plain, (dout,), softmax_scale=0.3, causal=True, **lengths)


OPERATIONS = [
    *(f"flash_attn::{name}" for name in SIGNATURES),
    "flash_attn_3::_flash_attn_forward",
    "flash_attn_3::_flash_attn_backward",
    "flash_attn_interface::attention_forward",
    "flash_attn_interface::attention_backward",
    "flash_attn_interface::append_and_attend",
    "flash_attn_interface::attend_over_cache",
    "flash_attn_interface::combine",
]


@pytest.mark.parametrize("name", OPERATIONS)
def test_one_meta_tensor_among_others_is_an_error(name: str):
    """Of every operation, every tensor: torch asks the meta implementation for shapes then."""
    namespace, operation = name.split("::")
    packet = getattr(getattr(torch.ops, namespace), operation)
    arguments = packet.default._schema.arguments
    values: dict[str, Any] = {"Tensor": torch.zeros(2, 4, 2, 16, dtype=BF16), "int": 1}
    values |= {"float": 0.5, "bool": False, "SymInt": 1, "str": "flash2"}
    given = {}
    for argument in arguments:
        kind = str(argument.type).removeprefix("Optional[").removesuffix("]")
        value = torch.float32 if "dtype" in argument.name else values.get(kind, 1)
        value = [] if argument.name == "packing_heads" else value
        given[argument.name] = value.clone() if isinstance(value, Tensor) else value
    for name, value in given.items():
        if isinstance(value, Tensor):
            with pytest.raises(ValueError, match="move them to one device"):
                packet(**given | {name: value.to("meta")})
