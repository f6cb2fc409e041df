"""KernelSpec: the value, its prelude and names, and what it refuses."""

from __future__ import annotations

import json

import pytest

from flash_attn_interface._common.runtime.spec import KernelSpec, cpp_name

BASE = {"num_threads": 128, "min_ctas_per_sm": 1, "smem_bytes": 65536}


def spec(arch: str = "sm_80", **constants: bool | int) -> KernelSpec:
    return KernelSpec.make(
        "flash2/fwd.cu", "flash2_fwd", "FwdParams", arch, **{**BASE, **constants}
    )


def test_order_of_constants_does_not_matter() -> None:
    first = spec(block_m=128, causal=True)
    again = spec(causal=True, block_m=128)
    assert first == again and hash(first) == hash(again)
    assert first != spec(causal=False, block_m=128)
    assert first["block_m"] == 128 and first["causal"] is True
    with pytest.raises(KeyError, match="flash2_fwd has no constant 'block_n'"):
        first["block_n"]


def test_prelude_is_the_cfg_struct() -> None:
    text = spec(head_dim_qk=128, causal=True, dropout=False, offset=-3).prelude()
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0].startswith("// flash2_fwd (flash2/fwd.cu) for sm_80: causal=True")
    assert lines[1:] == [
        "#pragma once",
        "struct Cfg {",
        "static constexpr bool kCausal = true;",
        "static constexpr bool kDropout = false;",
        "static constexpr int kHeadDimQk = 128;",
        "static constexpr int kMinCtasPerSm = 1;",
        "static constexpr int kNumThreads = 128;",
        "static constexpr int kOffset = -3;",
        "static constexpr int kSmemBytes = 65536;",
        "};",
    ]


def test_names_map_mechanically() -> None:
    assert cpp_name("head_dim_qk") == "kHeadDimQk"
    assert cpp_name("block_m") == "kBlockM"


@pytest.mark.parametrize(
    ("constants", "label"),
    [
        (
            {"bf16": True, "head_dim_qk": 128, "head_dim_v": 256, "causal": True, "local": False},
            "flash2-fwd-bf16-qk128-v256-causal-sm_80",
        ),
        (
            {"bf16": False, "head_dim_qk": 64, "varlen_q": True},
            "flash2-fwd-fp16-qk64-varlen-q-sm_80",
        ),
        ({}, "flash2-fwd-sm_80"),
    ],
)
def test_label(constants: dict[str, bool | int], label: str) -> None:
    assert spec("sm_80", **constants).label() == label


def test_describe_leaves_nothing_out() -> None:
    one = spec(block_m=64, causal=False)
    assert one.describe() == (
        "flash2_fwd (flash2/fwd.cu) for sm_80: block_m=64, causal=False, min_ctas_per_sm=1, "
        "num_threads=128, smem_bytes=65536"
    )


def test_json_round_trip_keeps_types() -> None:
    one = spec("sm_90a", causal=True, stages=1)
    again = KernelSpec.from_dict(json.loads(json.dumps(one.as_dict())))
    assert again == one
    assert again["causal"] is True and again["stages"] == 1 and again["stages"] is not True


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"source": "../fwd.cu"}, "source is malformed"),
        ({"source": "fwd.cu"}, "source is malformed"),
        ({"entry": "flash2 fwd"}, "entry is malformed"),
        ({"arch": "lto_80"}, "arch is malformed"),
        ({"arch": "sm_75"}, "unknown architecture 'sm_75'"),
        (
            {"constants": (("causal", True),)},
            "min_ctas_per_sm, num_threads, smem_bytes are missing",
        ),
        ({"constants": (("b", 1), ("a", 1))}, "sorted and unique"),
    ],
)
def test_malformed_specs_are_refused(changes: dict[str, object], reason: str) -> None:
    good = spec()
    fields = {n: getattr(good, n) for n in ("source", "entry", "params", "arch", "constants")}
    with pytest.raises(ValueError, match=reason):
        KernelSpec(**{**fields, **changes}).validate()


@pytest.mark.parametrize(
    ("arch", "constants", "reason"),
    [
        ("sm_80", {"blockM": 128}, "'blockM' is not snake_case"),
        ("sm_80", {"scale": 0.5}, "scale=0.5 is neither bool nor 32-bit int"),
        ("sm_80", {"big": 2**31}, "neither bool nor 32-bit int"),
        ("sm_80", {"num_threads": 100}, "num_threads=100 must be a multiple of 32"),
        ("sm_80", {"num_threads": 2048}, "num_threads=2048 must be a multiple of 32 up to 1024"),
        ("sm_86", {"smem_bytes": 102400}, "smem_bytes=102400, sm_86 offers a CTA 101376"),
        ("sm_80", {"min_ctas_per_sm": 3}, "min_ctas_per_sm=3, but 2 CTAs of 128 threads"),
        ("sm_80", {"min_ctas_per_sm": 0}, "min_ctas_per_sm=0"),
    ],
)
def test_what_cannot_be_compiled_or_launched_is_refused(
    arch: str, constants: dict[str, bool | int], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        spec(arch, **constants)
