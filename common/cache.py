"""Cubins by KernelSpec: memory -> prebuilt in the package -> per-user disk cache -> NVRTC.

``KernelCache`` computes the key of a spec (what is hashed is what is compiled) and leaves places,
locks and faults to ``store.py``, which is not about CUDA and serves the simulator too. An entry is

    <root>/<label>-<16 digits>/{kernel.cubin, prelude.cuh, spec.json, compile.log}

``driver.device_kernel`` is what plans call; ``prebuild`` is what the package's build calls.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import compiler, sources
from .spec import KernelSpec
from .store import ArtifactStore, Built, content_key, default_store

__all__ = [
    "ArtifactStore",
    "Built",
    "KernelCache",
    "KernelImage",
    "content_key",
    "default_kernels",
    "default_store",
    "prebuild",
    "source_key",
]

# Raise when the meaning of an entry changes without a change in what is hashed.
_FORMAT = "1"
_CUBIN = "kernel.cubin"


@dataclass(frozen=True)
class KernelImage:
    """Machine code of one kernel and where it came from ("prebuilt", "disk" or "built")."""

    spec: KernelSpec
    cubin: bytes
    origin: str
    folder: Path | None
    facts: Mapping[str, Any]

    @property
    def resources(self) -> compiler.ResourceUsage:
        return compiler.ResourceUsage(**self.facts["resources"])


def source_key(spec: KernelSpec, texts: Mapping[str, str]) -> str:
    """Key of all that makes the kernel but the compiler's version: names prebuilt entries.

    They must serve machines with another NVRTC, or none.
    """
    head = [_FORMAT, spec.source, spec.entry, spec.arch, spec.prelude(), *compiler.options(spec)]
    return content_key(
        [*head, "sources", *(part for item in sorted(texts.items()) for part in item)]
    )


class KernelCache:
    """Cubins by spec: remembered, or fetched through an ArtifactStore."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._images: dict[KernelSpec, KernelImage] = {}

    def image(self, spec: KernelSpec) -> KernelImage:
        """The kernel's machine code, compiled if it is nowhere else."""
        image = self._images.get(spec)
        if image is None:
            image = self._images[spec] = self._fetch(spec)
        return image

    def folder(self, spec: KernelSpec) -> Path | None:
        """Where the kernel's entry is, or will be once compiled; for ``explain``."""
        if spec in self._images:
            return self._images[spec].folder
        key, prebuilt_key = _keys(spec, sources.resolve(spec.source, constants=spec.constants))
        label = spec.label()
        found = self._store.find(key, label, _CUBIN, prebuilt_key=prebuilt_key)
        return found.folder if found is not None else self._store.entry_folder(key, label)

    def _fetch(self, spec: KernelSpec) -> KernelImage:
        texts = sources.resolve(spec.source, constants=spec.constants)
        key, prebuilt_key = _keys(spec, texts)
        label = spec.label()

        def build() -> Built:
            folder = self._store.entry_folder(key, label)
            where = f"; later processes load it from {folder}" if folder is not None else ""
            return _build(spec, texts, f"first use of this kernel{where}")

        found = self._store.get_or_build(key, label, _CUBIN, build, prebuilt_key=prebuilt_key)
        return KernelImage(spec, found.data, found.origin, found.folder, found.facts)


def _keys(spec: KernelSpec, texts: Mapping[str, str]) -> tuple[str, str]:
    """(key in the disk cache, key in the prebuilt folder)."""
    prebuilt_key = source_key(spec, texts)
    try:
        version = compiler.compiler_version()
    except compiler.MissingCompilerError:
        version = "none"  # nothing can be compiled, yet the kernel may be prebuilt
    return content_key([prebuilt_key, version]), prebuilt_key


def _build(spec: KernelSpec, texts: Mapping[str, str], why: str) -> Built:
    compiled = compiler.compile_cubin(spec, texts, why)
    facts = {
        "spec": spec.as_dict(),
        "compiler": compiler.loaded_version(),
        "options": list(compiler.options(spec)),
        "sources": {name: content_key([text]) for name, text in sorted(texts.items())},
        "resources": asdict(compiled.resources),
        "seconds": round(compiled.seconds, 3),
    }
    files = {sources.PRELUDE: spec.prelude(), "compile.log": compiled.log + "\n"}
    return Built(compiled.cubin, files, facts)


def prebuild(spec: KernelSpec, folder: Path) -> Path:
    """Compiles ``spec`` into ``folder`` as an entry of a prebuilt folder; returns the entry.

    For the package's build. An entry of the same sources is left alone, whatever compiled it.
    """
    texts = sources.resolve(spec.source, constants=spec.constants)
    key = source_key(spec, texts)
    store = ArtifactStore(folder, trusted=True)
    artifact = store.get_or_build(
        key, spec.label(), _CUBIN, lambda: _build(spec, texts, "prebuilt kernel")
    )
    if artifact.folder is None:
        raise OSError(f"cannot write the prebuilt kernel {spec.label()} to {folder}")
    return artifact.folder


def default_kernels() -> KernelCache:
    """This process's KernelCache over ``default_store()``."""
    return _kernels(default_store())


_kernels = functools.cache(KernelCache)
