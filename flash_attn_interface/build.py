"""`python -m flash_attn_interface build`: compile kernels ahead of their first use.

Without --out they go to this user's cubins. With it, to a folder that can be copied to any machine
with this release, or mounted there, and named in FLASH_ATTN_INTERFACE_PREBUILT_DIR: neither NVRTC
nor a GPU of the kind is needed where it is made. docs/prebuild.md shows both.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from . import command_line
from ._common import env
from ._common.prebuild import build as prebuild
from ._common.prebuild import headdim
from ._common.prebuild.build import PrebuildError, Trees
from ._common.prebuild.headdim import HeadDimError, Wanted
from ._common.runtime import arch as arch_table
from ._common.runtime import cubins, sources
from ._common.runtime.spec import KernelSpec
from .call import backends
from .command_line import of_bytes, of_seconds

_PACKAGES = ("flash_attn_interface", "flash_attn_interface._common", "flash_attn_interface._flash2")


# Of the default list on two CPUs, docs/prebuild.md: 760 kernels in 147 s, about 50 MB on disk.
SECONDS_PER_KERNEL = 0.4
BYTES_PER_KERNEL = 66_000
MANY = 100  # kernels about which a person at a terminal is asked first


@command_line.guarded
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 if something could not be compiled or the user said no, or 2 for a wrong
    command line."""
    options = _parser().parse_args(arguments)
    try:
        wanted = _wanted(options)
        archs = _archs(options.arch, wanted)
        trees = installed_trees()
        specs = trees.specs(wanted, archs)
    except (HeadDimError, NotImplementedError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not specs:
        print(f"error: {_nothing_to_build(wanted, archs)}", file=sys.stderr)
        return 2
    if "sm_90a" in archs and backends.hopper() is None:
        told = f"for sm_90a only the Ampere kernels are built: {backends.HOPPER_NOT_INSTALLED}"
        print(f"note: {told}", file=sys.stderr)
    out: Path | None = options.out
    if options.list:
        return _list(specs, archs, wanted, options)
    missing = [spec for spec in specs if not prebuild.is_built(spec, out)]
    if len(missing) > MANY:
        print(_estimate(missing, options.jobs), flush=True)
        if not options.yes and sys.stdin.isatty() and not _agreed():
            return 1
    try:
        if out is not None:
            command_line.make_folder(out)
        prebuild.build(specs, trees, out, options.jobs)
    except BrokenPipeError:
        raise
    except (PrebuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if out is not None:
        print(f"To use them: {env.PREBUILT_DIR.name}={out.resolve()}")
        problem = cubins.why_not_prebuilt(out.resolve())
        if problem is not None:
            print(f"warning: they will be refused there: {problem}", file=sys.stderr)
    return 0


def _nothing_to_build(wanted: Wanted, archs: Sequence[str]) -> str:
    pairs = ", ".join(f"({qk},{v})" for qk, v in wanted.pairs)
    told = f"no installed kernel tree builds head dims {pairs} for {', '.join(archs)} ahead"
    if "sm_90a" in archs and backends.hopper() is None:
        return f"{told}; {backends.HOPPER_NOT_INSTALLED}"
    return f"{told}; what it serves of them is compiled at its first call"


def _list(
    specs: Sequence[KernelSpec],
    archs: Sequence[str],
    wanted: Wanted,
    options: argparse.Namespace,
) -> int:
    missing, built = [], 0
    for spec in specs:
        is_built = prebuild.is_built(spec, options.out)
        built += is_built
        if not is_built:
            missing.append(spec)
        print("built  " if is_built else "missing", cubins.prebuilt_entry(spec))
    print(f"{len(specs)} kernels for {', '.join(archs)}; {wanted.describe()}")
    of_each = Counter(f"{spec.entry} {spec.arch}" for spec in specs)
    print("; ".join(f"{count} {name}" for name, count in sorted(of_each.items())))
    print(f"{built} built. {_estimate(missing, options.jobs)}")
    return 0


def _estimate(missing: Sequence[KernelSpec], at_once: int | None) -> str:
    if not missing:
        return "None is missing"
    count = at_once or prebuild.jobs()
    seconds = len(missing) * SECONDS_PER_KERNEL / min(count, len(missing))
    size = of_bytes(len(missing) * BYTES_PER_KERNEL)
    return (
        f"{len(missing)} kernels to compile: about {of_seconds(seconds)}, {count} at once; {size}"
    )


def _agreed() -> bool:
    print("Go on? [Y/n] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("", "y", "yes")


def installed_trees() -> Trees:
    """The kernel trees of this installation."""
    names, planners, roots = list(_PACKAGES), ["flash_attn_interface._flash2.prebuild"], {}
    if backends.hopper() is not None:
        names.append("flash_attn_3")
        planners.append("flash_attn_3.prebuild")
        roots["hopper"] = sources.root_folder("hopper")
    packages = {name: Path(importlib.import_module(name).__path__[0]) for name in names}
    return Trees(planners, packages, roots)


def _parser() -> argparse.ArgumentParser:
    parser = command_line.Parser(
        prog="python -m flash_attn_interface build",
        description="Compile kernels ahead of their first use. No GPU is needed.",
    )
    parser.add_argument(
        "--dims",
        nargs=2,
        type=int,
        action="append",
        metavar=("QK", "V"),
        help="a pair of head dims; may be repeated. Default: the pairs of headdim.json as shipped",
    )
    parser.add_argument("--headdim", type=Path, metavar="FILE", help="a headdim.json instead")
    parser.add_argument(
        "--arch",
        nargs="+",
        metavar="ARCH",
        help="such as sm_80 sm_90a. Default: this machine's GPUs, else sm_80 and sm_90a",
    )
    parser.add_argument("--dtype", nargs="+", choices=headdim.DTYPES, help="default: both")
    parser.add_argument(
        "--features",
        nargs="+",
        choices=headdim.FEATURES,
        metavar="FEATURE",
        help=f"of {', '.join(headdim.FEATURES)}. Default: {', '.join(headdim.DEFAULT_FEATURES)}",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="a folder instead of the cache")
    parser.add_argument(
        "--jobs", type=command_line.positive, metavar="N", help=f"compiles at once; else {_JOBS}"
    )
    parser.add_argument(
        "--list", action="store_true", help="only say what there is to build, and how long it takes"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask before many kernels")
    return parser


_JOBS = f"{env.MAX_JOBS.name}, or by CPUs and free memory"


def _wanted(options: argparse.Namespace) -> Wanted:
    wanted = Wanted() if options.headdim is None else headdim.read(options.headdim)
    record: dict[str, object] = {"pairs": options.dims or [list(pair) for pair in wanted.pairs]}
    record["dtypes"] = options.dtype or list(wanted.dtypes)
    record["features"] = options.features or list(wanted.features)
    return replace(headdim.parse(record, "command line"), archs=wanted.archs)


def _archs(chosen: Sequence[str] | None, wanted: Wanted) -> tuple[str, ...]:
    if chosen:
        return headdim.archs_of(chosen, "--arch")
    if wanted.archs is None and env.CUDA_ARCHS.get() is None:
        found = _archs_of_this_machine()
        if found:
            return found
    return headdim.archs(wanted)


def _archs_of_this_machine() -> tuple[str, ...]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        arch = arch_table.arch_of(torch.cuda.get_device_capability(index))
        found.append("sm_90a" if arch == "sm_90" else arch)
    return tuple(dict.fromkeys(found))


if __name__ == "__main__":
    sys.exit(main())
