"""KernelSpec: one compilable kernel, as a value. One spec is one cubin with one entry.

The trees' planners make specs from problems; ``cubins.py`` turns a spec into machine code. All that
distinguishes two kernels of one source is in ``constants``, the kernel's ``struct Cfg``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from . import arch as arch_table

REQUIRED_CONSTANTS = ("min_ctas_per_sm", "num_threads", "smem_bytes")

_SOURCE = re.compile(r"[a-z][a-z0-9_]*(/[a-z0-9_]+)+\.cu")
_ARCH = re.compile(r"(sm|compute)_\d{2,3}[af]?")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CONSTANT = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
# Integers that tell kernels apart at a glance; the others are in describe() and spec.json.
_LABELLED = (("head_dim_qk", "qk"), ("head_dim_v", "v"))


@dataclass(frozen=True)
class KernelSpec:
    """source: include name of the .cu file. entry: its extern "C" kernel. params: its parameter
    struct in common/device/params.cuh. arch: "sm_80", "sm_90a"; "compute_80" for PTX. constants:
    (name, value) pairs sorted by name; use ``make``. num_threads, min_ctas_per_sm and smem_bytes
    are always among them.
    """

    source: str
    entry: str
    params: str
    arch: str
    constants: tuple[tuple[str, bool | int], ...]

    @classmethod
    def make(
        cls, source: str, entry: str, params: str, arch: str, **constants: bool | int
    ) -> KernelSpec:
        """A validated spec from constants in any order."""
        spec = cls(source, entry, params, arch, tuple(sorted(constants.items())))
        spec.validate()
        return spec

    def as_ptx(self) -> KernelSpec:
        """The same kernel as PTX."""
        return replace(self, arch=arch_table.virtual(self.arch))

    def __getitem__(self, name: str) -> bool | int:
        for key, value in self.constants:
            if key == name:
                return value
        raise KeyError(f"{self.entry} has no constant {name!r}")

    @property
    def cluster_size(self) -> int:
        """CTAs of a cluster: the constant of that name, which a CLUSTER_KERNEL reads, else 1."""
        return int(dict(self.constants).get("cluster_size", 1))

    def validate(self) -> None:
        """ValueError with the reason if this cannot be compiled or launched on its arch.

        Which features combine is for the planner of the tree to refuse; it knows the problem.
        """
        for what, text, pattern in (
            ("source", self.source, _SOURCE),
            ("entry", self.entry, _IDENTIFIER),
            ("params", self.params, _IDENTIFIER),
            ("arch", self.arch, _ARCH),
        ):
            if not pattern.fullmatch(text):
                raise ValueError(f"KernelSpec.{what} is malformed: {text!r}")
        names = [name for name, _ in self.constants]
        if names != sorted(set(names)):
            raise ValueError(f"{self.entry}: constants must be sorted and unique, got {names}")
        missing = [name for name in REQUIRED_CONSTANTS if name not in names]
        if missing:
            raise ValueError(f"{self.entry}: constants {', '.join(missing)} are missing")
        for name, value in self.constants:
            if not _CONSTANT.fullmatch(name):
                raise ValueError(f"{self.entry}: constant {name!r} is not snake_case")
            if type(value) not in (bool, int) or not -(2**31) < value < 2**31:
                raise ValueError(f"{self.entry}: {name}={value!r} is neither bool nor 32-bit int")
        self._validate_resources()

    def _validate_resources(self) -> None:
        threads, ctas, smem = (self[n] for n in ("num_threads", "min_ctas_per_sm", "smem_bytes"))
        limits = arch_table.limits(self.arch)
        if threads % 32 or not 32 <= threads <= limits.max_threads_per_cta:
            raise ValueError(
                f"{self.entry}: num_threads={threads} must be a multiple of 32 up to "
                f"{limits.max_threads_per_cta}"
            )
        if not 0 <= smem <= limits.max_smem_per_cta:
            raise ValueError(
                f"{self.entry}: smem_bytes={smem}, {limits.name} offers a CTA "
                f"{limits.max_smem_per_cta}"
            )
        if not 1 <= self.cluster_size <= limits.max_cluster_size:
            raise ValueError(
                f"{self.entry}: cluster_size={self.cluster_size}, {limits.name} has clusters of up "
                f"to {limits.max_cluster_size} CTAs"
            )
        fitting = limits.max_ctas_per_sm(smem, threads)
        if not 1 <= ctas <= fitting:
            raise ValueError(
                f"{self.entry}: min_ctas_per_sm={ctas}, but {fitting} CTAs of {threads} threads "
                f"and {smem} bytes of shared memory fit on an SM of {limits.name}"
            )

    def prelude(self) -> str:
        """Text of "prelude.cuh": ``struct Cfg`` with every constant, block_m as kBlockM."""
        lines = [f"// {self.describe()}", "#pragma once", "struct Cfg {"]
        for name, value in self.constants:
            ctype, text = (
                ("bool", str(value).lower()) if isinstance(value, bool) else ("int", str(value))
            )
            lines.append(f"  static constexpr {ctype} {cpp_name(name)} = {text};")
        return "\n".join([*lines, "};", ""])

    def label(self) -> str:
        """Short file-name-safe name, e.g. "flash2-fwd-bf16-qk128-v256-causal-sm_80".

        Not unique: tile sizes and the like are left out. Names folders, beside a hash.
        """
        values = dict(self.constants)
        parts = [self.entry.replace("_", "-").lower()]
        if "bf16" in values:
            parts.append("bf16" if values.pop("bf16") else "fp16")
        for name, short in _LABELLED:
            if name in values:
                parts.append(f"{short}{values[name]}")
        parts += [name.replace("_", "-") for name, value in values.items() if value is True]
        return "-".join([*parts, self.arch])

    def describe(self) -> str:
        """One line for people that leaves nothing out."""
        values = ", ".join(f"{name}={value}" for name, value in self.constants)
        return f"{self.entry} ({self.source}) for {self.arch}: {values}"

    def as_dict(self) -> dict[str, Any]:
        """JSON form, as stored in spec.json. ``from_dict`` is its inverse."""
        return {
            "source": self.source,
            "entry": self.entry,
            "params": self.params,
            "arch": self.arch,
            "constants": dict(self.constants),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> KernelSpec:
        head = (record[name] for name in ("source", "entry", "params", "arch"))
        return cls.make(*head, **record["constants"])


def cpp_name(name: str) -> str:
    """head_dim_qk -> kHeadDimQk."""
    return "k" + "".join(word.capitalize() for word in name.split("_"))
