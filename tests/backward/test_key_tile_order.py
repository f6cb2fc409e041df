"""Which key tiles see a query tile: the order in which a deterministic backward adds to it rests on
`first_key_tile` of common/device/bwd_work.cuh agreeing with `query_tiles` of mask.cuh.
"""

from __future__ import annotations

import pytest
import torch
from conftest import Runner
from probes import run

NUM_PROBLEMS = 256
MASKS = {
    "none": {},
    "causal": {"causal": True},
    "local": {"local": True},
    "chunk": {"chunk": True},
    "causal-chunk": {"causal": True, "chunk": True},
    "local-chunk": {"local": True, "chunk": True},
}


def problems() -> torch.Tensor:
    """(seqlen_q, seqlen_k, window_left, window_right, attention_chunk) each, corners among them."""
    lengths = torch.randint(0, 700, (NUM_PROBLEMS, 2))
    lengths[:8] = torch.tensor(
        [[1, 1], [1, 700], [700, 1], [64, 64], [0, 9], [9, 0], [65, 63], [2, 2]]
    )
    windows = torch.randint(-1, 300, (NUM_PROBLEMS, 2))
    windows[::3, 0], windows[1::3, 1] = -1, -1
    chunks = torch.randint(1, 400, (NUM_PROBLEMS, 1))
    return torch.cat([lengths, windows, chunks], 1).int()


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(
    ("block_m", "block_n"), [(64, 64), (64, 96), (64, 128), (128, 128), (32, 32), (32, 64)]
)
def test_the_first_key_tile_is_the_first_that_visits(
    runner: Runner, masks: dict[str, bool], block_m: int, block_n: int
):
    constants = {"causal": False, "local": False, "chunk": False, **masks}
    data = problems().to(runner.device)
    wrong = torch.full((NUM_PROBLEMS,), -1, dtype=torch.int32, device=runner.device)
    run(
        runner, "probe_key_tiles", data, wrong, grid=NUM_PROBLEMS // 32, block_m=block_m,
        block_n=block_n, varlen_q=False, varlen_k=False, accum_columns=64, **constants,
    )  # fmt: skip
    assert not wrong.any(), data[wrong != 0]
