"""The generator of the WGMMA wrappers, and that compiler and cache see what it generates."""

from __future__ import annotations

import re

import hopper_probes
import pytest

from flash_attn_interface._common.ptx import wgmma
from flash_attn_interface._common.runtime import compiler, cubins, sass, sources
from flash_attn_interface._common.runtime.spec import KernelSpec


def spec(n: int, head_dim: int, bf16: bool = True) -> KernelSpec:
    name = "probe_tma_wgmma"
    return KernelSpec.make(
        f"tests/kernels/{name}.cu", name, "HopperProbeParams", hopper_probes.ARCH,
        num_threads=256, min_ctas_per_sm=1, smem_bytes=head_dim // 64 * 128 * (64 + 2 * n) + 16,
        wgmma_qk_n=n, wgmma_pv_n=head_dim, bf16=bf16,
    )  # fmt: skip


def test_each_named_width_is_written_once() -> None:
    constants = (("bf16", False), ("wgmma_qk_n", 64), ("wgmma_pv_n", 64), ("wgmma_x_n", 8))
    text = wgmma.shapes_source(constants)
    assert re.findall(r"struct (\S+ \S+ \S+) ", text) == [
        "WgmmaProduct<8, false, kTransB>",
        "WgmmaProduct<64, false, kTransB>",
    ]
    assert text.count("m64n64k16.f32.f16.f16") == 2  # from shared memory, from registers


def test_both_types_where_the_spec_fixes_none() -> None:
    text = wgmma.shapes_source([("wgmma_qk_n", 16)])
    assert "WgmmaProduct<16, false, kTransB>" in text and "WgmmaProduct<16, true, kTransB>" in text


def test_a_kernel_without_products_gets_an_empty_text() -> None:
    assert "struct" not in wgmma.shapes_source([("bf16", True), ("block_n", 128)])


@pytest.mark.parametrize("n", [0, 4, 12, 264, True])
def test_widths_that_do_not_exist_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=r"wgmma_qk_n=\w+: WGMMA's N is a multiple of 8"):
        wgmma.shapes_source([("wgmma_qk_n", n)])


def test_operands_are_numbered_in_their_order() -> None:
    text = wgmma.shapes_source([("bf16", True), ("wgmma_qk_n", 40)])
    statements = re.findall(r"asm volatile\((.*?)\);\n", text, re.DOTALL)
    assert len(statements) == 2
    for statement in statements:
        template, outputs, inputs = statement.split("\n        : ")
        operands = len(re.findall(r'"(?:\+f|l|r|n)"\(', outputs + inputs))
        numbers = [int(number) for number in re.findall(r"%(\d+)", template)]
        assert sorted(numbers) == list(range(operands))


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp16"])
def test_products_become_hgmma_without_serialisation(bf16: bool) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    kernel = spec(128, 64, bf16)
    texts = sources.resolve(kernel.source, constants=kernel.constants)
    compiled = compiler.compile_cubin(kernel, texts)
    assert sass.count(compiled.cubin, kernel.entry, "HGMMA") == 64 // 16 + 128 // 16
    assert "serializ" not in compiled.log and "C75" not in compiled.log
    assert compiled.resources.spill_store_bytes == 0


def test_what_is_generated_is_part_of_the_key() -> None:
    kernel = spec(128, 64)
    texts = sources.resolve(kernel.source, constants=kernel.constants)
    assert sources.WGMMA_SHAPES in texts
    changed = {**texts, sources.WGMMA_SHAPES: texts[sources.WGMMA_SHAPES] + "\n"}
    assert cubins.source_key(kernel, texts) != cubins.source_key(kernel, changed)
