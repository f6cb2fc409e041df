"""Each sm_90 wrapper of common/ptx against a formula of its own, on the simulator and on Hopper.

The GPU runs are the simulator's proof, as in test_sim_wrappers.py.
"""

from __future__ import annotations

import hopper_probes
import hopper_tree
import pytest
import torch
from conftest import Runner
from hopper_probes import hopper, random_words
from torch import Tensor

from flash_attn_interface._common.launch import tensor_map
from flash_attn_interface._common.sim import launcher

__all__ = ["hopper"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mbarrier_ring(hopper: Runner, seed: int) -> None:
    rounds = 7
    data = random_words(hopper, rounds, 32)
    out = random_words(hopper, rounds * 32 + 1)
    with launcher.checks(seed=seed):
        hopper_probes.run(
            hopper, "probe_mbarrier", {}, data, out,
            which=rounds, num_threads=64, smem_bytes=2 * 128 + 40,
        )  # fmt: skip
    assert torch.equal(out[:-1], data.flatten())
    assert out[-1] == 3


def padded(tensor: Tensor, first: tuple[int, ...], box: tuple[int, ...]) -> Tensor:
    """The box at `first` (both outermost dim first), zeros outside of the tensor."""
    result = torch.zeros(box, dtype=tensor.dtype)
    inside = [
        [i for i in range(extent) if 0 <= start + i < size]
        for start, extent, size in zip(first, box, tensor.shape, strict=True)
    ]
    source = [[f + i for i in kept] for f, kept in zip(first, inside, strict=True)]
    if all(inside):
        grid = torch.meshgrid(*map(torch.tensor, inside), indexing="ij")
        result[grid] = tensor.cpu()[torch.meshgrid(*map(torch.tensor, source), indexing="ij")]
    return result


def swizzle(box: Tensor, swizzle_bytes: int) -> Tensor:
    """Bytes of a box as TMA lays them out: units of 16 trade places within lines of 128."""
    units = box.contiguous().view(torch.uint8).view(-1, 16)
    place = torch.arange(len(units))
    if swizzle_bytes:
        place = place ^ (place // 8 % (swizzle_bytes // 16))
    laid_out = torch.empty_like(units)
    laid_out[place] = units
    return laid_out.flatten()


# Extents of tensor and box, first elements of the loaded and the stored box, innermost dim last;
# bytes of the swizzle.
TMA_CASES = {
    "swizzle128": ((2, 3, 40, 128), (1, 1, 24, 64), (1, 2, 8, 64), (0, 1, 16, 0), 128),
    "swizzle64": ((2, 3, 40, 64), (1, 2, 16, 32), (0, 1, 3, 32), (1, 0, 24, 0), 64),
    "swizzle32": ((1, 2, 20, 32), (1, 1, 16, 16), (0, 1, 1, 16), (0, 0, 4, 0), 32),
    "plain": ((2, 2, 9, 24), (2, 1, 8, 8), (0, 1, 1, 16), (0, 0, 0, 8), 0),
    "rows-past-the-end": ((1, 2, 21, 64), (1, 1, 16, 64), (0, 1, 16, 0), (0, 0, 10, 0), 128),
    "columns-past-the-end": ((1, 2, 16, 80), (1, 1, 16, 64), (0, 1, 0, 64), (0, 0, 0, 64), 128),
    "shifted-columns": ((1, 1, 16, 40), (1, 1, 8, 32), (0, 0, 4, 8), (0, 0, 4, 16), 64),
    "before-the-begin": ((1, 2, 16, 64), (1, 2, 8, 64), (0, -1, -3, 0), (0, 1, 11, 0), 128),
    "all-outside": ((1, 1, 16, 64), (1, 1, 8, 64), (0, 1, 0, 0), (0, 0, 16, 0), 128),
    "five-dims": ((2, 2, 2, 24, 64), (1, 1, 2, 16, 64), (1, 0, 0, 8, 0), (0, 1, 0, 16, 0), 128),
}


@pytest.mark.parametrize("case", TMA_CASES)
def test_tma_moves_boxes(hopper: Runner, case: str) -> None:
    shape, box, box_from, box_to, swizzle_bytes = TMA_CASES[case]
    # A slice of something larger with strides of its own; what lies between belongs to others.
    source, target = (
        torch.randint(-(2**15), 2**15, (*shape[:-1], shape[-1] + 8), dtype=torch.int16)
        .view(torch.bfloat16)
        .to(hopper.device)[..., : shape[-1]]
        for _ in range(2)
    )
    before = target.clone()
    box_bytes = 2 * torch.Size(box).numel()
    out = random_words(hopper, box_bytes // 4)
    maps = {
        name: hopper_probes.encode(hopper, tensor, box[::-1], swizzle_bytes, rank=len(shape))
        for name, tensor in (("map_a", source), ("map_b", target))
    }
    hopper_probes.run(
        hopper, "probe_tma", maps, None, out, (source, target),
        box_from=box_from[::-1], box_to=box_to[::-1],
        num_threads=64, smem_bytes=box_bytes + 8, box_bytes=box_bytes, rank=len(shape),
    )  # fmt: skip
    loaded = padded(source.view(torch.int16), box_from, box)
    assert torch.equal(out.cpu().view(torch.uint8), swizzle(loaded, swizzle_bytes))
    expected = before.view(torch.int16).cpu().clone()
    slices = [
        (max(first, 0), min(first + extent, size), max(-first, 0))
        for first, extent, size in zip(box_to, box, shape, strict=True)
    ]
    if all(begin < end for begin, end, _ in slices):
        part = (~loaded)[tuple(slice(s, s + end - begin) for begin, end, s in slices)]
        expected[tuple(slice(begin, end) for begin, end, _ in slices)] = part
    assert torch.equal(target.view(torch.int16).cpu(), expected)


@pytest.mark.parametrize("box_rows", [16, 128])
@pytest.mark.parametrize(
    "first,length,row",
    [(0, 5, 0), (7, 21, 16), (60, 43, 40), (7, 0, 0), (7, 21, 64), (102, 1, 0)],
    ids=["first", "middle", "last", "empty", "behind", "one-row"],
)
def test_ragged_maps_end_where_the_sequence_does(
    hopper: Runner, first: int, length: int, row: int, box_rows: int
) -> None:
    """Rows behind a sequence read as zeros and are not written, to the ends of the tensor."""
    maps = hopper_tree.load().tensor_maps
    rows, heads, head = 103, 2, 1
    source, target = random_words(hopper, 2, rows, heads, 32).view(torch.bfloat16).unbind()
    before = target.clone()
    kind: tensor_map.Kind = "simulated" if hopper.name == "sim" else "device"
    encoded = {
        name: maps.plan_map(
            name, "bf16", 64, (1, rows, heads), (0, heads * 64, 64),
            ragged_rows=rows, box_rows=box_rows, swizzle_bytes=128,
        ).encode(kind, tensor.data_ptr())
        for name, tensor in (("map_a", source), ("map_b", target))
    }  # fmt: skip
    at = [0, maps.RAGGED_ROWS - length + row, head, first + length, maps.RAGGED_ROWS]
    out = random_words(hopper, box_rows * 32)
    hopper_probes.run(
        hopper, "probe_tma", encoded, None, out, (source, target), box_from=at, box_to=at,
        num_threads=64, smem_bytes=box_rows * 128 + 8, box_bytes=box_rows * 128, rank=5,
    )  # fmt: skip
    source, target, before = (x.cpu().view(torch.int16) for x in (source, target, before))
    box = torch.zeros(box_rows, 64, dtype=torch.int16)
    inside = source[first : first + length, head][row : row + box_rows]
    box[: len(inside)] = inside
    assert torch.equal(out.cpu().view(torch.uint8), swizzle(box, 128))
    before[first : first + length, head][row : row + box_rows] = ~inside
    assert torch.equal(target, before)


@pytest.mark.parametrize("row", [4, 32, 132])
@pytest.mark.parametrize("seed", [0, 1])
def test_bulk_copies_load_and_add(hopper: Runner, row: int, seed: int) -> None:
    grid, warps, rounds = 3, 4, 5
    data = torch.randn(grid, warps, rounds, row).to(hopper.device)
    start = torch.randn(rounds, row).to(hopper.device)
    out = start.clone()
    with launcher.checks(seed=seed):
        hopper_probes.run(
            hopper, "probe_bulk", {}, data, out, grid=grid, which=rounds,
            num_threads=32 * warps, smem_bytes=2 * warps * (4 * row + 8), row=row,
        )  # fmt: skip
    terms = torch.cat([start[None], 2 * data.flatten(0, 1)]).double()
    assert ((out - terms.sum(0)).abs() <= 2.0**-20 * terms.abs().sum(0)).all()


def test_programmatic_launches_see_what_those_before_them_have_written(hopper: Runner) -> None:
    """And write what those have read: three buffers in turn."""
    grid, threads, launches = 500, 128, 30
    buffers = list(random_words(hopper, 3, grid * threads))
    expected = buffers[0].cpu().clone()
    if hopper.name == "gpu":
        torch.cuda._sleep(100_000_000)  # so that the launches queue up and can overlap
    for i in range(launches):
        hopper_probes.run(
            hopper, "probe_griddepcontrol", {}, buffers[i % 3], buffers[(i + 1) % 3],
            grid=grid, num_threads=threads, programmatic=i > 0, synchronize=False,
        )  # fmt: skip
    for _ in range(launches):
        expected = expected.flip(0) + 1
    assert torch.equal(buffers[launches % 3].cpu(), expected)


def test_stmatrix(hopper: Runner) -> None:
    registers = random_words(hopper, 32, 4)
    rows = torch.randperm(32, dtype=torch.int32).to(hopper.device)
    data = torch.cat([registers, rows[:, None]], 1).contiguous()
    out = random_words(hopper, 2, 32, 4)
    hopper_probes.run(hopper, "probe_stmatrix", {}, data, out, smem_bytes=1024)
    # Register i of the lanes is matrix i, two elements per lane, row by row.
    matrices = registers.cpu().T.contiguous().view(torch.int16).view(4, 8, 8)
    for form, expected in enumerate((matrices, matrices.transpose(1, 2))):
        named = out[form].cpu()[rows.cpu().long()]  # row of lane 8 * matrix + row
        assert torch.equal(named.contiguous().view(torch.int16).view(4, 8, 8), expected)


def test_setmaxnreg_keeps_values(hopper: Runner) -> None:
    data = random_words(hopper, 384)
    out = random_words(hopper, 384)
    hopper_probes.run(hopper, "probe_setmaxnreg", {}, data, out, num_threads=384)
    assert torch.equal(out, data)


@pytest.mark.parametrize("swizzle_bytes", [128, 64, 32])
@pytest.mark.parametrize("trans_b", [False, True], ids=["k-major", "mn-major"])
@pytest.mark.parametrize("register_a", [False, True], ids=["ss", "rs"])
@pytest.mark.parametrize("n", [8, 80, 256])
def test_wgmma(hopper: Runner, n: int, register_a: bool, trans_b: bool, swizzle_bytes: int) -> None:
    bf16 = (n + swizzle_bytes // 32) % 3 != 0  # both types, spread over the cases
    dtype = torch.bfloat16 if bf16 else torch.float16
    depth = 64 if n == 256 else 128
    a = torch.randn(64, depth).to(dtype)
    b = torch.randn(n, depth).to(dtype)
    start = torch.randn(64, n)
    stored_b = b.T.contiguous() if trans_b else b
    data = torch.cat([t.contiguous().view(torch.int32).flatten() for t in (a, stored_b, start)])
    rows_b, cols_b = stored_b.shape
    chunks_b = -(-cols_b * 2 // swizzle_bytes)
    for accumulate in (False, True):
        out = torch.full((64, n), float("nan"), device=hopper.device)
        hopper_probes.run(
            hopper, "probe_wgmma", {}, data.to(hopper.device), out, which=int(accumulate),
            num_threads=128, smem_bytes=64 * depth * 2 + chunks_b * rows_b * swizzle_bytes,
            wgmma_test_n=n, depth=depth, swizzle_bytes=swizzle_bytes,
            trans_b=trans_b, register_a=register_a, bf16=bf16,
        )  # fmt: skip
        added = start.double() if accumulate else torch.zeros(64, n).double()
        error = (out.cpu() - (added + a.double() @ b.double().T)).abs()
        # As in test_mma: the products are aligned to the largest one and truncated.
        scale = added.abs() + a.abs().double() @ b.abs().double().T
        assert (error <= 2.0**-18 * scale).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("n,head_dim", [(128, 64), (80, 128)])
@pytest.mark.parametrize("seed", [0, 1])
def test_tma_and_wgmma_agree_on_layouts(
    hopper: Runner, n: int, head_dim: int, dtype: torch.dtype, seed: int
) -> None:
    rows, keys = 50, n - 5  # both tiles end outside of the tensors
    q = torch.randn(rows, head_dim).to(dtype).to(hopper.device)
    k, v = (torch.randn(keys, head_dim).to(dtype).to(hopper.device) for _ in range(2))
    out = torch.full((rows, head_dim), float("nan"), dtype=dtype, device=hopper.device)
    boxes = {"map_a": (q, 64), "map_b": (k, n), "map_c": (v, n), "map_d": (out, 64)}
    maps = {
        name: hopper_probes.encode(hopper, tensor, (64, extent), 128)
        for name, (tensor, extent) in boxes.items()
    }
    chunks = head_dim // 64
    with launcher.checks(seed=seed):
        hopper_probes.run(
            hopper, "probe_tma_wgmma", maps, None, None, (q, k, v, out),
            num_threads=256, smem_bytes=chunks * 128 * (64 + 2 * n) + 16,
            wgmma_qk_n=n, wgmma_pv_n=head_dim, bf16=dtype == torch.bfloat16,
        )  # fmt: skip
    q, k, v, out = (t.cpu().double() for t in (q, k, v, out))
    scores = (q @ k.T).to(dtype).double()
    scale = scores.abs() @ v.abs()
    ulp = torch.finfo(dtype).eps
    assert ((out - scores @ v).abs() <= 2 * ulp * scale).all()


def test_a_tensor_maps_address_can_be_patched(hopper: Runner) -> None:
    kind: tensor_map.Kind = "simulated" if hopper.name == "sim" else "device"
    assert tensor_map.address_comes_first(kind)
