"""Hardware limits by architecture, and which architecture a device's kernels are compiled for.

Data from the compute capability tables of the CUDA programming guide. Tile tables and
``KernelSpec.validate`` read it, so that a kernel that cannot be launched is refused with a reason
before it is compiled.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# The driver keeps this much of an SM's shared memory per resident CTA for itself (sm_80 and later).
RESERVED_SMEM_PER_CTA = 1024


@dataclass(frozen=True)
class ArchLimits:
    """What one SM offers. Byte counts, threads and 32-bit registers.

    name: without suffix, "sm_90" for sm_90a too.
    max_smem_per_cta: dynamic plus static shared memory one CTA may ask for (opt-in maximum).
    smem_per_sm: shared memory of all resident CTAs, RESERVED_SMEM_PER_CTA of each included.
    """

    name: str
    max_smem_per_cta: int
    smem_per_sm: int
    max_threads_per_sm: int
    registers_per_sm: int = 65536
    max_threads_per_cta: int = 1024
    max_registers_per_thread: int = 255

    @property
    def max_cluster_size(self) -> int:
        """CTAs of a cluster that may be relied on; 1: no clusters."""
        return 8 if self.name in ("sm_90", "sm_100", "sm_103") else 1

    def max_ctas_per_sm(self, smem_bytes: int, num_threads: int) -> int:
        """CTAs of this size that fit on one SM by shared memory and threads (registers aside)."""
        if smem_bytes > self.max_smem_per_cta or num_threads > self.max_threads_per_cta:
            return 0
        by_smem = self.smem_per_sm // (smem_bytes + RESERVED_SMEM_PER_CTA)
        return min(by_smem, self.max_threads_per_sm // num_threads)


def _row(name: str, smem_per_sm_kib: int, max_threads_per_sm: int) -> ArchLimits:
    smem_per_sm = smem_per_sm_kib * 1024
    return ArchLimits(name, smem_per_sm - RESERVED_SMEM_PER_CTA, smem_per_sm, max_threads_per_sm)


_LIMITS = {
    row.name: row
    for row in (
        _row("sm_80", 164, 2048),  # A100
        _row("sm_86", 100, 1536),  # A10, A40, RTX 30
        _row("sm_87", 164, 1536),  # Jetson Orin
        _row("sm_89", 100, 1536),  # L4, L40, RTX 40
        _row("sm_90", 228, 2048),  # H100, H200
        _row("sm_100", 228, 2048),  # B200
        _row("sm_103", 228, 2048),  # B300
        _row("sm_110", 228, 1536),  # Jetson Thor
        _row("sm_120", 100, 1536),  # RTX 50, RTX PRO Blackwell
        _row("sm_121", 100, 1536),  # DGX Spark
    )
}


_VIRTUAL = "compute_"


def virtual(arch: str) -> str:
    """The architecture whose PTX holds what "sm_XX" code holds, for any newer GPU to translate."""
    return arch.replace("sm_", _VIRTUAL)


def is_virtual(arch: str) -> bool:
    """Whether the compiler makes PTX for it, not machine code."""
    return arch.startswith(_VIRTUAL)


def known_archs() -> tuple[str, ...]:
    return tuple(_LIMITS)


def limits(arch: str) -> ArchLimits:
    """Limits of "sm_XX", with or without the suffix of arch-specific code ("sm_90a"). "compute_XX",
    the virtual architecture that PTX is for, has those of sm_XX.

    ValueError for what is no such name.
    """
    row = None
    if isinstance(arch, str):
        row = _LIMITS.get(re.sub(r"(?<=\d)[af]$", "", arch).replace(_VIRTUAL, "sm_"))
    if row is None:
        raise ValueError(f"arch: unknown architecture {arch!r} (known: {', '.join(_LIMITS)})")
    return row


def arch_of(capability: tuple[int, int]) -> str:
    """Architecture to compile for on a device of this compute capability, e.g. (8, 6) -> "sm_86".

    A minor revision not listed runs the newest listed code of its major: machine code is compatible
    upwards within one. NotImplementedError below sm_80 and for majors not listed.
    """
    major, minor = capability
    best = None
    for name in _LIMITS:
        number = int(name[3:])
        if number // 10 == major and number % 10 <= minor:
            best = name
    if best is None:
        raise NotImplementedError(
            f"GPU of compute capability {major}.{minor} is not supported: the kernels need one of "
            f"{', '.join(_LIMITS)} (Ampere or newer). Run the call on such a GPU or on CPU tensors."
        )
    return best


# Systems on a chip: compute capability says less about them than for boards. What NVIDIA promises
# of machine code within a major version does not hold from or to them.
_CHIPS = ("sm_87", "sm_110")


def older_compatible(arch: str) -> tuple[str, ...]:
    """Architectures whose machine code runs unchanged on `arch` too, the newest first.

    Within a major version, machine code runs on later minor versions. Code of "sm_90a" and the like
    runs nowhere else.
    """
    if arch not in _LIMITS or arch in _CHIPS:
        return ()
    number = int(arch[3:])
    older = [int(name[3:]) for name in _LIMITS if name not in _CHIPS]
    same_major = (n for n in older if n < number and n // 10 == number // 10)
    return tuple(f"sm_{n}" for n in sorted(same_major, reverse=True))


def newer_compatible(arch: str) -> tuple[str, ...]:
    """Architectures besides `arch` that run its machine code."""
    return tuple(name for name in _LIMITS if arch in older_compatible(name))
