"""Cubins by KernelSpec: memory -> prebuilt -> per-user disk cache -> NVRTC.

``KernelCache`` computes the key of a spec (what is hashed is what is compiled) and leaves places,
locks and faults to ``store.py``, which is not about CUDA and serves the simulator too. An entry is

    <root>/<label>-<16 digits>/{kernel.cubin, prelude.cuh, spec.json, compile.log}

Prebuilt folders hold the same, by a key that leaves the compiler's version out: they serve machines
with another NVRTC, or none. One is part of each installed distribution (`prebuild/build.py` fills
it), another may be named by the environment. Code for an older GPU of the same major version counts
too.

``driver.device_kernel`` is what plans call; ``prebuild`` is what the package's build calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import env, log
from . import arch as arch_table
from . import compiler, sources, trust
from .entries import Artifact, content_key, entry_name, find_prebuilt
from .spec import KernelSpec
from .store import ArtifactStore, Built, default_store

__all__ = [
    "ArtifactStore",
    "Built",
    "KernelCache",
    "KernelImage",
    "content_key",
    "default_kernels",
    "default_store",
    "describe_prebuilt",
    "prebuild",
    "prebuilt_entry",
    "source_key",
]

# Raise when the meaning of an entry changes without a change in what is hashed.
_FORMAT = "1"
_CUBIN = "kernel.cubin"
CONTENTS = "contents.txt"  # of a prebuilt folder: one line for people


@dataclass(frozen=True)
class KernelImage:
    """Machine code of one kernel and where it came from ("prebuilt", "disk" or "built").

    For a virtual architecture it is PTX, whose use of resources is known to the driver only.
    """

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
    """Cubins by spec: remembered, prebuilt, or fetched through an ArtifactStore.

    prebuilt: the prebuilt folders of a spec, by precedence; the installation's, as trusted as its
        code.
    named: one that the environment names, which comes before these and is checked.

    Images stay until the process ends, like the kernels that the driver loads from them: a kernel
    has 10 to 150 KiB, and a process asks for as many as it has kinds of calls.
    """

    def __init__(
        self,
        store: ArtifactStore,
        prebuilt: Callable[[KernelSpec], Sequence[Path]] | None = None,
        named: Path | None = None,
    ) -> None:
        self._store = store
        self._prebuilt = prebuilt or (lambda spec: ())
        self._named = named
        self._images: dict[KernelSpec, KernelImage] = {}

    def image(self, spec: KernelSpec, announce: bool = True) -> KernelImage:
        """The kernel's machine code, compiled if it is nowhere else.

        announce: one line on stderr if that takes long.
        """
        image = self._images.get(spec)
        if image is None:
            texts = sources.resolve(spec.source, constants=spec.constants)
            found = self._find_prebuilt(spec, texts) or self._own(spec, texts, announce)
            image = self._images[spec] = _image(spec, found)
            log.debug("%s: %s, %s", image.origin, spec.label(), image.folder or "in memory")
        return image

    def image_made_here(self, spec: KernelSpec) -> KernelImage:
        """As `image`, but not a prebuilt one, which the driver has turned out to refuse."""
        image = self._images.get(spec)
        if image is None or image.origin == "prebuilt":
            texts = sources.resolve(spec.source, constants=spec.constants)
            image = self._images[spec] = _image(spec, self._own(spec, texts))
        return image

    def find(self, spec: KernelSpec) -> KernelImage | None:
        """The kernel's machine code if it is somewhere; never compiles."""
        if spec in self._images:
            return self._images[spec]
        texts = sources.resolve(spec.source, constants=spec.constants)
        found = self._find_prebuilt(spec, texts)
        found = found or self._store.find(_disk_key(spec, texts), spec.label(), _CUBIN)
        return None if found is None else _image(spec, found)

    def folder(self, spec: KernelSpec) -> Path | None:
        """Where the kernel's entry is, or will be once compiled; for ``explain``."""
        image = self.find(spec)
        if image is not None:
            return image.folder
        texts = sources.resolve(spec.source, constants=spec.constants)
        return self._store.entry_folder(_disk_key(spec, texts), spec.label())

    def _find_prebuilt(self, spec: KernelSpec, texts: Mapping[str, str]) -> Artifact | None:
        folders = [(folder, False) for folder in self._prebuilt(spec) if folder.is_dir()]
        if self._named is not None:
            problem = why_not_prebuilt(self._named)
            if problem is None:
                folders.insert(0, (self._named, True))
            else:
                trust.warn_once(
                    f"{env.PREBUILT_DIR.name} names {self._named}, which is not used: {problem}"
                )
        if not folders:
            return None
        for arch in (spec.arch, *arch_table.older_compatible(spec.arch)):
            same = replace(spec, arch=arch)
            key = source_key(same, texts)
            for folder, checked in folders:
                found = find_prebuilt(folder, key, same.label(), _CUBIN, checked=checked)
                if found is not None:
                    return found
        return None

    def _own(self, spec: KernelSpec, texts: Mapping[str, str], announce: bool = True) -> Artifact:
        """From the disk cache, else compiled."""
        key, label = _disk_key(spec, texts), spec.label()

        def build() -> Built:
            folder = self._store.entry_folder(key, label)
            where = f"; later processes load it from {folder}" if folder is not None else ""
            why = f"first use of this kernel{where}" if announce else None
            try:
                return _build(spec, texts, why)
            except compiler.MissingCompilerError as error:
                raise compiler.MissingCompilerError(
                    f"{label} is not prebuilt here and cannot be compiled: {error}\n"
                    f"  Prebuilt: {self._describe_prebuilt(spec)}\n  Missing: {spec.describe()}"
                ) from error

        return self._store.get_or_build(key, label, _CUBIN, build)

    def _describe_prebuilt(self, spec: KernelSpec) -> str:
        named = () if self._named is None else (self._named,)
        return "; ".join(map(describe_prebuilt, (*named, *self._prebuilt(spec)))) or "nothing"


def why_not_prebuilt(folder: Path) -> str | None:
    """Why kernels are not loaded from a folder that the environment names; None if they are."""
    try:
        trust.folder(folder)
    except FileNotFoundError:
        return "it does not exist"
    except trust.UntrustedError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read ({error})"
    return None


def describe_prebuilt(folder: Path) -> str:
    """What a prebuilt folder says about its content, in one line."""
    try:
        return f"{(folder / CONTENTS).read_text(encoding='utf-8').strip()} ({folder})"
    except OSError:
        return f"{'unknown kernels' if folder.is_dir() else 'nothing'} ({folder})"


def _image(spec: KernelSpec, found: Artifact) -> KernelImage:
    return KernelImage(spec, found.data, found.origin, found.folder, found.facts)


def _disk_key(spec: KernelSpec, texts: Mapping[str, str]) -> str:
    try:
        version = compiler.compiler_version()
    except compiler.MissingCompilerError:
        version = "none"  # nothing can be compiled, yet the kernel may be prebuilt
    return content_key([source_key(spec, texts), version])


def _build(spec: KernelSpec, texts: Mapping[str, str], why: str | None) -> Built:
    compiled = compiler.compile_cubin(spec, texts, why)
    facts = {
        "spec": spec.as_dict(),
        "compiler": compiler.loaded_version(),
        "options": list(compiler.options(spec)),
        "sources": {name: content_key([text]) for name, text in sorted(texts.items())},
        "resources": None if arch_table.is_virtual(spec.arch) else asdict(compiled.resources),
        "seconds": round(compiled.seconds, 3),
    }
    files = {sources.PRELUDE: spec.prelude(), "compile.log": compiled.log + "\n"}
    return Built(compiled.cubin, files, facts)


def prebuilt_entry(spec: KernelSpec) -> str:
    """Name of the spec's entry in a prebuilt folder."""
    texts = sources.resolve(spec.source, constants=spec.constants)
    return entry_name(spec.label(), source_key(spec, texts))


def prebuild(spec: KernelSpec, folder: Path) -> Path:
    """Compiles ``spec`` into ``folder`` as an entry of a prebuilt folder; returns the entry.

    For the package's build. An entry of the same sources is left alone, whatever compiled it.
    """
    texts = sources.resolve(spec.source, constants=spec.constants)
    key = source_key(spec, texts)
    store = ArtifactStore(folder, trusted=True)
    artifact = store.get_or_build(key, spec.label(), _CUBIN, lambda: _build(spec, texts, None))
    if artifact.folder is None:
        raise OSError(f"cannot write the prebuilt kernel {spec.label()} to {folder}")
    return artifact.folder


def default_kernels() -> KernelCache:
    """This process's KernelCache over ``default_store()`` and the installed prebuilt kernels."""
    return _kernels(default_store(), env.PREBUILT_DIR.get())


@functools.cache
def _kernels(store: ArtifactStore, named: Path | None) -> KernelCache:
    for line in env.misspelt():
        if "?" in line or line.startswith("FLASH_ATTN_INTERFACE_"):  # not what other software reads
            trust.warn_once(f"the environment variable {line}")
    return KernelCache(
        store, lambda spec: (sources.prebuilt_folder(spec.source.partition("/")[0]),), named
    )
