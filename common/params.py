"""Parameter blocks packed from the text of common/device/params.cuh and what it includes, their
only definition.

A plan makes one block, sets the fields that its problem fixes, and patches pointers per call::

    block = ParamLayout.load("FwdParams").block()
    block.set("num_heads_q", 8)
    q_slot = block.pointer_slot("q")
    q_slot.value = q.data_ptr()                       # about 0.1 us
    kernel.launch(grid, block.kernel_params_address, stream)

The struct may hold pointers, ``i32 u32 i64 u64 f32``, fixed arrays of these, and ``TensorMap``
(``common/launch/tensor_map.py``); nothing else, so that natural C alignment is all there is to
know. It may extend others, ``struct A : B, C``, whose fields then come first, in that order: a
block of A serves code that takes B or C.
"""

from __future__ import annotations

import ctypes
import functools
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .runtime import sources

PARAMS_SOURCE = "common/device/params.cuh"
MAX_PARAMS_BYTES = 4096  # what a kernel's parameters may occupy on every supported toolkit
TENSOR_MAP_BYTES = 128
TENSOR_MAP_ALIGNMENT = 64

_SCALARS: Mapping[str, Any] = {
    "i32": ctypes.c_int32,
    "u32": ctypes.c_uint32,
    "i64": ctypes.c_int64,
    "u64": ctypes.c_uint64,
    "f32": ctypes.c_float,
}
_TensorMap = ctypes.c_uint64 * (TENSOR_MAP_BYTES // 8)
_POINTEES = {*_SCALARS, "void", "float", "u8", "u16"}
_RANGES = {"i32": (-(2**31), 2**31), "u32": (0, 2**32), "i64": (-(2**63), 2**63)}
_RANGES["u64"] = _RANGES["pointer"] = (0, 2**64)

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_POINTER = re.compile(r"(?:const\s+)?(\w+)\s*\*\s*(?:const\s+)?(?:__restrict__\s+)?(\w+)")
_DECLARATION = re.compile(r"(\w+)\s+(\w+(?:\s*\[\s*\d+\s*\])?(?:\s*,\s*\w+(?:\s*\[\s*\d+\s*\])?)*)")
_DECLARATOR = re.compile(r"(\w+)(?:\s*\[\s*(\d+)\s*\])?")


class ParamsError(ValueError):
    """A struct this packing does not cover, or a value that does not fit its field."""


@dataclass(frozen=True)
class Field:
    """kind: "pointer", "TensorMap" or the scalar type's name. count: an array's length, else 0."""

    name: str
    kind: str
    count: int
    offset: int

    @property
    def ctype(self) -> Any:
        if self.kind == "TensorMap":
            return _TensorMap
        return ctypes.c_uint64 if self.kind == "pointer" else _SCALARS[self.kind]

    @property
    def alignment(self) -> int:
        return TENSOR_MAP_ALIGNMENT if self.kind == "TensorMap" else ctypes.sizeof(self.ctype)

    @property
    def end(self) -> int:
        """Offset of the byte behind it."""
        return self.offset + ctypes.sizeof(self.ctype) * max(self.count, 1)


@dataclass(frozen=True)
class ParamLayout:
    """Offsets and size in bytes of one params struct, as a C++ compiler lays it out."""

    name: str
    fields: Mapping[str, Field]
    size: int
    end: int  # where a struct that extends this one goes on

    @classmethod
    def load(cls, name: str) -> ParamLayout:
        """Layout of a struct of params.cuh."""
        return _load(name)

    @classmethod
    def parse(cls, name: str, text: str | None = None) -> ParamLayout:
        """Layout of ``struct name`` in ``text`` (default: params.cuh). Raises ParamsError."""
        if text is None:
            return _load(name)
        text = _COMMENT.sub(" ", text)
        bases, body = _struct_body(name, text)
        fields, offset = cls._inherited(name, bases, text)
        for statement in body.split(";"):
            for field_name, kind, count in _declared(name, statement.strip()):
                field = Field(field_name, kind, count, 0)
                field = replace(field, offset=_round_up(offset, field.alignment))
                _add(name, fields, field)
                offset = field.end
        if not fields:
            raise ParamsError(f"struct {name} has no fields")
        size = _round_up(offset, max(field.alignment for field in fields.values()))
        # C++ reuses the padding behind a struct that extends another, and no other padding.
        end = offset if bases else size
        if size > MAX_PARAMS_BYTES:
            raise ParamsError(
                f"struct {name} has {size} bytes, at most {MAX_PARAMS_BYTES} are allowed"
            )
        return cls(name, fields, size, end)

    @classmethod
    def _inherited(cls, name: str, bases: Sequence[str], text: str) -> tuple[dict[str, Field], int]:
        """(fields of the extended structs, offset behind them)."""
        fields: dict[str, Field] = {}
        offset = 0
        for base in bases:
            part = cls.parse(base, text)
            begin = _round_up(offset, part.alignment)
            for field in part.fields.values():
                _add(name, fields, replace(field, offset=begin + field.offset))
            offset = begin + part.end
        return fields, offset

    @property
    def alignment(self) -> int:
        return max(field.alignment for field in self.fields.values())

    def block(self, **values: Any) -> ParamBlock:
        """A block of zeros (null pointers), with ``values`` set."""
        block = ParamBlock(self)
        for name, value in values.items():
            block.set(name, value)
        return block


class ParamBlock:
    """One packed parameter struct in memory of its own. Used by one thread at a time.

    address: of the struct. kernel_params_address: of a void*[1] array that holds ``address``, the
    kernelParams of a launch. Both live as long as this object.
    """

    def __init__(self, layout: ParamLayout) -> None:
        self.layout = layout
        self._memory = bytearray(layout.size + TENSOR_MAP_ALIGNMENT)  # zeroed
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        skipped = -begin % TENSOR_MAP_ALIGNMENT
        self._buffer = memoryview(self._memory)[skipped : skipped + layout.size]
        self.address = begin + skipped
        self._kernel_params = (ctypes.c_void_p * 1)(self.address)
        self.kernel_params_address = ctypes.addressof(self._kernel_params)

    def set(self, name: str, value: Any) -> None:
        """Stores a number, a pointer (None is null), a tensor map's bytes or, for an array, a
        sequence; checked.
        """
        field = self._field(name)
        if field.count == 0:
            self._store(field, field.offset, value)
            return
        if not isinstance(value, Sequence) or len(value) != field.count:
            raise ParamsError(f"{self._name(field)} takes {field.count} values, got {value!r}")
        for index, item in enumerate(value):
            self._store(field, field.offset + index * ctypes.sizeof(field.ctype), item)

    def get(self, name: str) -> Any:
        """The stored value; arrays as tuples, pointers as ints, tensor maps as bytes."""
        field = self._field(name)
        if field.kind == "TensorMap":
            return bytes(self._buffer[field.offset : field.offset + TENSOR_MAP_BYTES])
        array = (field.ctype * max(field.count, 1)).from_buffer(self._buffer, field.offset)
        return tuple(array) if field.count else array[0]

    def pointer_slot(self, name: str) -> ctypes.c_uint64:
        """A view of a pointer field; assigning an address to ``.value`` patches it, unchecked.

        Valid while the block lives: it holds no reference, which would take 200 bytes.
        """
        field = self._field(name)
        if field.kind != "pointer" or field.count:
            raise ParamsError(f"{self._name(field)} is not a pointer")
        return ctypes.c_uint64.from_address(self.address + field.offset)

    def scalar_slot(self, name: str) -> Any:
        """A view of a number that changes per call, like ``pointer_slot``. Unchecked: it wraps."""
        field = self._field(name)
        if field.kind not in _SCALARS or field.count:
            raise ParamsError(f"{self._name(field)} is not a single number")
        return field.ctype.from_address(self.address + field.offset)

    def tensor_map_slot(self, name: str) -> ctypes.c_uint64:
        """A view of the address in a tensor map, its first 8 bytes, like ``pointer_slot``.

        Where ``tensor_map.address_comes_first()``; else each address takes a new map and ``set``.
        """
        field = self._field(name)
        if field.kind != "TensorMap":
            raise ParamsError(f"{self._name(field)} is not a tensor map")
        return ctypes.c_uint64.from_address(self.address + field.offset)

    def tobytes(self) -> bytes:
        return bytes(self._buffer)

    def _field(self, name: str) -> Field:
        try:
            return self.layout.fields[name]
        except KeyError:
            known = ", ".join(self.layout.fields)
            raise ParamsError(
                f"{self.layout.name} has no field {name!r} (it has {known})"
            ) from None

    def _name(self, field: Field) -> str:
        kind = f"{field.kind}[{field.count}]" if field.count else field.kind
        return f"{self.layout.name}.{field.name} ({kind})"

    def _store(self, field: Field, offset: int, value: Any) -> None:
        if field.kind == "TensorMap":
            if not isinstance(value, bytes) or len(value) != TENSOR_MAP_BYTES:
                raise ParamsError(f"{self._name(field)} takes {TENSOR_MAP_BYTES} bytes")
            self._buffer[offset : offset + TENSOR_MAP_BYTES] = value
            return
        if field.kind == "f32":
            number: Any = self._checked_float(field, value)
        else:
            number = self._checked_int(field, value)
        field.ctype.from_buffer(self._buffer, offset).value = number

    def _checked_int(self, field: Field, value: Any) -> int:
        if value is None and field.kind == "pointer":
            return 0
        try:
            number = operator.index(value)
        except TypeError as error:
            raise ParamsError(f"{self._name(field)} takes an int, got {value!r}") from error
        low, end = _RANGES[field.kind]
        if not low <= number < end:
            raise ParamsError(f"{self._name(field)} cannot hold {number}")
        return number

    def _checked_float(self, field: Field, value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise ParamsError(f"{self._name(field)} takes a number, got {value!r}") from error
        if abs(number) != float("inf") and abs(ctypes.c_float(number).value) == float("inf"):
            raise ParamsError(f"{self._name(field)} cannot hold {number}")
        return number


@functools.cache
def _load(name: str) -> ParamLayout:
    return ParamLayout.parse(name, "\n".join(sources.resolve(PARAMS_SOURCE).values()))


def _round_up(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _add(struct: str, fields: dict[str, Field], field: Field) -> None:
    if field.name in fields:
        raise ParamsError(f"{struct}.{field.name} is declared twice")
    fields[field.name] = field


def _struct_body(name: str, text: str) -> tuple[list[str], str]:
    """(names of the structs that it extends, text between the braces)."""
    found = re.findall(
        rf"\bstruct\s+{re.escape(name)}\s*(?::\s*(\w+(?:\s*,\s*\w+)*)\s*)?\{{(.*?)\}}\s*;",
        text,
        re.DOTALL,
    )
    if len(found) != 1:
        raise ParamsError(f"expected one definition of struct {name}, found {len(found)}")
    bases, body = found[0]
    if "{" in body:
        raise ParamsError(f"struct {name} may hold plain fields only")
    return re.findall(r"\w+", bases), body


def _declared(struct: str, statement: str) -> list[tuple[str, str, int]]:
    """(name, kind, count) of each field a declaration makes."""
    if not statement:
        return []
    pointer = _POINTER.fullmatch(statement)
    if pointer is not None and pointer.group(1) in _POINTEES:
        return [(pointer.group(2), "pointer", 0)]
    declaration = _DECLARATION.fullmatch(statement)
    kind = declaration.group(1) if declaration is not None else ""
    if declaration is None or kind not in (*_SCALARS, "TensorMap"):
        raise ParamsError(
            f"struct {struct}: cannot read {statement!r}; allowed are pointers, "
            f"{', '.join(_SCALARS)}, fixed arrays of these, and TensorMap"
        )
    names = [(n, kind, int(count or 0)) for n, count in _DECLARATOR.findall(declaration.group(2))]
    if kind == "TensorMap" and any(count for _, _, count in names):
        raise ParamsError(f"struct {struct}: {statement!r}: arrays of TensorMap are not covered")
    return names
