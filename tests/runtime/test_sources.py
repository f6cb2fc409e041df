"""The include resolver: what it finds, under which name, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_kernels import SCALE, tiny_tree

from flash_attn_interface._common.runtime import sources

__all__ = ["tiny_tree"]


def test_finds_what_is_included_and_nothing_else(tiny_tree: Path) -> None:
    texts = sources.resolve("tiny/scale.cu")
    assert list(texts) == ["tiny/scale.cu", "tiny/op.cuh"]
    assert texts["tiny/scale.cu"] == SCALE


def test_follows_includes_of_includes_once_each_and_survives_cycles(tiny_tree: Path) -> None:
    (tiny_tree / "deep").mkdir()
    (tiny_tree / "op.cuh").write_text('#pragma once\n  #  include "tiny/deep/a.cuh"  // why\n')
    (tiny_tree / "deep" / "a.cuh").write_text(
        '#include "tiny/deep/b.cuh"\n#include "tiny/op.cuh"\n'
    )
    (tiny_tree / "deep" / "b.cuh").write_text(
        '#include "tiny/deep/a.cuh"\n#include "prelude.cuh"\n'
    )
    names = list(sources.resolve("tiny/scale.cu"))
    assert names == ["tiny/scale.cu", "tiny/op.cuh", "tiny/deep/a.cuh", "tiny/deep/b.cuh"]


def test_commented_out_includes_are_not_followed(tiny_tree: Path) -> None:
    (tiny_tree / "op.cuh").write_text('// #include "tiny/absent.cuh"\n')
    assert list(sources.resolve("tiny/scale.cu")) == ["tiny/scale.cu", "tiny/op.cuh"]


def test_a_missing_include_names_the_file_that_asks_for_it(tiny_tree: Path) -> None:
    (tiny_tree / "op.cuh").write_text('#include "tiny/absent.cuh"\n')
    with pytest.raises(sources.SourceError, match=r"'tiny/absent.cuh' .*, included by tiny/op.cuh"):
        sources.resolve("tiny/scale.cu")


@pytest.mark.parametrize(
    ("include", "reason"),
    [
        ("<cuda_fp16.h>", "includes <cuda_fp16.h>"),
        ("NAME", "includes NAME"),
        ('"nowhere/x.cuh"', r"unknown include root 'nowhere' \(known: common, flash2"),
        ('"tiny/../../etc/passwd"', "include name must be"),
        ('"op.cuh"', "include name must be"),
    ],
)
def test_includes_that_would_bypass_the_cache_key_are_refused(
    tiny_tree: Path, include: str, reason: str
) -> None:
    (tiny_tree / "op.cuh").write_text(f"#include {include}\n")
    with pytest.raises(sources.SourceError, match=reason):
        sources.resolve("tiny/scale.cu")


def test_the_simulator_gets_its_twins_under_the_same_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {
        "ptx/mma.cuh": '#include "common/ptx/base.cuh"\n',
        "ptx/base.cuh": "",
        "sim/ptx/mma.cuh": '#include "common/ptx/base.cuh"\n#include <cmath>\n',
        "sim/ptx/base.cuh": '#include "common/sim/runtime/warp.h"\n',
        "sim/runtime/warp.h": "#include <vector>\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sources, "root_folder", lambda name: tmp_path)
    sources.read.cache_clear()
    try:
        device = sources.resolve("common/ptx/mma.cuh")
        simulated = sources.resolve("common/ptx/mma.cuh", simulate=True)
    finally:
        sources.read.cache_clear()
    assert list(device) == ["common/ptx/mma.cuh", "common/ptx/base.cuh"]
    assert list(simulated) == [*device, "common/sim/runtime/warp.h"]
    assert "<cmath>" in simulated["common/ptx/mma.cuh"]


def test_wgmma_shapes_are_generated_from_the_constants() -> None:
    constants = (("bf16", True), ("wgmma_qk_n", 176), ("wgmma_pv_n", 64))
    texts = sources.resolve("common/ptx/wgmma.cuh", constants=constants)
    assert list(texts) == ["common/ptx/wgmma.cuh", "common/ptx/base.cuh", sources.WGMMA_SHAPES]
    assert "m64n176k16.f32.bf16.bf16" in texts[sources.WGMMA_SHAPES]
    other = sources.resolve("common/ptx/wgmma.cuh", constants=(("wgmma_qk_n", 8),))
    assert other[sources.WGMMA_SHAPES] != texts[sources.WGMMA_SHAPES]
    simulated = sources.resolve("common/ptx/wgmma.cuh", simulate=True, constants=constants)
    assert sources.WGMMA_SHAPES not in simulated


def test_texts_are_read_once_per_process(tiny_tree: Path) -> None:
    before = sources.resolve("tiny/scale.cu")
    (tiny_tree / "op.cuh").write_text("changed under the running process")
    assert sources.resolve("tiny/scale.cu") == before


@pytest.mark.parametrize("name", ["common", "flash2", "Hopper", "a/b", ""])
def test_roots_that_cannot_be_registered(name: str) -> None:
    with pytest.raises(sources.SourceError, match="cannot be registered"):
        sources.register_root(name, "/")


def test_a_registered_tree_is_an_include_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_registered", {})
    sources.register_root("hopper", tmp_path)
    (tmp_path / "fwd.cu").write_text("// hopper\n")
    assert sources.resolve("hopper/fwd.cu") == {"hopper/fwd.cu": "// hopper\n"}
    sources.read.cache_clear()


def test_installed_roots_exist() -> None:
    assert (sources.root_folder("common") / "params.py").is_file()
    assert (sources.root_folder("flash2") / "__init__.py").is_file()
    assert sources.package_folder().name == "flash_attn_interface"
