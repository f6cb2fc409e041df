"""headdim.json: both forms, and messages that name the entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flash_attn_interface._common.prebuild.build import headdim
from flash_attn_interface._common.prebuild.headdim import HeadDimError, Wanted

ROOT = Path(__file__).resolve().parents[2]


def test_the_shipped_file_is_the_default() -> None:
    assert headdim.read(ROOT / "headdim.json") == Wanted()
    assert Wanted().pairs == ((32, 64), (64, 128), (96, 192), (128, 256), (192, 128))


def test_a_list_of_pairs() -> None:
    assert headdim.parse([[64, 128], [8, 8], [64, 128]]) == Wanted(pairs=((64, 128), (8, 8)))
    assert headdim.parse([]).pairs == ()


def test_wide_head_dims() -> None:
    assert headdim.parse([[64, 512], [576, 512]]).pairs == ((64, 512), (576, 512))
    assert headdim.parse({"equal_dims": [512]}).pairs == ((512, 512),)


def test_an_object() -> None:
    wanted = headdim.parse(
        {
            "pairs": [[64, 128]],
            "equal_dims": [64, 128],
            "dtypes": ["bf16"],
            "features": ["causal", "backward", "dense"],
            "archs": ["80", "sm_90a", "8.9"],
        }
    )
    assert wanted == Wanted(
        pairs=((64, 128), (64, 64), (128, 128)),
        dtypes=("bf16",),
        features=("causal", "dense", "backward"),
        archs=("sm_80", "sm_90a", "sm_89"),
    )


def test_masks_and_layouts_that_are_not_mentioned_are_the_default_ones() -> None:
    wanted = headdim.parse({"pairs": [[8, 8]], "features": ["softcap"]})
    assert wanted.features == ("full", "causal", "dense", "varlen", "softcap")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (7, 'headdim.json is 7: expected a list of pairs, or an object with "pairs"'),
        ([[64, 128], 64], "headdim.json: pairs[1] is 64: expected a pair"),
        ([[64]], "headdim.json: pairs[0] is [64]: expected a pair [head_dim_qk, head_dim_v]"),
        ([[64, 1, 2]], "pairs[0] is [64, 1, 2]"),
        ([[8, 8], [64, 0]], "pairs[1] is [64, 0]: expected a head_dim_qk from 1 to 576"),
        ([[64, 513]], "pairs[0] is [64, 513]: expected a head_dim_qk from 1 to 576, a head_dim_v"),
        ([[577, 64]], "a head_dim_v from 1 to 512, both integers"),
        ([[64, "128"]], 'pairs[0] is [64, "128"]: expected a head_dim_qk'),
        ([[64, 1.5]], "pairs[0] is [64, 1.5]"),
        ([[True, 64]], "pairs[0] is [true, 64]"),
        ({"pair": [[64, 64]]}, "headdim.json: key 'pair' is [[64, 64]]: expected one of the keys"),
        ({"pairs": 5}, "headdim.json: pairs is 5: expected a list"),
        ({"equal_dims": [64, -1]}, "equal_dims[1] is -1: expected an integer from 1 to 512"),
        ({"dtypes": ["bf16", "fp8"]}, 'dtypes[1] is "fp8": expected one of bf16, fp16'),
        ({"dtypes": []}, "dtypes is []: expected at least one of"),
        ({"features": ["casual"]}, 'features[0] is "casual": expected one of full, causal'),
        ({"features": ["deterministic"]}, '"backward" too'),
        ({"archs": ["80", "75"]}, 'archs[1] is "75": expected one of 80, 86'),
        ({"archs": [80, "90b"]}, 'archs[1] is "90b"'),
        ({"archs": ["80a"]}, 'archs[0] is "80a"'),
    ],
)
def test_bad_content_is_named(content: Any, told: str) -> None:
    with pytest.raises(HeadDimError) as raised:
        headdim.parse(content)
    assert told in str(raised.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "headdim.json"
    with pytest.raises(HeadDimError, match="headdim.json cannot be read .*No such file"):
        headdim.read(path)
    path.write_text("[[64, 128],]")
    with pytest.raises(HeadDimError, match="headdim.json is not JSON: .*line 1"):
        headdim.read(path)
    path.write_text(json.dumps([[64, 128]]))
    assert headdim.read(path).pairs == ((64, 128),)


@pytest.mark.parametrize("text", ["80;90a", "80,90a", "8.0 9.0a", "sm_80;sm_90a"])
def test_the_environment_chooses_archs_before_the_file(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = headdim.parse({"pairs": [], "archs": ["120"]})
    monkeypatch.delenv("FLASH_ATTN_CUDA_ARCHS", raising=False)
    assert headdim.archs(wanted) == ("sm_120",)
    assert headdim.archs(Wanted()) == ("sm_80", "sm_90a")
    monkeypatch.setenv("FLASH_ATTN_CUDA_ARCHS", text)
    assert headdim.archs(wanted) == ("sm_80", "sm_90a")


def test_an_unknown_arch_of_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_CUDA_ARCHS", "80;70")
    with pytest.raises(HeadDimError, match=r'FLASH_ATTN_CUDA_ARCHS\[1\] is "70": expected one of'):
        headdim.archs(Wanted())
