"""Compiles the autotuner's candidates side by side and reads the compiler's report. Needs no GPU.

Kernels go to the ordinary cache; `discard` removes those that lost.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass

from .._common.runtime import compiler, cubins, sources
from .._common.runtime.compiler import CompileError, ResourceUsage
from .._common.runtime.spec import KernelSpec
from .journal import Journal


@dataclass(frozen=True)
class Report:
    """resources None: it does not compile, error says why."""

    resources: ResourceUsage | None
    error: str = ""

    @property
    def spill_bytes(self) -> int:
        """Bytes a thread stores to and loads from local memory for lack of registers."""
        used = self.resources
        return used.spill_store_bytes + used.spill_load_bytes if used else 0

    @property
    def clean(self) -> bool:
        return self.resources is not None and self.spill_bytes == 0


def together(reports: Iterable[Report]) -> Report:
    """Of a candidate with several kernels: the worst that can be said."""
    found = list(reports)
    broken = next((report for report in found if report.resources is None), None)
    return broken or max(found, key=lambda report: (report.spill_bytes, -found.index(report)))


Compile = Callable[[KernelSpec], ResourceUsage]


def compile_to_cache(spec: KernelSpec) -> ResourceUsage:
    """The ordinary way: memory, prebuilt, disk, NVRTC."""
    return cubins.default_kernels().image(spec, announce=False).resources


def identity(spec: KernelSpec) -> str:
    """Of a candidate: sources, constants, options and compiler."""
    texts = sources.resolve(spec.source, constants=spec.constants)
    return cubins.content_key([cubins.source_key(spec, texts), compiler.compiler_version()])


def compile_all(
    specs: Iterable[KernelSpec],
    jobs: int,
    journal: Journal,
    progress: Callable[[], None],
    compile_one: Compile = compile_to_cache,
) -> dict[KernelSpec, Report]:
    """A report for each distinct spec. progress: called after each.

    A kernel that the journal knows to be out is not compiled again.
    """
    reports: dict[KernelSpec, Report] = {}

    def one(spec: KernelSpec) -> Report:
        name = identity(spec)
        known = journal.get("compile", name)
        if known is not None:
            resources = known["resources"] and ResourceUsage(**known["resources"])
            report = Report(resources, known["error"])
            if not report.clean:
                return report
        try:
            report = Report(compile_one(spec))
        except CompileError as error:
            report = Report(None, str(error).splitlines()[0])
        if known is None:
            resources = asdict(report.resources) if report.resources else None
            fact = {"resources": resources, "error": report.error, "kernel": spec.describe()}
            journal.put("compile", name, fact)
        return report

    distinct = list(dict.fromkeys(specs))
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        futures = {pool.submit(one, spec): spec for spec in distinct}
        try:
            for future in as_completed(futures):
                reports[futures[future]] = future.result()
                progress()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {spec: reports[spec] for spec in distinct}


def discard(specs: Iterable[KernelSpec]) -> None:
    """Removes kernels from the disk cache that this process put there."""
    for spec in specs:
        image = cubins.default_kernels().find(spec)
        if image is not None and image.origin == "built" and image.folder is not None:
            shutil.rmtree(image.folder, ignore_errors=True)
