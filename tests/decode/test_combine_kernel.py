"""The merge of splits by itself (flash2/combine.py), on the simulator and on the GPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from cases import on_both
from conftest import Runner

from flash_attn_interface._common.ask.problem import Target
from flash_attn_interface._flash2.combine import CombinePlan, CombineProblem

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Merge:
    num_splits: int
    batch: int
    seqlen: int
    num_heads: int
    head_dim_v: int
    dtype: torch.dtype
    only_gpu: bool = False
    slow: bool = False

    @property
    def id(self) -> str:
        shape = (self.num_splits, self.batch, self.seqlen, self.num_heads, self.head_dim_v)
        return "x".join(map(str, shape)) + "-" + str(self.dtype).removeprefix("torch.")


MERGES = [
    Merge(1, 2, 3, 2, 64, torch.float32),
    Merge(2, 1, 37, 3, 128, torch.bfloat16),
    Merge(5, 2, 1, 4, 59, torch.float16),
    Merge(8, 1, 5, 1, 1, torch.float32),
    Merge(9, 3, 2, 2, 256, torch.float32),
    Merge(17, 2, 3, 2, 200, torch.bfloat16),
    Merge(133, 1, 2, 3, 512, torch.float32),
    Merge(256, 1, 1, 2, 96, torch.float16),
    Merge(97, 2, 1024, 8, 128, torch.bfloat16, only_gpu=True),
]


@on_both(MERGES)
def test_combine(runner: Runner, case: Merge):
    """Splits without keys hold NaN; some rows have no split with keys at all."""
    n, b, s, h, d = case.num_splits, case.batch, case.seqlen, case.num_heads, case.head_dim_v
    partial = torch.randn(n, b, s, h, d, device=runner.device)
    lse = (3.0 * torch.randn(n, b, h, s, device=runner.device)).transpose(2, 3)
    lse[torch.rand(lse.shape, device=runner.device) < 0.3] = -INF
    lse[:, 0, 0, 0] = -INF
    partial[lse == -INF] = NAN
    out = torch.full((b, s, h, d), NAN, dtype=case.dtype, device=runner.device)
    plan = CombinePlan(CombineProblem.of(partial, lse, out), runner.target())
    with runner.active():
        got_lse = plan.run(partial, lse, out)

    want_lse = torch.logsumexp(lse.double(), 0)
    weights = torch.exp(lse.double() - want_lse.masked_fill(want_lse == -INF, 0.0))
    want = (weights.unsqueeze(-1) * partial.double().nan_to_num()).sum(0)
    assert got_lse.shape == (b, s, h)
    assert got_lse.stride(1) == 1
    torch.testing.assert_close(got_lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[case.dtype]
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
    assert torch.count_nonzero(out[0, 0, 0]) == 0
    assert got_lse[0, 0, 0] == -INF


def test_combine_strided_views(runner: Runner):
    """Rows that are not aligned for wide accesses, heads and splits in another order."""
    storage = torch.randn(2, 3, 4, 5, 39, device=runner.device)
    partial = storage.permute(2, 0, 1, 3, 4)[..., 2:37]
    lse = torch.randn(4, 2, 5, 3, device=runner.device).transpose(2, 3)
    out = torch.full((2, 5, 3, 35), NAN, device=runner.device).transpose(1, 2)
    problem = CombineProblem.of(partial, lse, out)
    assert not problem.wide_loads
    assert not problem.wide_stores
    with runner.active():
        CombinePlan(problem, runner.target()).run(partial, lse, out)
    weights = torch.softmax(lse.double(), 0).unsqueeze(-1)
    want = (weights * partial.double()).sum(0)
    torch.testing.assert_close(out.double(), want, rtol=2e-6, atol=2e-6)


def test_combine_refuses_too_many_splits():
    partial = torch.zeros(257, 1, 1, 1, 8)
    lse = torch.zeros(257, 1, 1, 1)
    problem = CombineProblem.of(partial, lse, torch.zeros(1, 1, 1, 8))
    with pytest.raises(ValueError, match="num_splits is 257"):
        CombinePlan(problem, Target("sm_80", 0, simulated=True))
