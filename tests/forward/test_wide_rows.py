"""Strides at the edges of 31 bits and far beyond, in every kernel: the same bits as packed tensors
give. On the CPU the tensors lie in virtual memory, of which only touched pages are real.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import hopper_tree
import pytest
import torch
from asked import forward_call
from conftest import Runner
from test_compile_flash2 import problem
from torch import Tensor

import flash_attn
import flash_attn_interface
from flash_attn_interface._common.ask.backward_problem import BackwardProblem
from flash_attn_interface._common.ask.call import Backward
from flash_attn_interface._common.ask.check import check
from flash_attn_interface._common.runtime import sources
from flash_attn_interface._common.runtime.spec import KernelSpec
from flash_attn_interface._common.tiles import row_strides
from flash_attn_interface._flash2 import BACKEND, bwd_tiles, decode_tiles, fwd_tiles
from flash_attn_interface.call import backends, dispatch

ROWS = 131
PAGES = 4  # of each sequence
FIRST_WIDE = 2**31 // (2 * row_strides.MAX_STEP)  # elements: where kernels go over to 64 bits
# Row strides: that edge; where 64 rows of a tile pass 2^31 bytes, where kernels once went wrong;
# rows of 2^31 bytes and elements.
EDGES = [FIRST_WIDE - 8, FIRST_WIDE, 2**24 - 8, 2**24, 2**26, 2**30, 2**31 + 8]
FEW = [FIRST_WIDE - 8, FIRST_WIDE, 2**26, 2**31 + 8]
LARGEST_ON_GPU = 2**26  # a buffer then takes 17.6 GB


def on_both(strides: Sequence[int], largest: int = LARGEST_ON_GPU) -> pytest.MarkDecorator:
    """Parametrises (runner, stride); strides that a GPU has no memory for only in the simulator."""
    sim = [pytest.param("sim", s, marks=pytest.mark.sim, id=f"sim-{s}") for s in strides]
    small = [s for s in strides if s <= largest]
    gpu = [pytest.param("gpu", s, marks=pytest.mark.gpu, id=f"gpu-{s}") for s in small]
    return pytest.mark.parametrize(("runner", "stride"), [*sim, *gpu], indirect=["runner"])


class Rows:
    """Tensors of wide rows side by side in one buffer; no two share an element."""

    PLACE = 2**13  # elements of a row that a tensor may have
    NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux, which Python does not name

    def __init__(
        self, runner: Runner, stride: int, rows: int = ROWS, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.stride = stride
        self._taken = 0
        elements = rows * stride + 64 * self.PLACE
        if runner.device.type == "cpu":
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | self.NO_RESERVE
            memory = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)
            self._buffer = torch.frombuffer(memory, dtype=dtype)
        else:
            self._buffer = torch.empty(elements, dtype=dtype, device=runner.device)

    def place(self, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
        """A new tensor, of NaN."""
        tensor = self._buffer.as_strided(shape, strides, self._taken * self.PLACE)
        self._taken += 1
        return tensor.fill_(float("nan"))

    def take(self, dim: int, batch: int = 2, rows: int = ROWS, heads: int = 2) -> Tensor:
        """(batch, rows, heads, dim) as in a (rows, batch, heads, dim) layout."""
        step = -(-dim // 8) * 8
        return self.place((batch, rows, heads, dim), (heads * step, self.stride, step, 1))

    def random(self, dim: int, **sizes: int) -> Tensor:
        return randomise(self.take(dim, **sizes))

    def random_pages(self, dim: int, page_size: int) -> Tensor:
        """(pages, page_size, heads, dim) of two sequences."""
        strides = (page_size * self.stride, self.stride, 2048, 1)
        return randomise(self.place((2 * PAGES, page_size, 2, dim), strides))


def randomise(tensor: Tensor) -> Tensor:
    return tensor.copy_(torch.randn(tensor.shape, device=tensor.device))


def packed(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def assert_same(wide: Sequence[Tensor], narrow: Sequence[Tensor]) -> None:
    for got, want in zip(wide, narrow, strict=True):
        assert not want.isnan().any()
        assert torch.equal(got, want)


def test_kernels_and_planners_agree_on_the_rule():
    text = sources.read("flash2/device/row_stride.cuh")
    found = re.search(r"kMaxStep = (\d+);", text)
    assert found is not None and int(found.group(1)) == row_strides.MAX_STEP
    assert "static_assert(kRows <= kMaxStep);" in text
    assert not row_strides.wide_row_strides(0, FIRST_WIDE - 1)
    assert row_strides.wide_row_strides(0, FIRST_WIDE)


def specs_with_row_strides(**strides: tuple[int, int, int]) -> list[KernelSpec]:
    """Of the kernels that these strides matter to."""
    zeros = dict.fromkeys(("out_strides", "dout_strides", "dq_strides", "dk_strides", "dv_strides"))
    gradients = {name: strides.pop(name, (0, 0, 0)) for name in zeros}
    cache = strides.pop("pages", None)
    asked = replace(problem((64, 64), "plain", "bf16"), qv="qv_strides" in strides, **strides)
    if cache is not None:
        asked = replace(asked, page_size=16, cache_slots=9, v_strides=cache)
    specs = [decode_tiles.decode_spec(asked, "sm_80", split=False)]
    if asked.qv or cache is not None:
        return specs
    backward = bwd_tiles.backward_specs(BackwardProblem(asked, **gradients), "sm_80")[1]
    if any(any(of_one) for of_one in gradients.values()):
        return [backward]
    return [*specs, backward, fwd_tiles.forward_spec(asked, "sm_80")]


@pytest.mark.parametrize(
    ("name", "strides"),
    [
        *((f"{name}_strides", (0, FIRST_WIDE, 0)) for name in ("q", "k", "v", "dout", "qv")),
        ("pages", (FIRST_WIDE, 0, 0)),
    ],
)
def test_each_copied_tensor_counts(name: str, strides: tuple[int, int, int]):
    """One wide tensor among narrow ones, in each planner that has it."""
    narrow = tuple(max(0, stride - 1) for stride in strides)
    for given, expected in ((strides, True), (narrow, False)):
        specs = specs_with_row_strides(**{name: given})
        assert [spec["wide_row_strides"] for spec in specs] == [expected] * len(specs)


def attend(runner: Runner, *qkv: Tensor) -> tuple[Tensor, Tensor]:
    function = flash_attn_interface.flash_attn_func
    return runner.call(function, *qkv, causal=True, return_attn_probs=True)


@on_both(EDGES)
@pytest.mark.parametrize("dims", [(32, 32), (96, 40), (256, 256), (59, 59)], ids=str)
@pytest.mark.usefixtures("ampere_tree")
def test_forward(runner: Runner, stride: int, dims: tuple[int, int]):
    if stride not in FEW and dims != (32, 32):
        pytest.skip("these edges are tried at one pair of head dims")
    rows = Rows(runner, stride)
    qkv = rows.random(dims[0]), rows.random(dims[0]), rows.random(dims[1])
    assert_same(attend(runner, *qkv), attend(runner, *packed(*qkv)))


@on_both(FEW)
@pytest.mark.usefixtures("ampere_tree")
def test_packed_and_paged_forward(runner: Runner, stride: int):
    """First rows of sequences, and pages, are offsets too."""
    rows = Rows(runner, stride)
    q, k, v = (rows.random(64, batch=1)[0] for _ in range(3))
    pages = (rows.random_pages(64, 16), rows.random_pages(64, 16))
    ends = torch.tensor([0, 50, 50, ROWS - 1], dtype=torch.int32, device=runner.device)
    table = torch.randperm(2 * PAGES, device=runner.device).int().repeat(3, 1)
    for keys, options in (((k, v), {}), (pages, {"block_table": table})):
        wide, narrow = (
            runner.call(
                flash_attn.flash_attn_varlen_func, *tensors, ends, ends, ROWS, ROWS, causal=True,
                **options,
            )
            for tensors in ((q, *keys), packed(q, *keys))
        )  # fmt: skip
        assert_same([wide], [narrow])


@on_both(FEW)
@pytest.mark.parametrize("dims", [(32, 32), (64, 128), (256, 256)], ids=str)
def test_backward(runner: Runner, stride: int, dims: tuple[int, int]):
    if stride not in FEW[:2] and dims != (32, 32):
        pytest.skip("these edges are tried at one pair of head dims")
    rows = Rows(runner, stride)
    tensors = [rows.random(dim) for dim in (dims[0], dims[0], dims[1], dims[1])]
    check_backward(runner, rows.take, *tensors)


def check_backward(
    runner: Runner, take: Callable[[int], Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> None:
    """take: makes a tensor of the same layout and a head dim. out and gradients are wide too."""
    narrow = packed(q, k, v)
    out, lse = attend(runner, *narrow)
    wanted = [torch.full_like(x, float("nan")) for x in narrow]
    run_backward(runner, dout.contiguous(), narrow, out, lse, wanted)
    got = [take(x.shape[-1]) for x in (q, k, v)]
    run_backward(runner, dout, (q, k, v), take(out.shape[-1]).copy_(out), lse, got)
    assert_same(got, wanted)


def run_backward(
    runner: Runner,
    dout: Tensor,
    qkv: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    gradients: Sequence[Tensor],
    backend: Any = BACKEND,
) -> None:
    forward = check(forward_call(*qkv, causal=True, return_lse=True))
    call, tensors = forward_call(*qkv), Backward(dout, out, lse, *gradients)
    asked = BackwardProblem.of(forward, call, tensors, deterministic=backend is BACKEND)
    target = runner.target(backend.name)
    assert backend.refuses_backward(asked, target) is None
    with runner.active():
        backend.plan_backward(asked, target).run(call.tensors, tensors)


@on_both(FEW)
@pytest.mark.parametrize("page_size", [0, 16])
def test_append_and_decode(runner: Runner, stride: int, page_size: int):
    """q, the cache, and what is appended to it."""
    rows = Rows(runner, stride)
    q, k, v = rows.random(64, rows=3), rows.random(64, rows=3), rows.random(128, rows=3)
    if page_size:
        caches = [rows.random_pages(64, page_size), rows.random_pages(128, page_size)]
    else:
        caches = [rows.random(64), rows.random(128)]
    check_decode(runner, q, k, v, caches, page_size)


def check_decode(
    runner: Runner, q: Tensor, k: Tensor, v: Tensor, caches: Sequence[Tensor], page_size: int = 0
) -> None:
    device = runner.device
    table = torch.randperm(2 * PAGES, device=device).int().view(2, PAGES) if page_size else None
    capacity = PAGES * page_size or caches[0].shape[1]
    before = capacity - k.shape[1]
    lengths = torch.tensor([before, before // 2], dtype=torch.int32, device=device)
    copies = packed(*caches)
    for num_splits in (1, 3):
        wide, narrow = (
            runner.call(
                flash_attn_interface.flash_attn_with_kvcache, queries, *cache, *new,
                cache_seqlens=lengths, page_table=table, causal=True, num_splits=num_splits,
                return_softmax_lse=True,
            )
            for queries, cache, new in (
                (q, caches, (k, v)),
                (q.contiguous(), copies, packed(k, v)),
            )
        )  # fmt: skip
        assert_same(wide[:2], narrow[:2])
        assert_same(caches, copies)
    last = copies[0][0] if table is None else copies[0][table[0].long()].flatten(0, 1)
    assert torch.equal(last[before:], k[0])


@on_both(FEW)
def test_decode_with_a_second_query(runner: Runner, stride: int):
    rows = Rows(runner, stride)
    q, qv = rows.random(64, rows=2), rows.random(128, rows=2)
    caches = rows.random(64, heads=1), rows.random(128, heads=1)
    lengths = torch.tensor([ROWS, 40], dtype=torch.int32, device=runner.device)
    wide, narrow = (
        runner.call(
            flash_attn_interface.flash_attn_with_kvcache, queries, k_cache, v_cache, qv=second,
            cache_seqlens=lengths,
        )
        for queries, second, k_cache, v_cache in ((q, qv, *caches), packed(q, qv, *caches))
    )  # fmt: skip
    assert_same([wide], [narrow])


@on_both([2**31 + 8], largest=2**32)
@pytest.mark.parametrize("axis", ["batch", "head"])
@pytest.mark.usefixtures("ampere_tree")
def test_batch_and_head_strides(runner: Runner, stride: int, axis: str):
    memory = Rows(runner, stride, rows=1)
    strides = (stride, 64, 32, 1) if axis == "batch" else (40 * 32, 32, stride, 1)

    def take(dim: int) -> Tensor:
        return memory.place((2, 40, 2, dim), strides)

    q, k, v, dout, k_cache, v_cache = (randomise(take(32)) for _ in range(6))
    assert_same(attend(runner, q, k, v), attend(runner, *packed(q, k, v)))
    check_backward(runner, take, q, k, v, dout)
    check_decode(runner, q[:, :3], k[:, :3], v[:, :3], (k_cache, v_cache))


@on_both([FIRST_WIDE, 2**26, 2**31 + 8])
def test_combine(runner: Runner, stride: int):
    """float32 parts, and the result."""
    memory = Rows(runner, stride, rows=40, dtype=torch.float32)
    parts = randomise(memory.place((3, 2, 40, 2, 32), (128, 512, stride, 64, 1)))
    lse = torch.randn(3, 2, 2, 40, device=runner.device).transpose(2, 3)
    out = memory.place((2, 40, 2, 32), (512, stride, 64, 1))
    wide = runner.call(flash_attn_interface.flash_attn_combine, parts, lse, out=out)
    assert wide[0] is out
    narrow = runner.call(flash_attn_interface.flash_attn_combine, parts.contiguous(), lse)
    assert_same(wide, narrow)


def on_hopper(strides: Sequence[int]) -> pytest.MarkDecorator:
    """As on_both."""
    sim = [pytest.param("sim", s, marks=pytest.mark.sim, id=f"sim-{s}") for s in strides]
    marks = [pytest.mark.gpu, pytest.mark.hopper]
    small = [s for s in strides if s <= LARGEST_ON_GPU]
    gpu = [pytest.param("gpu", s, marks=marks, id=f"gpu-{s}") for s in small]
    return pytest.mark.parametrize(("name", "stride"), [*sim, *gpu])


def hopper_runner(name: str) -> Runner:
    return Runner(name, torch.device("cuda" if name == "gpu" else "cpu"), "sm_90a")


@on_hopper([2**26, 2**31, 2**33 - 8, 2**33, 2**34])
@pytest.mark.parametrize("varlen", [False, True])
def test_hopper_forward(name: str, stride: int, varlen: bool, monkeypatch: pytest.MonkeyPatch):
    """By TMA; where the map of a ragged tensor has no room for the stride, by the Ampere tree."""
    tree: Any = hopper_tree.load().BACKEND
    monkeypatch.setattr(backends, "hopper", lambda: tree)
    dispatch.forget_plans()
    runner = hopper_runner(name)
    rows = Rows(runner, stride)
    qkv = [rows.random(64, batch=1 if varlen else 2) for _ in range(3)]
    if not varlen:
        assert_same(attend(runner, *qkv), attend(runner, *packed(*qkv)))
        return
    ends = torch.tensor([0, 50, 50, ROWS - 1], dtype=torch.int32, device=runner.device)
    options: Any = (ends, ends, ROWS, ROWS)
    qkv = [x[0] for x in qkv]
    wide, narrow = (
        runner.call(flash_attn.flash_attn_varlen_func, *tensors, *options, causal=True)
        for tensors in (qkv, packed(*qkv))
    )
    torch.testing.assert_close(wide, narrow, atol=0.02, rtol=0.02)


@on_hopper([2**26, 2**31])
def test_hopper_backward(name: str, stride: int):
    runner = hopper_runner(name)
    tree: Any = hopper_tree.load().BACKEND
    rows = Rows(runner, stride)
    q, k, v, dout = (rows.random(64) for _ in range(4))
    narrow = packed(q, k, v)
    out, lse = attend(runner, *narrow)
    wanted = [torch.full_like(x, float("nan")) for x in narrow]
    run_backward(runner, dout.contiguous(), narrow, out, lse, wanted, tree)
    got = [rows.take(64) for _ in range(3)]
    run_backward(runner, dout, (q, k, v), rows.take(64).copy_(out), lse, got, tree)
    assert_same(got[1:], wanted[1:])
    torch.testing.assert_close(got[0], wanted[0], atol=1e-2, rtol=1e-2)  # sums in any order


@pytest.mark.parametrize(
    ("stride", "ragged", "served"),
    [
        (2**39 - 8, False, True),
        (2**39, False, False),
        (2**33 - 8, True, True),
        (2**33, True, False),
    ],
)
def test_strides_that_no_tensor_map_holds_are_refused(stride: int, ragged: bool, served: bool):
    hopper_tree.load()
    from flash_attn_3 import tensor_maps

    plain = problem((64, 64), "plain", "bf16")
    strides = {f"{x}_strides": (64, 64, 64) for x in "qkv"}
    plain = replace(plain, varlen_q=ragged, varlen_k=ragged, **strides)
    for name in "qkv":
        wide = replace(plain, **{f"{name}_strides": (64, stride, 64)})
        assert (tensor_maps.refuses_layout(wide) is None) == served
        backward = BackwardProblem(wide, *[(64, 64, 64)] * 5)
        assert (tensor_maps.refuses_backward_layout(backward) is None) == served
