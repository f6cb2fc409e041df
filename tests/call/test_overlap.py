"""Memory that would be written twice, or written while it is read, is refused by name; what only
shares a buffer is not."""

from __future__ import annotations

import inputs
import pytest
import torch
from torch import Tensor

import flash_attn_2_cuda
from flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    flash_attn_combine,
    flash_attn_with_kvcache,
)
from flash_attn_interface._common.ask.check_overlap import Layout, overlap, overlaps_itself
from flash_attn_interface.call.fa2_ops import _flash_attn_backward as fa2_backward
from flash_attn_interface.layers.layer_norm import layer_norm_fn

BF16 = torch.bfloat16


def normal(*shape: int) -> Tensor:
    return torch.randn(shape).to(BF16)


# ---- the rule, against counting bytes ------------------------------------------------------------


def bytes_of(tensor: Tensor) -> list[int]:
    offsets = [tensor.data_ptr()]
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        step = stride * tensor.element_size()
        offsets = [offset + i * step for offset in offsets for i in range(size)]
    return [offset + b for offset in offsets for b in range(tensor.element_size())]


def draw_view(buffer: Tensor) -> Tensor:
    rng = inputs.SEEDS
    sizes = [rng.choice((0, 1, 2, 2, 3, 3, 4)) for _ in range(rng.randrange(5))]
    strides = [rng.choice((0, 1, 1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 48)) for _ in sizes]
    dtype = rng.choice((torch.uint8, BF16, torch.float32))
    return buffer.view(dtype).as_strided(sizes, strides, rng.randrange(60))


def test_overlap_is_exact_for_any_strides():
    buffer = torch.zeros(4096, dtype=torch.uint8)
    seen = set()
    for _ in range(3000):
        first, second = draw_view(buffer), draw_view(buffer)
        bytes_first, bytes_second = bytes_of(first), bytes_of(second)
        itself = len(set(bytes_first)) < len(bytes_first)
        assert overlaps_itself(Layout.of(first)) == itself, (first.shape, first.stride())
        distance = second.data_ptr() - first.data_ptr()
        each_other = not set(bytes_first).isdisjoint(bytes_second)
        assert overlap(Layout.of(first), Layout.of(second), distance) == each_other, (
            first.shape, first.stride(), second.shape, second.stride(), distance,
        )  # fmt: skip
        seen.add((itself, each_other))
    assert len(seen) == 4


def test_large_interleaved_views_are_judged_at_once():
    """The search follows the strides, not the elements."""
    like = torch.empty(0, device="meta", dtype=BF16)
    heads = like.as_strided((64, 2**20, 8, 128), (2**20 * 3072, 3072, 128, 1))
    assert not overlap(Layout.of(heads), Layout.of(heads), 2 * 1024)
    assert overlap(Layout.of(heads), Layout.of(heads), 2 * 1023)


# ---- caches --------------------------------------------------------------------------------------


def cache_call(k_cache: Tensor, v_cache: Tensor, **changes: object) -> Tensor:
    arguments: dict[str, object] = {
        "q": normal(2, 1, 4, 32), "k": normal(2, 1, 2, 32), "v": normal(2, 1, 2, 32),
        "cache_seqlens": torch.tensor([3, 5], dtype=torch.int32),
    }  # fmt: skip
    result = flash_attn_with_kvcache(k_cache=k_cache, v_cache=v_cache, **{**arguments, **changes})  # type: ignore[arg-type]
    assert isinstance(result, Tensor)
    return result


def test_an_expanded_cache_is_not_written():
    expanded, whole = normal(1, 8, 2, 32).expand(2, -1, -1, -1), normal(2, 8, 2, 32)
    with pytest.raises(ValueError, match="k_cache has stride .* share memory"):
        cache_call(expanded, whole)
    with pytest.raises(ValueError, match="v_cache has stride .* share memory"):
        cache_call(whole, expanded)
    cache_call(expanded, expanded, k=None, v=None)  # only read


def test_one_tensor_is_not_both_caches():
    cache = normal(2, 8, 2, 32)
    with pytest.raises(ValueError, match="v_cache overlaps k_cache"):
        cache_call(cache, cache)
    cache_call(cache, cache, k=None, v=None)


def test_caches_in_one_buffer_are_fine():
    """Interleaved, and heads of one cache."""
    for buffer in (normal(2, 8, 2, 2, 32), normal(2, 2, 8, 2, 32).transpose(1, 2)):
        k_cache, v_cache = buffer.unbind(2)
        arguments = {"q": normal(2, 1, 4, 32), "k": normal(2, 1, 2, 32), "v": normal(2, 1, 2, 32)}
        apart = cache_call(k_cache.clone(), v_cache.clone(), **arguments)
        assert torch.equal(cache_call(k_cache, v_cache, **arguments), apart)


def test_new_rows_are_not_part_of_the_cache():
    k_cache, v_cache = normal(2, 8, 2, 32), normal(2, 8, 2, 32)
    with pytest.raises(ValueError, match="k_cache overlaps k in memory"):
        cache_call(k_cache, v_cache, k=k_cache[:, 5:6])
    with pytest.raises(ValueError, match="v_cache overlaps q in memory"):
        cache_call(k_cache, v_cache, q=v_cache.view(2, 4, 4, 32)[:, :1])


def test_out_is_not_a_cache():
    k_cache, v_cache = normal(2, 8, 4, 32), normal(2, 8, 4, 32)
    new = [normal(2, 1, 4, 32) for _ in range(3)]
    lengths = torch.tensor([3, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="k_cache overlaps out|out overlaps k_cache"):
        flash_attn_2_cuda.fwd_kvcache(
            new[0], k_cache, v_cache, *new[1:], lengths, None, None, None, None, None, None,
            k_cache[:, :1], 0.3, True, -1, -1, 0.0, True, 0,
        )  # fmt: skip
    with pytest.raises(ValueError, match="v overlaps out_ in memory"):
        _flash_attn_forward(
            new[0], k_cache, v_cache, *new[1:], out_=v_cache[:, :1], seqused_k=lengths
        )


# ---- gradients and results -----------------------------------------------------------------------


def backward_arguments() -> dict[str, Tensor]:
    q, k, v = (normal(2, 5, 2, 16) for _ in range(3))
    out, softmax_lse, *_ = _flash_attn_forward(q, k, v)
    return {"dout": normal(2, 5, 2, 16), "q": q, "k": k, "v": v, "out": out,
            "softmax_lse": softmax_lse}  # fmt: skip


@pytest.mark.parametrize("name", ["fa2", "fa3", "extension"])
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("dk is dv", "dv overlaps dk"),
        ("an expanded dq", "dq has stride .* share memory"),
        ("dq is q", "dq overlaps q in memory"),
        ("dv is a row of dout", "dv overlaps dout in memory"),
    ],
)
def test_gradients_do_not_overwrite_each_other(name: str, case: str, message: str):
    tensors = backward_arguments()
    dq, dk, dv = (torch.empty(2, 5, 2, 16, dtype=BF16) for _ in range(3))
    if case == "dk is dv":
        dv = dk
    elif case == "an expanded dq":
        dq = dq[:, :, :1].expand(-1, -1, 2, -1)
    elif case == "dq is q":
        dq = tensors["q"]
    else:
        dv = tensors["dout"]
    with pytest.raises(ValueError, match=message):
        run_backward(name, tensors, dq, dk, dv)


@pytest.mark.parametrize("name", ["fa2", "fa3", "extension"])
def test_gradients_may_interleave_in_one_buffer(name: str):
    tensors = backward_arguments()
    separate = [torch.empty(2, 5, 2, 16, dtype=BF16) for _ in range(3)]
    run_backward(name, tensors, *separate)
    packed = torch.empty(2, 5, 3, 2, 16, dtype=BF16)
    for _ in range(2):  # the second finds the addresses known
        run_backward(name, tensors, *packed.fill_(float("nan")).unbind(2))
        for mine, theirs in zip(packed.unbind(2), separate, strict=True):
            assert torch.equal(mine, theirs)


def run_backward(name: str, tensors: dict[str, Tensor], dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    options = (0.0, 0.25, False, -1, -1, 0.0)
    if name == "fa3":
        _flash_attn_backward(**tensors, dq=dq, dk=dk, dv=dv, softmax_scale=0.25)
    elif name == "fa2":
        fa2_backward(*tensors.values(), dq, dk, dv, *options, None, False)
    else:
        flash_attn_2_cuda.bwd(
            *tensors.values(), dq, dk, dv, None, *options, False, None, None
        )  # fmt: skip


def test_out_does_not_overlap():
    q = normal(1, 5, 2, 16)
    expanded = normal(1, 1, 2, 16).expand(1, 5, 2, 16)
    with pytest.raises(ValueError, match="out has stride .* share memory"):
        flash_attn_2_cuda.fwd(q, q, q, expanded, None, 0.0, 0.3, False, -1, -1, 0.0, False, None)
    with pytest.raises(ValueError, match="out_ has stride .* share memory"):
        _flash_attn_forward(q, q, q, out_=expanded)

    parts, lse = torch.randn(3, 1, 4, 2, 8), torch.randn(3, 1, 4, 2)
    with pytest.raises(ValueError, match="out overlaps out_partial in memory"):
        flash_attn_combine(parts, lse, parts[0])
    with pytest.raises(ValueError, match="out has stride .* share memory"):
        flash_attn_combine(parts, lse, torch.empty(1, 1, 2, 8).expand(1, 4, 2, 8))

    x, out = torch.randn(3, 8), torch.empty(3, 8)
    with pytest.raises(ValueError, match="residual_out overlaps out"):
        layer_norm_fn(x, torch.ones(8), None, prenorm=True, out=out, residual_out=out)


@pytest.mark.gpu
def test_warm_calls_on_a_gpu_are_refused_too():
    """The plan is remembered by layouts; what overlaps is a matter of addresses."""
    k_cache, v_cache = normal(2, 8, 2, 32).cuda(), normal(2, 8, 2, 32).cuda()
    tensors = {
        name: normal(2, 1, heads, 32).cuda() for name, heads in (("q", 4), ("k", 2), ("v", 2))
    }
    lengths = torch.tensor([3, 5], dtype=torch.int32, device="cuda")
    both = torch.stack((k_cache, v_cache), 2)
    for _ in range(3):
        want = cache_call(k_cache, v_cache, **tensors, cache_seqlens=lengths)
        assert torch.equal(cache_call(*both.unbind(2), **tensors, cache_seqlens=lengths), want)
    with pytest.raises(ValueError, match="v_cache overlaps k_cache"):
        cache_call(k_cache, k_cache, **tensors, cache_seqlens=lengths)
    with pytest.raises(ValueError, match="k_cache has stride .* share memory"):
        cache_call(k_cache[:1].expand(2, -1, -1, -1), v_cache, **tensors, cache_seqlens=lengths)

    arguments = {name: x.cuda() for name, x in backward_arguments().items()}
    dq, dk, dv = (torch.empty_like(arguments["q"]) for _ in range(3))
    for _ in range(3):
        run_backward("fa2", arguments, dq, dk, dv)
    with pytest.raises(ValueError, match="dv overlaps dk"):
        run_backward("fa2", arguments, dq, dk, dk)
