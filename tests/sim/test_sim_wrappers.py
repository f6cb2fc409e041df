"""Each wrapper of common/ptx against a formula of its own, on the simulator and on the GPU.

The GPU runs are the simulator's proof: same body, same formula, inputs drawn the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import probes
import pytest
import torch
from conftest import Runner
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
WRAPPERS = sorted((ROOT / "common" / "ptx").glob("*.cuh"))
SIGNATURE = re.compile(
    r"^(template <[^>]*>\n)?DEVICE ([\w&* ]+?) (\w+)\(((?:[^()]|\([^()]*\))*)\) {", re.M
)


def random_words(runner: Runner, *shape: int) -> Tensor:
    """Random 32-bit patterns."""
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).int().to(runner.device)


def as_bits(values: Tensor) -> Tensor:
    """Two 16-bit values per 32-bit word, the first in the lower half."""
    return values.contiguous().view(torch.int32)


def signatures(file: Path) -> dict[str, str]:
    """Template header, return type and parameters of each wrapper, without the simulator's SITE."""
    found = {}
    for template, result, name, parameters in SIGNATURE.findall(file.read_text(encoding="utf-8")):
        parts = [part.strip() for part in re.sub(r"\s+", " ", parameters).split(",")]
        kept = ", ".join(part for part in parts if part not in ("", "SITE"))
        found[name] = f"{template}{result} {name}({kept})"
    return found


@pytest.mark.parametrize("file", WRAPPERS, ids=lambda file: file.stem)
def test_twins_have_the_same_signatures(file: Path) -> None:
    wrappers = signatures(file)
    assert wrappers
    assert signatures(ROOT / "common" / "sim" / "ptx" / file.name) == wrappers


def test_every_wrapper_is_called_by_a_probe() -> None:
    kernels = "".join(f.read_text(encoding="utf-8") for f in (ROOT / "tests/kernels").glob("*.cu"))
    missing = [
        name
        for file in WRAPPERS
        for name in signatures(file)
        if not re.search(rf"\b{name}(<[^;]*?>)?\(", kernels)
    ]
    assert not missing


def test_no_asm_in_the_simulator() -> None:
    """Host assembly is switch.S; the twins and the runtime are plain C++."""
    files = [f for f in (ROOT / "common" / "sim").rglob("*") if f.suffix in (".cuh", ".h", ".cpp")]
    assert files
    assert not [f for f in files if re.search(r"\b(__)?asm(__)?\b", f.read_text(encoding="utf-8"))]


def test_base_coordinates(runner: Runner) -> None:
    grid, threads = 3, 64
    data = torch.randn(grid, threads, device=runner.device)
    out = random_words(runner, grid, threads, 4)
    probes.run(runner, "probe_base", data, out, grid=grid, num_threads=threads, smem_bytes=1024)
    position = torch.arange(grid)[:, None] * 65536 + torch.arange(threads)
    assert torch.equal(out[..., 0].cpu(), position.int())
    assert (out[..., 1] == grid).all()
    assert (out[..., 2] == 0).all()
    assert torch.equal(out[..., 3].view(torch.float32), 2 * data)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_mma(runner: Runner, dtype: torch.dtype) -> None:
    warps = 8
    a = torch.randn(warps, 16, 16).to(dtype)
    b = torch.randn(warps, 16, 8).to(dtype)
    d = torch.randn(warps, 16, 8)
    a[0, 3] *= 2.0**-14  # fp16: subnormals among them
    # Fragments by the index formulas of the PTX manual for m16n8k16, element i of lane l.
    lane = torch.arange(32)[:, None]
    group, member = lane // 4, lane % 4
    i = torch.arange(8)
    a_row = group + 8 * ((i // 2) % 2)
    a_col = member * 2 + i % 2 + 8 * (i // 4)
    b_row = member * 2 + i[:4] % 2 + 8 * (i[:4] // 2)
    d_row = group + 8 * (i[:4] // 2)
    d_col = member * 2 + i[:4] % 2
    fragments = torch.cat(
        [
            as_bits(a[:, a_row, a_col]),
            as_bits(b[:, b_row, group.expand(-1, 4)]),
            d[:, d_row, d_col].view(torch.int32),
        ],
        dim=-1,
    )
    out = random_words(runner, warps, 32, 4)
    probes.run(
        runner, "probe_mma", fragments.to(runner.device).contiguous(), out,
        grid=warps // 2, num_threads=64, bf16=dtype == torch.bfloat16,
    )  # fmt: skip
    exact = d.double() + a.double() @ b.double()
    scale = d.abs().double() + a.abs().double() @ b.abs().double()
    error = (out.view(torch.float32).cpu() - exact[:, d_row, d_col]).abs()
    # Not the error of an fp32 sum: the GPU aligns the products to the largest one and truncates.
    assert (error <= 2.0**-18 * scale[:, d_row, d_col]).all()


def test_mma_propagates_infinity_and_nan(runner: Runner) -> None:
    fragments = torch.zeros(2, 32, 10, dtype=torch.int32)
    fragments[..., 4:6] = 0x3C003C00  # b: ones
    fragments[0, 0, 0] = 0x7C00  # a[0, 0] = inf
    fragments[1, 0, 0] = 0x7E00  # a[0, 0] = nan
    out = random_words(runner, 2, 32, 4)
    probes.run(runner, "probe_mma", fragments.to(runner.device), out, grid=2, bf16=False)
    d = out.view(torch.float32).cpu()
    assert (d[0, :4, :2] == float("inf")).all()
    assert d[1, :4, :2].isnan().all()
    assert (d[:, 4:] == 0).all() and (d[:, :, 2:] == 0).all()


def test_ldmatrix(runner: Runner) -> None:
    data = random_words(runner, 256)
    rows = torch.randperm(64)[:32].int()
    out = torch.zeros(4, 32, 4, dtype=torch.int32, device=runner.device)
    probes.run(runner, "probe_ldmatrix", data, out, rows.to(runner.device), smem_bytes=1024)
    matrices = data.cpu().view(torch.int16).view(64, 8)[rows.long()].view(4, 8, 8)
    straight = as_bits(matrices).view(4, 32).T
    transposed = as_bits(matrices.transpose(1, 2)).view(4, 32).T
    unused = torch.zeros(32, 2, dtype=torch.int32)
    expected = [
        straight,
        transposed,
        torch.cat([straight[:, :2], unused], 1),
        torch.cat([transposed[:, :2], unused], 1),
    ]
    assert torch.equal(out.cpu(), torch.stack(expected))


@pytest.mark.parametrize(
    ("copy_bytes", "policy"), [(4, False), (8, False), (16, False), (16, True)]
)
def test_cp_async_copies_and_zero_fills(runner: Runner, copy_bytes: int, policy: bool) -> None:
    threads = 64
    data = random_words(runner, 4, threads, copy_bytes // 4)
    valid = torch.randint(0, copy_bytes + 1, (4, threads), dtype=torch.int32)
    valid[:, :3] = torch.tensor([0, copy_bytes // 2, copy_bytes], dtype=torch.int32)
    out = random_words(runner, 4, threads, copy_bytes // 4)
    probes.run(
        runner, "probe_cp_async", data, out, valid.to(runner.device),
        num_threads=threads, copy_bytes=copy_bytes, policy=policy,
        smem_bytes=4 * threads * copy_bytes,
    )  # fmt: skip
    expected = data.cpu().view(torch.uint8).view(4, threads, copy_bytes).clone()
    expected[torch.arange(copy_bytes) >= valid[..., None]] = 0
    assert torch.equal(out.cpu().view(torch.uint8).view_as(expected), expected)


def test_memory_round_trips_and_atomics(runner: Runner) -> None:
    grid, threads = 3, 64
    count = grid * threads
    data = random_words(runner, count, 16)
    data[:, 0] = torch.randn(count).to(runner.device).view(torch.int32)
    out = random_words(runner, count, 16)
    aux = torch.zeros(2 + count, dtype=torch.int32, device=runner.device)
    probes.run(
        runner, "probe_memory", data, out, aux,
        grid=grid, num_threads=threads, smem_bytes=64 * threads,
    )  # fmt: skip
    assert torch.equal(out, data)
    terms = data[:, 0].contiguous().view(torch.float32).double()
    total = aux[:1].view(torch.float32).double()
    assert (total - terms.sum()).abs() <= 2.0**-20 * terms.abs().sum()
    assert aux[1] == 3 * count
    assert torch.equal(aux[2:].sort().values.cpu(), 3 * torch.arange(count, dtype=torch.int32))


def test_four_float_reduction(runner: Runner) -> None:
    if runner.name == "gpu" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("red.global.add.v4.f32 needs compute capability 9.0")
    grid, threads = 5, 96
    data = torch.randn(grid * threads, 4).to(runner.device)
    start = torch.randn(32, 4).to(runner.device)
    out = start.clone()
    probes.run(runner, "probe_red_v4", data, out, grid=grid, num_threads=threads)
    terms = torch.cat([start[None], data.view(-1, 32, 4)]).double()
    assert ((out - terms.sum(0)).abs() <= 2.0**-20 * terms.abs().sum(0)).all()


@pytest.mark.parametrize("looks", [0, 1000])
def test_last_ctas_see_what_all_have_written(runner: Runner, looks: int) -> None:
    """And leave the counter as they found it: the launch is repeated."""
    grid, threads = 150, 64
    aux = torch.zeros(4 + 2 * threads, dtype=torch.int32, device=runner.device)
    for _ in range(3):
        data = random_words(runner, grid, threads)
        out = random_words(runner, grid, threads)
        aux[3:] = 0
        probes.run(
            runner, "probe_last_cta", data, out, aux,
            grid=grid, which=looks, num_threads=threads, smem_bytes=8,
        )  # fmt: skip
        assert torch.equal(out, data)
        total = data.sum(0, dtype=torch.int32)
        assert torch.equal(aux[4 : 4 + threads], total)
        assert torch.equal(aux[:2], torch.zeros_like(aux[:2]))
        assert 0 <= aux[2] < grid
        assert 1 <= aux[3] <= (grid if looks else 1)
        if aux[3] > 1:
            assert torch.equal(aux[4 + threads :], total)


def test_shuffles_and_votes(runner: Runner) -> None:
    warps = 6
    data = random_words(runner, warps, 32, 2)
    data[..., 1] &= 31
    data[0, :, 0] |= 1  # vote_any finds nothing in the first warp
    data[1, 17, 0] = 64  # and something in the second
    out = random_words(runner, warps, 32, 8)
    probes.run(runner, "probe_shuffle", data, out, grid=warps // 2, num_threads=64)
    value, operand = (part.long() for part in data.cpu().unbind(-1))
    uniform = operand[:, :1]
    lane = torch.arange(32)
    xor = value.gather(1, lane ^ uniform)
    up = value.gather(1, torch.where(lane < uniform, lane, lane - uniform))
    ballot = ((value & 1) << lane).sum(1, keepdim=True)
    expected = [
        xor,
        xor,
        value.gather(1, operand),
        up,
        (value % 32 == 0).any(1, keepdim=True).long().expand(-1, 32),
        torch.zeros_like(value),
        ballot.expand(-1, 32),
        uniform.expand(-1, 32),
    ]
    got = out.cpu().long() & 0xFFFFFFFF
    assert torch.equal(got, torch.stack(expected, -1) & 0xFFFFFFFF)


def test_barriers_order_shared_memory(runner: Runner) -> None:
    threads = 256
    data = random_words(runner, threads)
    out = random_words(runner, 4, threads)
    probes.run(runner, "probe_barrier", data, out, num_threads=threads, smem_bytes=16 * threads)
    thread = torch.arange(threads)
    half = threads // 2
    value = data.cpu()
    expected = [
        value.flip(0),
        value[thread ^ 31],
        value[thread ^ 32],
        torch.cat([value[:half], value[:half] + 1]),
    ]
    assert torch.equal(out.cpu(), torch.stack(expected))


def special_floats() -> Tensor:
    """Limits of fp32, fp16 and bf16, halfway cases around them, and random bit patterns."""
    inf = float("inf")
    exact = [0.0, 1.0, 65504.0, 65519.99, 65520.0, 2.0**-14, 2.0**-24, 2.0**-25, 1.5 * 2.0**-24]
    exact += [3.3895314e38, 3.4028235e38, 2.0**-126, 2.0**-140, 2.0**-149, inf, float("nan")]
    values = torch.tensor(exact + [-x for x in exact])
    # Halfway between neighbours, for both formats: ties go to even.
    halves = torch.randint(0, 0x7BFF, (500,), dtype=torch.int16).view(torch.float16).float()
    ties = (halves + torch.nextafter(halves.half(), torch.tensor(inf).half()).float()) / 2
    bf16_ties = torch.randint(0, 0x7F7F, (500,), dtype=torch.int32) << 16 | 0x8000
    patterns = torch.randint(-(2**31), 2**31, (3000,), dtype=torch.int64).int()
    return torch.cat([values, ties, bf16_ties.view(torch.float32), patterns.view(torch.float32)])


def test_conversions(runner: Runner) -> None:
    values = special_floats()
    every_16_bits = torch.arange(65536, dtype=torch.int32).view(torch.float32)
    values = torch.cat([values, every_16_bits])
    out = random_words(runner, values.numel(), 6)
    probes.run(runner, "probe_convert", values.to(runner.device), out, grid=4, num_threads=128)
    got = out.cpu()

    def rounded(dtype: torch.dtype) -> Tensor:
        bits = values.to(dtype).view(torch.int16).int() & 0xFFFF
        return torch.where(values.isnan(), torch.tensor(0x7FFF, dtype=torch.int32), bits)

    f16, bf16 = rounded(torch.float16), rounded(torch.bfloat16)
    assert torch.equal(got[:, 2], f16)
    assert torch.equal(got[:, 3], bf16)
    assert torch.equal(got[:, 0], f16 | f16.roll(-1) << 16)
    assert torch.equal(got[:, 1], bf16 | bf16.roll(-1) << 16)
    low = values.view(torch.int16)[::2]
    for column, dtype in ((4, torch.float16), (5, torch.bfloat16)):
        widened = low.view(dtype).float()
        assert_same_values(got[:, column].contiguous().view(torch.float32), widened)


def assert_same_values(got: Tensor, expected: Tensor) -> None:
    """Bitwise, but any NaN equals any other."""
    assert torch.equal(got.isnan(), expected.isnan())
    known = ~expected.isnan()
    assert torch.equal(got[known].view(torch.int32), expected[known].view(torch.int32))


def flushed(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 2.0**-126, x * 0, x)


MATH: dict[str, tuple[int, Callable[[Tensor], Tensor], float, float, bool]] = {
    # column, fp64 formula, relative and absolute bound, flushes subnormals
    "ex2": (0, torch.exp2, 2.0**-21, 0.0, True),
    "lg2": (1, torch.log2, 2.0**-21, 2.0**-21, True),
    "rcp": (2, torch.reciprocal, 2.0**-22, 0.0, True),
    "tanh": (3, torch.tanh, 2.0**-10, 2.0**-126, False),
}


@pytest.mark.parametrize("name", MATH)
def test_approximate_math(runner: Runner, name: str) -> None:
    column, formula, relative, absolute, flushes = MATH[name]
    x = torch.cat([special_floats(), 40 * torch.randn(2000), 1 + torch.randn(500) * 2.0**-8])
    out = random_words(runner, x.numel(), 4)
    probes.run(runner, "probe_math", x.to(runner.device), out, grid=2, num_threads=128)
    got = out.cpu()[:, column].contiguous().view(torch.float32)
    expected = formula((flushed(x) if flushes else x).double())
    assert torch.equal(got.isnan(), expected.isnan())
    # Results at the very edge of the range may fall on either side of it.
    sure = ~expected.isnan()
    sure &= (expected.abs() < 3.40e38) | (expected.abs() > 3.41e38)
    sure &= (expected.abs() > 1.2e-38) | (expected.abs() < 1.1e-38)
    got, expected = got[sure].double(), expected[sure]
    if flushes:
        expected = flushed(expected)
    overflow = expected.abs() > 3.41e38
    assert torch.equal(got[overflow], torch.where(expected > 0, 1.0, -1.0)[overflow] * float("inf"))
    error = (got - expected).abs()[~overflow]
    assert (error <= absolute + relative * expected.abs()[~overflow]).all()


def test_ex2_of_minus_infinity_is_zero(runner: Runner) -> None:
    """Masked scores are -inf: their probability must be exactly 0."""
    out = random_words(runner, 32, 4)
    probes.run(runner, "probe_math", torch.full((32,), -float("inf")).to(runner.device), out)
    assert (out[:, 0] == 0).all()
