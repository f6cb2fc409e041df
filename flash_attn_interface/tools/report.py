"""Facts about this installation and machine, and what is wrong with them.

`python -m flash_attn_interface` prints them. Nothing is compiled, written or allocated on a GPU.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

from .._common import env
from .._common.runtime import arch as arch_table
from .._common.runtime import compiler, entries, nvrtc, trust
from .._common.runtime.cubins import describe_prebuilt, why_not_prebuilt
from .._common.tiles import tuned_tiles
from ..cache import prebuilt_folders
from ..call import backends
from ..call.selection import Device, hopper_advice, target_for
from ..command_line import of_bytes
from ..version import RELEASE, __version__

_FEW_BYTES = 200 * 2**20  # free space below which kernels of a day may not find room


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or slower than it could be. about: title of the fact, mostly."""

    about: str
    text: str
    way_out: str


@dataclass(frozen=True)
class Report:
    """facts: (title, text) lines; a title is empty where the last one goes on."""

    facts: tuple[tuple[str, str], ...]
    findings: tuple[Finding, ...]

    def lines(self) -> Iterator[str]:
        for title, text in self.facts:
            yield f"{title:<11}{text}"
        if not self.findings:
            fine = "driver, compiler and cache fit together"
            if nvrtc.driver_version() is None:
                fine = "no driver: CPU tensors and the simulator; compiler and cache are usable"
            yield f"{'verdict':<11}{fine}"
        for index, finding in enumerate(self.findings):
            title = "verdict" if index == 0 else ""
            end = "" if finding.text.endswith("?") else "."
            yield f"{title:<11}{finding.about}: {finding.text}{end} {finding.way_out}"

    def to_dict(self) -> dict[str, object]:
        """For JSON: facts by title, of which some have several lines."""
        facts: dict[str, list[str]] = {}
        for title, text in self.facts:
            facts.setdefault(title or next(reversed(facts)), []).append(text)
        findings = [asdict(finding) for finding in self.findings]
        return {"release": RELEASE, "version": __version__, "facts": facts, "findings": findings}


def make() -> Report:
    """What there is here."""
    facts: list[tuple[str, str]] = []
    findings: list[Finding] = []
    for part in (_software, _driver_and_compiler, _gpus, _trees, _cache, _prebuilt, _environment):
        for found in part():
            if isinstance(found, Finding):
                findings.append(found)
            else:
                facts.append(found)
    return Report(tuple(facts), tuple(findings))


Part = Iterator[tuple[str, str] | Finding]


def _software() -> Part:
    yield "package", f"flash_attn_interface {RELEASE} (FlashAttention interface {__version__})"
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", f"{torch.__version__}, built for CUDA {torch.version.cuda or 'none'}"
    yield "bindings", f"cuda-bindings {_version_of('cuda-bindings')}"


def _version_of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _driver_and_compiler() -> Part:
    driver, built_for = nvrtc.driver_version(), nvrtc.torch_cuda_major()
    yield "driver", "none" if driver is None else f"CUDA {driver[0]}.{driver[1]}"
    try:
        library = nvrtc.chosen()
        path = "" if library is None else f" ({library.path})"
        yield "compiler", f"{compiler.compiler_version()}{path}"
        compiler.load_nvrtc()
    except compiler.MissingCompilerError as error:
        yield "compiler", "none that works"
        yield Finding("compiler", str(error), "Prebuilt kernels alone can run until then")
    if driver is None:
        return
    misfit = compiler.unfit_for_the_driver()
    if misfit is not None:
        told, _, way_out = misfit.partition(". Way out: ")
        yield Finding("compiler", told, way_out[:1].upper() + way_out[1:])
    if built_for is None:
        yield Finding("torch", "it is a CPU build, which uses no GPU", "Install a build for CUDA")
    elif built_for > driver[0]:
        yield Finding(
            "torch",
            f"it was built for CUDA {built_for}, the driver is for CUDA {driver[0]}.{driver[1]}",
            f"Install a newer driver, or a torch that was built for CUDA {driver[0]}",
        )
    bindings = _version_of("cuda-bindings").partition(".")[0]
    if bindings.isdigit() and int(bindings) > driver[0]:
        yield Finding(
            "bindings",
            f"cuda-bindings {bindings} is made for a newer driver than CUDA {driver[0]}'s",
            f'pip install "cuda-bindings<{driver[0] + 1}"',
        )


def _gpus() -> Part:
    if not torch.cuda.is_available():
        yield "GPU", "none that torch can use"
        return
    known = _archs_of_the_compiler()
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        title = "GPU" if index == 0 else ""
        try:
            capability = torch.cuda.get_device_capability(index)
            arch = target_for("flash2", Device(capability, index)).arch
        except NotImplementedError as error:
            yield title, f"cuda:{index} {name}: not supported"
            yield Finding("GPU", f"cuda:{index} {name}: {error}", "Its tensors are refused")
            continue
        yield title, f"cuda:{index} {name}: {arch}"
        if known and int(arch_table.limits(arch).name[3:]) not in known:
            yield Finding(
                "compiler",
                f"{compiler.compiler_version()} cannot compile for {arch}",
                f"pip install --upgrade {nvrtc.requirement(nvrtc.newest_major()).split('>')[0]}",
            )


def _archs_of_the_compiler() -> list[int]:
    try:
        return compiler.load_nvrtc().nvrtcGetSupportedArchs()[1]
    except compiler.MissingCompilerError:
        return []


def _trees() -> Part:
    yield "trees", "flash2: sm_80 and newer"
    try:
        installed = backends.hopper() is not None
    except ImportError as error:
        yield "", f"hopper: {error}"
        yield Finding("hopper", "it is installed and cannot be used", "The line above says why")
        return
    yield "", f"hopper: {'sm_90a' if installed else 'not installed'}"
    here = [
        torch.cuda.get_device_capability(index)
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]
    names = ["flash2", *(["hopper"] if installed else [])]
    advice = next(filter(None, (hopper_advice(gpu, names) for gpu in here)), None)
    if advice is not None:
        text, _, way_out = advice.partition(": ")
        yield Finding("hopper", f"{text}; it is faster on this GPU", way_out)


def _cache() -> Part:
    folder = env.cache_dir()
    if folder is None:
        yield "cache", "memory only"
        if env.DISK_CACHE.get():
            way_out = f"Set {env.CACHE_DIR.name}"
            yield Finding("cache", "there is no home folder to keep kernels in", way_out)
        return
    problem = why_no_cache(folder)
    if problem is not None:
        yield "cache", f"{folder} (not used)"
        yield Finding(
            "cache", f"{folder} is not used: {problem}", f"Mend that, or set {env.CACHE_DIR.name}"
        )
    elif not folder.is_dir():
        yield "cache", f"{folder} (not created yet)"
    else:
        found = list(entries.entries(folder))
        size = of_bytes(sum(map(entries.size_of, found)))
        limit = env.CACHE_LIMIT.get()
        most = "" if limit is None else f" of at most {of_bytes(limit)}"
        yield "cache", f"{folder} ({len(found)} kernels), {size}{most}"
        free = shutil.disk_usage(folder).free
        if free < _FEW_BYTES:
            text = f"{of_bytes(free)} are free in {folder}"
            way_out = "Free some, or `python -m flash_attn_interface cache clear --older-than 30`"
            yield Finding("cache", text, way_out)
    user = tuned_tiles.user_folder()
    problem = None if user is None else tuned_tiles.why_not_used(user)
    if problem is not None:
        yield Finding(
            "tables", f"{user} is not used: {problem}", f"Mend that, or set {env.TUNED_TILES.name}"
        )


def why_no_cache(folder: Path) -> str | None:
    """Why kernels are not kept there; None if they are. Creates nothing."""
    try:
        real = trust.resolve(folder, own=True)
    except trust.UntrustedError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be created ({error})"
    existing = next(path for path in (real, *real.parents) if path.exists())
    if not existing.is_dir():
        return f"{existing} is not a folder"
    return None if os.access(existing, os.W_OK | os.X_OK) else f"{existing} may not be written to"


def _prebuilt() -> Part:
    for index, folder in enumerate(prebuilt_folders()):
        yield ("prebuilt" if index == 0 else ""), describe_prebuilt(folder)
    named = env.PREBUILT_DIR.get()
    problem = None if named is None else why_not_prebuilt(named)
    if problem is not None:
        way_out = f"Mend that, or unset {env.PREBUILT_DIR.name}"
        yield Finding("prebuilt", f"{named} is not used: {problem}", way_out)


def _environment() -> Part:
    for variable in env.VARIABLES:
        if os.environ.get(variable.name):
            yield "set", f"{variable.name}={os.environ[variable.name]}"
            try:
                variable.get()
            except ValueError as error:
                yield Finding("set", str(error), "Correct it, or unset it")
    for line in env.misspelt():
        yield Finding("set", line, "Correct it, or unset it")
