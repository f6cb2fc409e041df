"""The merge of a result with another over more keys (flash2/merge.py), simulated and on the GPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from cases import on_both
from conftest import Runner
from test_compile_flash2 import compile_spec
from torch import Tensor

from flash_attn_interface._common.runtime import arch as arch_table
from flash_attn_interface._flash2.merge import MergePlan, MergeProblem, merge_spec

INF = float("inf")


@dataclass(frozen=True)
class Merge:
    """rows: of out, of which the part has seqlen. indexed: any of them, else the last ones."""

    batch: int
    rows: int
    seqlen: int
    num_heads: int
    head_dim_v: int
    dtype: torch.dtype = torch.bfloat16
    out_f32: bool = False
    indexed: bool = False
    only_gpu: bool = False
    slow: bool = False

    @property
    def id(self) -> str:
        shape = (self.batch, self.rows, self.seqlen, self.num_heads, self.head_dim_v)
        kind = f"{'f32' if self.out_f32 else 'same'}{'-indexed' * self.indexed}"
        return "x".join(map(str, shape)) + f"-{str(self.dtype).removeprefix('torch.')}-{kind}"


MERGES = [
    Merge(1, 37, 37, 3, 128),
    Merge(2, 9, 5, 2, 64, torch.float16, out_f32=True),
    Merge(1, 20, 7, 4, 128, indexed=True),
    Merge(1, 20, 7, 2, 192, out_f32=True, indexed=True),
    Merge(3, 4, 2, 1, 59),
    Merge(1, 6, 3, 2, 1, torch.float16, out_f32=True, indexed=True),
    Merge(2, 3, 3, 2, 512),
    Merge(1, 8192, 4096, 16, 128, only_gpu=True),
]


@on_both(MERGES)
def test_merge(runner: Runner, case: Merge) -> None:
    """Some rows have no key before, some none in the part, whose values are NaN there."""
    b, n, s, h, d = case.batch, case.rows, case.seqlen, case.num_heads, case.head_dim_v
    device = runner.device
    out = torch.randn(b, n, h, d, device=device).to(case.dtype)
    out = out.float() if case.out_f32 else out
    part = torch.randn(b, s, h, d, device=device).to(case.dtype)
    lse, lse_part = (3.0 * torch.randn(b, h, rows, device=device) for rows in (n, s))
    lse_part[torch.rand(lse_part.shape, device=device) < 0.3] = -INF
    before_empty = torch.rand(lse.shape, device=device) < 0.3
    lse[before_empty] = -INF
    out[before_empty.transpose(1, 2)] = 0.0
    part[(lse_part == -INF).transpose(1, 2)] = float("nan")
    rows = torch.arange(n - s, n, device=device)
    if case.indexed:
        rows = torch.randperm(n, device=device)[:s]

    want_out, want_lse = out.double(), lse.double()
    merge_rows(want_out, want_lse, part.double().nan_to_num(), lse_part.double(), rows)
    index = rows if case.indexed else None
    view_out, view_lse = (out, lse) if case.indexed else (out[:, n - s :], lse[:, :, n - s :])
    plan = MergePlan(MergeProblem.of(view_out, view_lse, part, lse_part, index), runner.target())
    with runner.active():
        plan.run(view_out, view_lse, part, lse_part, index)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    bound = 2e-6 if case.out_f32 else {torch.float16: 1e-3, torch.bfloat16: 8e-3}[case.dtype]
    torch.testing.assert_close(out.double(), want_out, rtol=bound, atol=bound)


def merge_rows(out: Tensor, lse: Tensor, part: Tensor, lse_part: Tensor, rows: Tensor) -> None:
    """In place, in float64."""
    total = torch.logaddexp(lse[:, :, rows], lse_part)
    reference = total.masked_fill(total == -INF, 0.0)
    weights = [
        torch.exp(x - reference).transpose(1, 2)[..., None] for x in (lse[:, :, rows], lse_part)
    ]
    out[:, rows] = out[:, rows] * weights[0] + part * weights[1]
    lse[:, :, rows] = total


@pytest.mark.parametrize("arch", arch_table.known_archs())
@pytest.mark.parametrize("out_f32", [True, False])
@pytest.mark.parametrize(("head_dim_v", "wide"), [(128, True), (512, True), (59, False)])
def test_merge_compiles_without_spills(arch: str, out_f32: bool, head_dim_v: int, wide: bool):
    spec = merge_spec(arch, "bf16", out_f32, head_dim_v, wide)
    assert compile_spec(spec).resources.spill_store_bytes == 0
