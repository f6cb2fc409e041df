"""Packing of parameter structs: the C++ compiler's layout, checked stores, cheap patches."""

from __future__ import annotations

import ctypes
import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_attn_interface._common import params
from flash_attn_interface._common.params import ParamLayout, ParamsError
from flash_attn_interface._common.runtime import compiler, sources

TEXT = """
#pragma once
struct Other { i32 x; };
// struct FwdParams { i32 decoy; };
struct FwdParams {
  // Inputs; a comment with a ; in it
  const void* q;  // (batch, seqlen_q, num_heads_q, head_dim_qk)
  void* __restrict__ out;
  const i32* cu_seqlens_q;  /* nullable; i64 not_a_field; */
  float* lse;
  f32 scale, cap;
  i32 batch;
  i64 strides[3], row_stride;
  u32 flag;
  u64 seed;
  i32 window[2];
};
"""
LAYOUT = ParamLayout.parse("FwdParams", TEXT)


def test_offsets() -> None:
    assert {n: (f.kind, f.count, f.offset) for n, f in LAYOUT.fields.items()} == {
        "q": ("pointer", 0, 0),
        "out": ("pointer", 0, 8),
        "cu_seqlens_q": ("pointer", 0, 16),
        "lse": ("pointer", 0, 24),
        "scale": ("f32", 0, 32),
        "cap": ("f32", 0, 36),
        "batch": ("i32", 0, 40),
        "strides": ("i64", 3, 48),
        "row_stride": ("i64", 0, 72),
        "flag": ("u32", 0, 80),
        "seed": ("u64", 0, 88),
        "window": ("i32", 2, 96),
    }
    assert LAYOUT.size == 104
    assert ParamLayout.parse("Other", TEXT).size == 4


def test_bytes_of_a_block() -> None:
    block = LAYOUT.block(q=0x1122334455667788, scale=0.5, batch=-3, strides=(1, -2, 2**40))
    block.set("seed", 2**64 - 1)
    block.set("window", [-1, 0])
    block.set("lse", None)
    expected = struct.pack(
        "<QQQQ ff i4x qqq q I4x Q ii",
        *(0x1122334455667788, 0, 0, 0, 0.5, 0.0, -3, 1, -2, 2**40, 0, 0, 2**64 - 1, -1, 0),
    )
    assert block.tobytes() == expected
    assert ctypes.string_at(block.address, LAYOUT.size) == expected
    assert block.get("strides") == (1, -2, 2**40)
    assert block.get("q") == 0x1122334455667788 and block.get("scale") == 0.5


def test_kernel_params_address_holds_the_address_of_the_block() -> None:
    block = LAYOUT.block()
    assert ctypes.c_void_p.from_address(block.kernel_params_address).value == block.address
    assert block.address % 8 == 0
    other = LAYOUT.block()
    assert other.address != block.address


def test_slots_patch_in_place() -> None:
    block = LAYOUT.block(q=1)
    slot = block.pointer_slot("q")
    assert slot.value == 1
    slot.value = 0xFFFF800000000010
    assert block.get("q") == 0xFFFF800000000010
    count = block.scalar_slot("batch")
    count.value = 7
    assert block.get("batch") == 7


def test_a_slot_is_a_view_of_its_block() -> None:
    block = LAYOUT.block(q=5)
    slot = block.pointer_slot("q")
    assert slot.value == 5
    slot.value = 2**40
    assert block.get("q") == 2**40


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("nothing", 1, r"FwdParams has no field 'nothing' \(it has q, out, "),
        ("batch", 2**31, r"FwdParams.batch \(i32\) cannot hold 2147483648"),
        ("batch", 1.0, "takes an int, got 1.0"),
        ("batch", None, "takes an int, got None"),
        ("flag", -1, "cannot hold -1"),
        ("seed", 2**64, "cannot hold"),
        ("q", -1, r"FwdParams.q \(pointer\) cannot hold -1"),
        ("scale", "fast", "takes a number, got 'fast'"),
        ("scale", 1e39, "cannot hold 1e\\+39"),
        ("strides", (1, 2), r"FwdParams.strides \(i64\[3\]\) takes 3 values"),
        ("strides", 1, "takes 3 values, got 1"),
    ],
)
def test_values_that_do_not_fit_are_refused(name: str, value: object, reason: str) -> None:
    block = LAYOUT.block()
    with pytest.raises(ParamsError, match=reason):
        block.set(name, value)
    assert block.tobytes() == bytes(LAYOUT.size)


def test_infinite_scales_are_allowed() -> None:
    assert LAYOUT.block(scale=float("-inf")).get("scale") == float("-inf")


@pytest.mark.parametrize(
    ("name", "reason"), [("batch", "is not a pointer"), ("strides", "is not a pointer")]
)
def test_pointer_slots_are_for_pointers(name: str, reason: str) -> None:
    with pytest.raises(ParamsError, match=reason):
        LAYOUT.block().pointer_slot(name)


@pytest.mark.parametrize("name", ["q", "strides"])
def test_scalar_slots_are_for_numbers(name: str) -> None:
    with pytest.raises(ParamsError, match="is not a single number"):
        LAYOUT.block().scalar_slot(name)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("int n;", "cannot read 'int n'"),
        ("bool causal;", "cannot read 'bool causal'"),
        ("double x;", "cannot read"),
        ("i32 n = 3;", "cannot read 'i32 n = 3'"),
        ("Inner inner;", "cannot read 'Inner inner'"),
        ("Thing* p;", "cannot read"),
        ("const i32 *p, *q;", "cannot read"),
        ("void** pp;", "cannot read"),
        ("i32 n; i64 n;", "P.n is declared twice"),
        ("struct { i32 a; } inner;", "plain fields only|cannot read"),
        ("", "has no fields"),
        ("i64 big[513];", "has 4104 bytes, at most 4096"),
    ],
)
def test_what_the_packing_does_not_cover_is_refused(body: str, reason: str) -> None:
    with pytest.raises(ParamsError, match=reason):
        ParamLayout.parse("P", f"struct P {{ {body} }};")


MAPS_TEXT = """
struct alignas(64) TensorMap { u64 opaque[16]; };
struct MapParams {
  i32 n;
  TensorMap q_map, k_map;  // boxes of 64 rows
  void* out;
};
"""
MAPS = ParamLayout.parse("MapParams", MAPS_TEXT)


def test_tensor_maps_are_aligned_and_so_is_their_block() -> None:
    assert {n: f.offset for n, f in MAPS.fields.items()} == {
        "n": 0, "q_map": 64, "k_map": 192, "out": 320
    }  # fmt: skip
    assert MAPS.size == 384
    assert all(MAPS.block().address % 64 == 0 for _ in range(16))


def test_tensor_maps_are_stored_and_their_address_patched() -> None:
    encoded = bytes(range(128))
    block = MAPS.block(n=-1, k_map=encoded, out=5)
    assert block.get("k_map") == encoded and block.get("q_map") == bytes(128)
    assert ctypes.string_at(block.address + 192, 128) == encoded
    slot = block.tensor_map_slot("k_map")
    slot.value = 0x7FFF00000010
    assert block.get("k_map") == struct.pack("<Q", 0x7FFF00000010) + encoded[8:]
    assert block.get("n") == -1 and block.get("out") == 5


def test_what_is_no_tensor_map_is_refused() -> None:
    block = MAPS.block()
    for value in (bytes(127), 0, None):
        with pytest.raises(ParamsError, match=r"MapParams.q_map \(TensorMap\) takes 128 bytes"):
            block.set("q_map", value)
    for slot, name in (
        ("pointer_slot", "q_map"),
        ("scalar_slot", "q_map"),
        ("tensor_map_slot", "n"),
    ):
        with pytest.raises(ParamsError, match="is not a"):
            getattr(block, slot)(name)
    with pytest.raises(ParamsError, match="arrays of TensorMap are not covered"):
        ParamLayout.parse("P", "struct P { TensorMap maps[2]; };")


@pytest.mark.parametrize("count", [0, 2])
def test_there_must_be_one_definition(count: int) -> None:
    with pytest.raises(ParamsError, match=f"one definition of struct P, found {count}"):
        ParamLayout.parse("P", "struct P { i32 a; };\n" * count)


BASES_TEXT = """
struct Mask { i32 left, right, chunk; };
struct Score { const f32* slopes; f32 scale; };  // 4 bytes of padding at its end stay empty
struct Both : Mask, Score {};
struct Odd : Both { i32 n; };  // its padding does not
struct More : Odd { i32 m; i64 stride; };
"""
BASES = tuple(ParamLayout.parse(name, BASES_TEXT) for name in ("Both", "Odd", "More"))


def test_extended_structs_come_first() -> None:
    assert {n: f.offset for n, f in BASES[-1].fields.items()} == {
        "left": 0, "right": 4, "chunk": 8, "slopes": 16, "scale": 24, "n": 32, "m": 36, "stride": 40
    }  # fmt: skip
    assert [layout.size for layout in BASES] == [32, 40, 48]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("struct P : Mask, Mask { i32 n; };", "P.left is declared twice"),
        ("struct P : Score { i32 scale; };", "P.scale is declared twice"),
        ("struct P : Nothing { i32 n; };", "one definition of struct Nothing, found 0"),
    ],
)
def test_what_cannot_be_extended_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ParamsError, match=reason):
        ParamLayout.parse("P", BASES_TEXT + text)


TYPES = ["i32", "u32", "i64", "u64", "f32", "const void*", "float*", "const i32*"]
DECLARATIONS = st.lists(
    st.tuples(st.sampled_from(TYPES), st.integers(0, 4)), min_size=1, max_size=9
)


def _struct_text(declarations: list[tuple[str, int]]) -> str:
    lines = [
        f"  {kind} f{i}{f'[{count}]' if count and '*' not in kind else ''};"
        for i, (kind, count) in enumerate(declarations)
    ]
    return "\n".join(["struct P {", *lines, "};"])


@given(DECLARATIONS)
def test_layout_is_that_of_ctypes(declarations: list[tuple[str, int]]) -> None:
    layout = ParamLayout.parse("P", _struct_text(declarations))
    fields = [(f.name, f.ctype * f.count if f.count else f.ctype) for f in layout.fields.values()]
    oracle = type("P", (ctypes.Structure,), {"_fields_": fields})
    assert layout.size == ctypes.sizeof(oracle)
    for name, field in layout.fields.items():
        assert field.offset == getattr(oracle, name).offset


# NVRTC has no offsetof of any spelling; this is what its front end makes constant addresses with.
OFFSET_OF = "#define OFFSET_OF(type, field) __INTADDR__(&(((type*)0)->field))\n"


def _asserts(name: str, layout: ParamLayout) -> str:
    lines = [f"static_assert(sizeof({name}) == {layout.size});"]
    lines += [
        f"static_assert(OFFSET_OF({name}, {field.name}) == {field.offset});"
        for field in layout.fields.values()
    ]
    return "\n".join(lines) + "\n"


def _compile(text: str, headers: dict[str, str]) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    nvrtc = compiler.load_nvrtc()
    _, program = nvrtc.nvrtcCreateProgram(
        text.encode(),
        b"layout.cu",
        len(headers),
        [header.encode() for header in headers.values()],
        [name.encode() for name in headers],
    )
    (status,) = nvrtc.nvrtcCompileProgram(program, 1, [b"--std=c++17"])
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytearray(size)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert int(status) == 0, log.decode()


def test_layout_is_that_of_the_device_compiler() -> None:
    types = "using i32 = int; using u32 = unsigned; using i64 = long long; using f32 = float;\n"
    types += "using u64 = unsigned long long;\n"
    _compile(OFFSET_OF + types + TEXT + _asserts("FwdParams", LAYOUT), {})
    _compile(OFFSET_OF + types + MAPS_TEXT + _asserts("MapParams", MAPS), {})
    asserts = "".join(_asserts(layout.name, layout) for layout in BASES)
    _compile(OFFSET_OF + types + BASES_TEXT + asserts, {})


def test_the_kernels_own_structs_are_packed_as_the_device_compiler_does() -> None:
    headers = sources.resolve(params.PARAMS_SOURCE)
    text = "\n".join(headers.values())
    names = re.findall(r"^struct (\w+Params)[\s\w:,]*\{", text, re.MULTILINE)
    assert {"FwdParams", "BwdParams", "HopperBwdParams"} <= set(names)
    text = f'{OFFSET_OF}#include "{params.PARAMS_SOURCE}"\n'
    _compile(text + "".join(_asserts(n, ParamLayout.load(n)) for n in names), headers)
    assert ParamLayout.parse("FwdParams") is ParamLayout.load("FwdParams")
