"""Counts the machine instructions of a cubin by opcode, without nvdisasm or cuobjdump.

For tests of what the compiler made: tensor core instructions present, local memory absent. Volta
and later encode an instruction in 128 bits: bits 0-8 are the operation, bits 9-11 the kind of its
operands (register, immediate, constant, uniform register). The table was taken from nvdisasm's
output for sm_80 to sm_120, and a test compares the two where nvdisasm is installed.
"""

from __future__ import annotations

import struct
from collections import Counter

_INSTRUCTION_BYTES = 16
_OPCODE_MASK = 0xFFF
_OPERATION_MASK = 0x1FF
_ELF64_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_ELF64_SECTION = struct.Struct("<IIQQQQIIQQ")

# Mnemonic -> bits 0-8. HMMA is mma.sync, HGMMA wgmma, LDL and STL are local memory (spills, indexed
# arrays), LDSM ldmatrix, LDGSTS cp.async, MUFU ex2/lg2/rcp/tanh, F2FP the conversion to 16 bits.
OPERATIONS = {
    "ATOMG": (0x1A8,),
    "BAR": (0x11D,),
    "F2FP": (0x03E,),
    "FADD": (0x021,),
    "FFMA": (0x023,),
    "FMNMX": (0x009,),
    "FMUL": (0x020,),
    "HGMMA": (0x1F0,),
    "HMMA": (0x03C,),
    "LDG": (0x181,),
    "LDGSTS": (0x1AE,),
    "LDL": (0x183,),
    "LDS": (0x184,),
    "LDSM": (0x03B,),
    "MUFU": (0x108,),
    "RED": (0x18E, 0x1A6),  # REDG on newer architectures
    "SHFL": (0x189,),
    "STG": (0x186,),
    "STL": (0x187,),
    "STS": (0x188,),
}


def opcode_counts(cubin: bytes, entry: str) -> Counter[int]:
    """Number of instructions of kernel ``entry`` by their low 12 bits."""
    code = _section(cubin, f".text.{entry}")
    return Counter(
        int.from_bytes(code[at : at + 2], "little") & _OPCODE_MASK
        for at in range(0, len(code), _INSTRUCTION_BYTES)
    )


def count(cubin: bytes, entry: str, mnemonic: str) -> int:
    """Number of instructions ``mnemonic`` (a key of OPERATIONS) in kernel ``entry``."""
    operations = OPERATIONS[mnemonic]
    counts = opcode_counts(cubin, entry)
    return sum(n for opcode, n in counts.items() if opcode & _OPERATION_MASK in operations)


def _section(cubin: bytes, wanted: str) -> bytes:
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError("not a 64-bit ELF file")
    header = _ELF64_HEADER.unpack_from(cubin)
    table, entry_bytes, number, names_index = header[6], header[11], header[12], header[13]
    sections = [_ELF64_SECTION.unpack_from(cubin, table + i * entry_bytes) for i in range(number)]
    names_at = sections[names_index][4]
    found = []
    for name_at, _, _, _, offset, size, *_ in sections:
        begin = names_at + name_at
        name = cubin[begin : cubin.index(b"\0", begin)].decode()
        if name == wanted:
            return cubin[offset : offset + size]
        found.append(name)
    raise ValueError(f"no section {wanted} (there are {', '.join(found)})")
