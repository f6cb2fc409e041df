"""FlashAttention-3's private operations and its library's, as TransformerEngine, Megatron, PyTorch
and xformers call them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import gradients
import oracle
import pytest
import torch
from conftest import Runner, _runner
from test_fa2_extension import poison
from test_private_ops import call, draw, merge, ragged, simulate_or_not
from torch import Tensor
from torch.library import opcheck

import flash_attn_interface as fa3
from flash_attn_interface.call import dispatch
from flash_attn_interface.compat import fa3_library
from flash_attn_interface.reference.forward import attention_reference

INF = float("inf")
FORWARD = (
    "q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, "
    "cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, "
    "page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, "
    "seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, "
    "causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0, softcap=0.0, "
    "rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0"
)
BACKWARD = (
    "dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, "
    "sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, "
    "softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0, "
    "deterministic=False, sm_margin=0"
)


@pytest.fixture(params=["cpu", pytest.param("sim", marks=pytest.mark.sim),
                        pytest.param("gpu", marks=pytest.mark.gpu)])  # fmt: skip
def machine(request: pytest.FixtureRequest) -> Iterator[Runner | None]:
    dispatch.forget_plans()
    yield _runner(request.param) if request.param != "cpu" else None
    dispatch.forget_plans()


@pytest.fixture
def library() -> Any:
    """torch.ops.flash_attn_3 with its operations, whether or not the Hopper tree is installed."""
    fa3_library.register()
    return torch.ops.flash_attn_3


def as_text(function: Any) -> str:
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(
        p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters
    )


def equal_lengths(machine: Runner | None) -> tuple[Tensor, Tensor, Tensor]:
    return draw(machine, 2, 19, 4, 24), draw(machine, 2, 23, 2, 24), draw(machine, 2, 23, 1, 40)


# ---- what clients inspect ----------------------------------------------------------------------


def test_signatures():
    """Megatron reads the forward's from the function or from its _init_fn."""
    assert as_text(fa3._flash_attn_forward._init_fn) == FORWARD
    assert len(FORWARD.split(", ")) == 34
    assert as_text(fa3._flash_attn_backward._init_fn) == BACKWARD


def test_operations_are_registered():
    """Checkpointing policies list the forward by name."""
    for name, written in (("forward", []), ("backward", ["dq", "dk", "dv"])):
        operation = getattr(torch.ops.flash_attn_3, f"_flash_attn_{name}").default
        mutated = [
            argument.name
            for argument in operation._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        assert mutated == written


# ---- dense -------------------------------------------------------------------------------------


def test_dense_as_transformer_engine_calls_it(machine):
    q, k, v = equal_lengths(machine)
    results = call(
        machine, fa3._flash_attn_forward, q, k, v, *[None] * 20, causal=True, softmax_scale=0.3,
        window_size_left=-1, window_size_right=0,
    )  # fmt: skip
    out, lse, out_accum, lse_accum = results
    want, want_lse, _ = attention_reference(q, k, v, softmax_scale=0.3, causal=True)
    torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)
    assert out_accum.numel() == lse_accum.numel() == 0

    dout = draw(machine, *out.shape)
    grads = [poison(x) for x in (q, k, v)]
    softmax_d = call(
        machine, fa3._flash_attn_backward, dout, q, k, v, out, lse, None, None, None, None, 19, 23,
        *grads, softmax_scale=0.3, is_causal=True, window_size_left=-1, window_size_right=0,
        deterministic=True,
    )  # fmt: skip
    gradients.check(grads, (q, k, v), (dout,), softmax_scale=0.3, causal=True)
    assert softmax_d.shape == (2, 4, 128) and softmax_d.dtype == torch.float32
    expected = (dout.float() * out.float()).sum(-1).transpose(1, 2)
    torch.testing.assert_close(softmax_d[..., :19], expected, rtol=1e-4, atol=1e-4)


def test_a_preallocated_result(machine):
    q, k, v = equal_lengths(machine)
    buffer = poison(draw(machine, 2, 19, 4, 40))
    out, *_ = call(machine, fa3._flash_attn_forward, q, k, v, out_=buffer, softcap=3.0)
    assert torch.equal(out, buffer)
    want, _, _ = attention_reference(q, k, v, softcap=3.0)
    torch.testing.assert_close(buffer, want, rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match="out_ has shape"):
        call(machine, fa3._flash_attn_forward, q, k, v, out_=buffer[:, :3])
    with pytest.raises(TypeError, match="out_ has dtype torch.float32"):
        call(machine, fa3._flash_attn_forward, q, k, v, out_=buffer.float())


def test_a_ring_of_key_blocks(machine):
    """Partial gradients from the merged out and lse; the second block is causal."""
    q, k, v = draw(machine, 1, 33, 4, 24), draw(machine, 1, 66, 2, 24), draw(machine, 1, 66, 1, 40)
    steps = ((slice(0, 33), False), (slice(33, 66), True))
    out, lse = merge(
        [
            call(machine, fa3._flash_attn_forward, q, k[:, keys], v[:, keys], causal=causal)[:2]
            for keys, causal in steps
        ]
    )
    dout = draw(machine, *out.shape)
    dq_sum = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    for keys, causal in steps:
        dq = torch.empty_like(q)
        call(
            machine, fa3._flash_attn_backward, dout, q, k[:, keys], v[:, keys], out, lse, dq=dq,
            dk=dk[:, keys], dv=dv[:, keys], is_causal=causal,
        )  # fmt: skip
        dq_sum += dq
    exact = gradients.reference_gradients(q, k, v, (dout,), torch.float64, causal=True)
    for name, mine, theirs in zip(("dq", "dk", "dv"), (dq_sum, dk, dv), exact, strict=True):
        oracle._assert_close(name, mine.double(), theirs, 0.02 * float(theirs.abs().max()))


@pytest.mark.parametrize("sign", [INF, -INF])
def test_an_infinite_lse_of_either_sign_is_an_empty_row(machine, sign: float):
    q, k, v = draw(machine, 1, 9, 2, 16), draw(machine, 1, 4, 2, 16), draw(machine, 1, 4, 2, 16)
    out, lse, *_ = call(machine, fa3._flash_attn_forward, q, k, v, causal=True)
    assert lse[:, :, :5].isneginf().all() and not out[:, :5].any()
    lse = torch.where(lse.isinf(), sign, lse)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    dout = draw(machine, *out.shape)
    names = dict(zip(("dq", "dk", "dv"), grads, strict=True))
    call(machine, fa3._flash_attn_backward, dout, q, k, v, out, lse, is_causal=True, **names)
    gradients.check(grads, (q, k, v), (dout,), causal=True)


def test_the_forward_is_differentiable(machine):
    q, k, v = (x.requires_grad_() for x in equal_lengths(machine))
    with simulate_or_not(machine):
        out, lse, *_ = fa3._flash_attn_forward(q, k, v, causal=True, attention_chunk=8)
        dout, dlse = gradients.random_like(out), gradients.random_like(lse)
        total = gradients.objective((out, lse), (dout, dlse))
        grads = torch.autograd.grad(total, (q, k, v))
    gradients.check(grads, (q, k, v), (dout, dlse), causal=True, attention_chunk=8)


# ---- varlen and caches -------------------------------------------------------------------------


def test_varlen_with_unused_rows(machine):
    inputs = ragged(machine)
    q, k, v, cu_q, cu_k, *longest = inputs.values()
    seqused = {
        name: torch.tensor(values, dtype=torch.int32, device=q.device)
        for name, values in (("seqused_q", (20, 0, 11)), ("seqused_k", (4, 12, 19)))
    }
    out, lse, *_ = call(machine, fa3._flash_attn_forward, **inputs, **seqused, causal=True)
    reference = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "causal": True, **seqused}
    want, want_lse, _ = attention_reference(q, k, v, **reference)
    torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)
    dout = draw(machine, *out.shape)
    grads = [torch.full_like(x, float("nan")) for x in (q, k, v)]
    softmax_d = call(
        machine, fa3._flash_attn_backward, dout, q, k, v, out, lse, cu_q, cu_k,
        seqused["seqused_q"], seqused["seqused_k"], *longest, *grads, is_causal=True,
    )  # fmt: skip
    gradients.check(grads, (q, k, v), (dout,), **reference)
    assert softmax_d.shape == (4, 44 + 3 * 128)


def test_a_cache_with_pages(machine):
    """As Megatron decodes: packed queries, pages, lengths in seqused_k."""
    q = draw(machine, 2, 4, 16)
    k_cache, v_cache = draw(machine, 8, 4, 2, 16), draw(machine, 8, 4, 2, 24)
    table = torch.tensor([[5, 2, 0], [1, 7, -1]], dtype=torch.int32, device=q.device)
    lengths = torch.tensor([9, 5], dtype=torch.int32, device=q.device)
    cu_seqlens_q = torch.tensor([0, 1, 2], dtype=torch.int32, device=q.device)
    out, lse, *_ = call(
        machine, fa3._flash_attn_forward, q, k_cache, v_cache, cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=1, seqused_k=lengths, page_table=table, causal=True, num_splits=0,
    )  # fmt: skip
    assert lse.shape == (4, 2)
    for sequence, length in enumerate((9, 5)):
        pages = table[sequence][: -(-length // 4)].long()
        keys, values = (x[pages].flatten(0, 1)[None, :length] for x in (k_cache, v_cache))
        want, want_lse, _ = attention_reference(q[None, sequence : sequence + 1], keys, values)
        torch.testing.assert_close(out[sequence], want[0, 0], rtol=0.02, atol=0.02)
        torch.testing.assert_close(lse[:, sequence], want_lse[0, :, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_splits", [0, 1])
def test_seqused_k_alone(machine, num_splits: int):
    """A cache without a name: it may be split, and means the same."""
    q, k, v = equal_lengths(machine)
    seqused_k = torch.tensor([23, 6], dtype=torch.int32, device=q.device)
    options: dict[str, Any] = {"seqused_k": seqused_k, "causal": True}
    out, lse, *_ = call(machine, fa3._flash_attn_forward, q, k, v, **options, num_splits=num_splits)
    want, want_lse, _ = attention_reference(q, k, v, **options)
    torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)


def test_appending(machine):
    q, k_new, v_new = (draw(machine, 2, 1, 2, 16) for _ in range(3))
    k_cache, v_cache = draw(machine, 2, 32, 2, 16), draw(machine, 2, 32, 2, 16)
    lengths = torch.tensor([3, 17], dtype=torch.int32, device=q.device)
    out, *_ = call(
        machine, fa3._flash_attn_forward, q, k_cache, v_cache, k_new, v_new, seqused_k=lengths,
        causal=True,
    )  # fmt: skip
    for sequence, length in enumerate((3, 17)):
        assert torch.equal(k_cache[sequence, length], k_new[sequence, 0])
        one = slice(sequence, sequence + 1)
        want, *_ = attention_reference(
            q[one], k_cache[one, : length + 1], v_cache[one, : length + 1]
        )
        torch.testing.assert_close(out[one], want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("lengths", [None, (3, 17)])
def test_qv(machine, lengths):
    """A second query for v: as one query over keys that are k and v side by side."""
    q, qv = draw(machine, 2, 1, 4, 16), draw(machine, 2, 1, 4, 32)
    k, v = draw(machine, 2, 24, 1, 16), draw(machine, 2, 24, 1, 32)
    used = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=q.device)
    out, softmax_lse, *_ = call(
        machine, fa3._flash_attn_forward, q, k, v, qv=qv, seqused_k=used, causal=True
    )
    for sequence, length in enumerate(lengths or (24, 24)):
        one = slice(sequence, sequence + 1)
        keys = torch.cat([k[one, :length], v[one, :length]], -1)
        want, lse, *_ = attention_reference(
            torch.cat([q[one], qv[one]], -1).double(), keys.double(), v[one, :length].double()
        )
        torch.testing.assert_close(out[one].double(), want, rtol=0.02, atol=0.02)
        torch.testing.assert_close(softmax_lse[one].double(), lse.double(), rtol=1e-4, atol=1e-4)


def test_errors_name_the_argument():
    q, k, v = equal_lengths(None)
    table = torch.zeros(2, 1, dtype=torch.int32)
    lengths = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match="^cu_seqlens_k is given together with qv"):
        fa3._flash_attn_forward(q, k, v, qv=q, cu_seqlens_k=lengths)
    with pytest.raises(ValueError, match="^cu_seqlens_k is given together with page_table"):
        fa3._flash_attn_forward(q, k, v, page_table=table, cu_seqlens_k=lengths)
    with pytest.raises(NotImplementedError, match="^seqused_q is not supported together with page"):
        fa3._flash_attn_forward(q, k, v, page_table=table, seqused_q=lengths)
    with pytest.raises(NotImplementedError, match="no gradient with a key and value cache"):
        index = torch.tensor([0, 1], dtype=torch.int32)
        out, *_ = fa3._flash_attn_forward(q.requires_grad_(), k, v, kv_batch_idx=index)
        out.sum().backward()


# ---- torch's own checks ------------------------------------------------------------------------


def test_opcheck():
    q, k, v = equal_lengths(None)
    tensors = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    opcheck(fa3._flash_attn_forward, tensors, {"causal": True}, atol=0.02, rtol=0.02)
    out, lse, *_ = fa3._flash_attn_forward(q, k, v)
    grads = dict(zip(("dq", "dk", "dv"), (torch.empty_like(x) for x in (q, k, v)), strict=True))
    opcheck(fa3._flash_attn_backward, (out, q, k, v, out, lse), {"is_causal": True, **grads})
    *inputs, longest_q, longest_k = ragged(None).values()
    names = {"cu_seqlens_q": inputs.pop(3), "cu_seqlens_k": inputs.pop(3)}
    names |= {"max_seqlen_q": longest_q, "max_seqlen_k": longest_k}
    opcheck(fa3._flash_attn_forward, inputs, names, atol=0.02, rtol=0.02)


def test_compiled_and_what_is_not():
    q, k, v = equal_lengths(None)
    compiled = torch.compile(fa3._flash_attn_forward, fullgraph=True, backend="aot_eager")
    for mine, want in zip(compiled(q, k, v), fa3._flash_attn_forward(q, k, v), strict=True):
        torch.testing.assert_close(mine, want)
    out_ = q.new_empty(2, 19, 4, 40)
    with pytest.raises(Exception, match="out_ under torch.compile"):
        compiled(q, k, v, out_=out_)


# ---- the operations of FlashAttention-3's library ----------------------------------------------


def test_schemas_are_those_that_clients_compare_with(library):
    """Defaults of the functions agree with them too: torch leaves such arguments out."""
    for text in fa3_library.SCHEMAS:
        schema = torch._C.parse_schema(f"flash_attn_3::{text}")
        name = schema.name.removeprefix("flash_attn_3::")
        registered = getattr(library, name).default._schema
        assert registered.is_backward_compatible_with(schema)
        parameters = inspect.signature(getattr(fa3_library, name)).parameters
        assert list(parameters) == [argument.name for argument in schema.arguments]
        for argument in schema.arguments:
            default = parameters[argument.name].default
            assert argument.has_default_value() == (default is not inspect.Parameter.empty)
            assert not argument.has_default_value() or argument.default_value == default


def test_registering_twice_is_harmless(library):
    before = library.fwd.default
    fa3_library.register()
    assert library.fwd.default is before


def test_the_library_as_pytorch_calls_it(machine, library):
    """34 arguments by position; q, k, v and out are transposed views, as SDPA has them."""
    q, k, v, out = (
        x.transpose(1, 2).contiguous().transpose(1, 2)
        for x in (*equal_lengths(machine), draw(machine, 2, 19, 4, 40))
    )
    out.fill_(float("nan"))
    results = call(
        machine, library.fwd, q, k, v, None, None, None, out, *[None] * 5, 19, 23, *[None] * 9,
        0.3, True, -1, -1, 0, 0.0, True, None, 0, None, 0,
    )  # fmt: skip
    assert len(results) == 4 and results[0] is out
    want, want_lse, _ = attention_reference(q, k, v, softmax_scale=0.3, causal=True)
    torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)
    torch.testing.assert_close(results[1], want_lse, rtol=1e-4, atol=1e-4)

    dout = draw(machine, *out.shape)
    grads = [torch.empty_like(x).fill_(float("nan")) for x in (q, k, v)]
    assert [x.stride() for x in grads] == [x.stride() for x in (q, k, v)]
    results = call(
        machine, library.bwd, dout, q, k, v, out, results[1], *grads, None, None, None, None, 19,
        23, 0.3, True, -1, -1, 0.0, True, 0,
    )  # fmt: skip
    gradients.check(grads, (q, k, v), (dout,), softmax_scale=0.3, causal=True)
    assert len(results) == 8 and results[3].shape == (2, 4, 128)
    assert all(mine is theirs for mine, theirs in zip(results[:3], grads, strict=True))


def test_the_library_knows_no_autograd(library):
    q, k, v = (x.requires_grad_() for x in equal_lengths(None))
    assert not library.fwd(q, k, v)[0].requires_grad


def test_the_library_under_fake_tensors(library):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(x) for x in equal_lengths(None))
        out, lse, *_ = library.fwd(q, k, v)
        assert out.shape == (2, 19, 4, 40) and lse.shape == (2, 4, 19)
        assert library.bwd(out, q, k, v, out, lse)[2].shape == v.shape


def test_combine_and_metadata(library):
    parts, lse = torch.randn(3, 2, 5, 4, 8), torch.randn(3, 2, 4, 5).transpose(2, 3)
    merged, merged_lse = library.fwd_combine(parts, lse, None, torch.bfloat16)
    want, want_lse = fa3.flash_attn_combine(parts, lse, out_dtype=torch.bfloat16)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, want) and torch.equal(merged_lse, want_lse)
    lengths = torch.tensor([3, 4], dtype=torch.int32)
    metadata = library.get_scheduler_metadata(2, 1, 64, 4, 2, 16, 16, torch.bfloat16, lengths)
    assert torch.equal(metadata, fa3.get_scheduler_metadata(2, 1, 64, 4, 2, 16, lengths))


def test_qv_has_no_gradient_and_says_so(machine):
    q, qv = draw(machine, 2, 1, 4, 16), draw(machine, 2, 1, 4, 32)
    k, v = draw(machine, 2, 24, 1, 16), draw(machine, 2, 24, 1, 32)
    for leaf in (q, k, v, qv):
        leaf.requires_grad_()
        out, *_ = call(machine, fa3._flash_attn_forward, q, k, v, qv=qv)
        with pytest.raises(NotImplementedError, match="no gradient with qv.*concatenate"):
            out.sum().backward()
        leaf.requires_grad_(False)


def test_a_packed_lse_may_have_a_batch_of_one(machine, library):
    """xformers passes (1, num_heads_q, total_q) to bwd."""
    q, k, v, cu_q, cu_k, *longest = ragged(machine).values()
    out, lse, *_ = call(
        machine, library.fwd, q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
        max_seqlen_q=longest[0], max_seqlen_k=longest[1],
    )  # fmt: skip
    dout = draw(machine, *out.shape)
    results = [
        call(
            machine,
            library.bwd,
            dout,
            q,
            k,
            v,
            out,
            given,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            max_seqlen_q=longest[0],
            max_seqlen_k=longest[1],
            deterministic=True,
        )  # fmt: skip
        for given in (lse, lse[None])
    ]
    for one, other in zip(*(each[:3] for each in results), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="softmax_lse has shape"):
        call(
            machine, library.bwd, dout, q, k, v, out, torch.stack((lse, lse)), cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k, max_seqlen_q=longest[0], max_seqlen_k=longest[1],
        )  # fmt: skip


def test_the_library_refuses_a_meta_tensor_among_others(library):
    q = draw(None, 1, 5, 2, 16)
    with pytest.raises(ValueError, match="v is on meta but q is on cpu"):
        library.fwd(q, q, q.to("meta"))
