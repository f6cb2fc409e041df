"""Prebuilt kernels in both distributions: built, installed and found, each way that users install.

A short headdim.json keeps the compiling to seconds. What is built for which call is the business of
test_prebuild.py.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from installs import SKIP_CUDA_BUILD, Environment, attempt, build_wheel, copy_checkout, run

NEEDED = ("setuptools", "pip", "ninja", "cuda.bindings")
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name.partition(".")[0]) is None for name in NEEDED),
    reason=f"not all of {', '.join(NEEDED)} are installed in this environment",
)

LISTING = {
    "pairs": [[16, 16]],
    "dtypes": ["bf16"],
    "features": ["causal", "dense"],
    "archs": ["80", "90a"],
}
PREBUILD = {SKIP_CUDA_BUILD: "", "MAX_JOBS": "2"}


@dataclass(frozen=True)
class Build:
    source: Path
    main: Path  # wheels
    hopper: Path
    told: str  # by the main one's build


def write_listing(source: Path, **changes: object) -> None:
    (source / "headdim.json").write_text(json.dumps({**LISTING, **changes}))


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("prebuilt")
    source = copy_checkout(folder / "flash-attn")
    write_listing(source)
    main, told = build_wheel(source, folder / "main", **PREBUILD)
    hopper, _ = build_wheel(source / "hopper", folder / "hopper", **PREBUILD)
    return Build(source, main, hopper, told)


@pytest.fixture(scope="module")
def installed(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("environment"))
    environment.pip("install", "--quiet", "--no-index", "--no-deps", build.main, build.hopper)
    return environment


def kernels_in(wheel: Path) -> list[str]:
    """Labels, without hash."""
    with zipfile.ZipFile(wheel) as archive:
        cubins = [name for name in archive.namelist() if name.endswith("/kernel.cubin")]
    return sorted(name.split("/")[-2].rpartition("-")[0] for name in cubins)


def test_the_wheels_hold_the_listed_kernels_and_no_others(build: Build) -> None:
    assert "kernels for sm_80, sm_90a; head dims (16,16); bf16; causal, dense" in build.told
    main, hopper = kernels_in(build.main), kernels_in(build.hopper)
    assert {name.rpartition("-")[2] for name in main} == {"sm_80", "sm_90"}
    assert all(name.startswith("flash2-fwd-bf16-qk16-v16-causal") for name in main), main
    assert hopper and all(name.startswith("hopper-fwd-bf16-qk16-v16-causal") for name in hopper)
    for wheel in (build.main, build.hopper):
        assert wheel.name.endswith("-py3-none-any.whl")
        with zipfile.ZipFile(wheel) as archive:
            entry = {n.split("/")[-1] for n in archive.namelist() if "/_prebuilt/" in n}
        assert entry == {"kernel.cubin", "prelude.cuh", "spec.json", "compile.log", "contents.txt"}


def test_a_second_build_compiles_what_changed(build: Build, tmp_path: Path) -> None:
    _, told = build_wheel(build.source, tmp_path / "same", **PREBUILD)
    assert "kernels are up to date" in told and ": compiling" not in told
    before = kernels_in(build.main)
    try:
        write_listing(build.source, pairs=[[16, 16], [8, 24]], archs=["80"])
        wheel, told = build_wheel(build.source, tmp_path / "more", **PREBUILD)
    finally:
        write_listing(build.source)
    kept = [name for name in before if name.endswith("sm_80")]
    new = [name for name in kernels_in(wheel) if name not in kept]
    assert new and all("-qk8-v24-" in name for name in new)
    assert f"compiling {len(new)} of {len(new) + len(kept)} kernels" in told


PROGRAM = """
import importlib.util, json, sys
from pathlib import Path
from flash_attn_interface._common.runtime import cubins, nvrtc
if json.loads(sys.argv[1]):
    nvrtc.chosen = lambda: None
from flash_attn_interface._common.ask.problem import Problem
def problem(dims, **changes):
    heads = dict(num_heads_q=1, num_heads_k=1, num_heads_v=1)
    sizes = dict(batch=1, seqlen_q=64, seqlen_k=64, total_q=64, total_k=64, softmax_scale=1.0)
    mask = dict(causal=True, window_right=0)
    return Problem("bf16", *dims, **heads, **sizes, **{**mask, **changes})
from flash_attn_interface._flash2.fwd_tiles import forward_spec
"""


def in_environment(
    environment: Environment, program: str, cwd: Path, without_nvrtc: bool = False
) -> str:
    cache = {"FLASH_ATTN_INTERFACE_CACHE_DIR": str(cwd / "cache")}
    return environment.run("-c", PROGRAM + program, json.dumps(without_nvrtc), cwd=cwd, **cache)


def test_installed_beside_each_other_they_leak_no_generic_names(
    installed: Environment, tmp_path: Path
) -> None:
    program = """
import flash_attn, flash_attn_interface, flash_attn_2_cuda, flash_attn_3
site = Path(flash_attn_interface.__file__).parents[1]
for module in (flash_attn, flash_attn_2_cuda, flash_attn_3, cubins):
    assert site in Path(module.__file__).parents, module.__file__
for leak in ("common", "flash2", "hopper", "tests", "build", "cache", "prebuild", "tiles", "setup"):
    assert importlib.util.find_spec(leak) is None, leak
from flash_attn_interface.call import backends
print(backends.hopper().name)
"""
    assert in_environment(installed, program, tmp_path).split() == ["hopper"]


def test_listed_problems_run_without_nvrtc(installed: Environment, tmp_path: Path) -> None:
    program = """
import flash_attn_3.fwd_tiles
for arch in ("sm_80", "sm_86", "sm_89", "sm_90"):
    image = cubins.default_kernels().image(forward_spec(problem((16, 16)), arch))
    print(arch, image.origin, image.folder.parts[-3])
spec = flash_attn_3.fwd_tiles.forward_spec(problem((16, 16)), "sm_90a")
image = cubins.default_kernels().image(spec)
print(spec.arch, image.origin, image.folder.parts[-3])
try:
    cubins.default_kernels().image(forward_spec(problem((16, 32)), "sm_80"))
except ImportError as error:
    print(error)
"""
    told = in_environment(installed, program, tmp_path, without_nvrtc=True)
    lines = told.splitlines()
    assert lines[:4] == [
        f"{arch} prebuilt flash_attn_interface" for arch in ("sm_80", "sm_86", "sm_89", "sm_90")
    ]
    assert lines[4] == "sm_90a prebuilt flash_attn_3"
    message = "\n".join(lines[5:])
    assert "flash2-fwd-bf16-qk16-v32-causal" in message and "is not prebuilt here" in message
    assert "pip install" in message
    assert "kernels for sm_80, sm_90, head dims (16,16)" in message
    assert list((tmp_path / "cache").glob("*-*")) == []


def test_commands_of_an_installation(installed: Environment, tmp_path: Path) -> None:
    own = {"FLASH_ATTN_INTERFACE_CACHE_DIR": str(tmp_path / "cache")}
    told = installed.run("-m", "flash_attn_interface.cache", "verify", cwd=tmp_path, **own)
    assert told.count("_prebuilt: ") == 2 and "damaged" not in told
    module = ["-m", "flash_attn_interface.build", "--arch", "sm_90a"]
    kind = ["--dtype", "bf16", "--features", "causal", "dense"]
    told = installed.run(*module, *kind, "--list", "--dims", "16", "16", cwd=tmp_path, **own)
    kernels = [line for line in told.splitlines() if "-fwd-" in line]
    assert {line.split()[1].split("-")[0] for line in kernels} == {"flash2", "hopper"}
    assert all(line.startswith("built") for line in kernels), told
    out = tmp_path / "fleet"
    installed.run(*module, *kind, "--dims", "8", "8", "--out", out, cwd=tmp_path, **own)
    assert {path.name.split("-")[0] for path in out.glob("*-*")} == {"flash2", "hopper"}


def test_two_versions_share_a_cache_and_no_kernel(installed: Environment, tmp_path: Path) -> None:
    """Another version is one whose device code differs, if only by a comment."""
    other = tmp_path / "site"
    shutil.copytree(installed.site / "flash_attn_interface", other / "flash_attn_interface")
    header = other / "flash_attn_interface" / "_common" / "device" / "mask.cuh"
    header.write_text(header.read_text() + "// of another version\n")
    program = """
image = cubins.default_kernels().image(forward_spec(problem((8, 8)), "sm_80"))
listed = cubins.default_kernels().image(forward_spec(problem((16, 16)), "sm_80"))
print(image.origin, listed.origin, image.folder.name)
"""
    first = in_environment(installed, program, tmp_path).split()
    other_first = f"import sys; sys.path.insert(0, {str(other)!r})"
    cache = {"FLASH_ATTN_INTERFACE_CACHE_DIR": str(tmp_path / "cache")}
    told = installed.run("-c", other_first + PROGRAM + program, "[]", cwd=tmp_path, **cache)
    second = told.split()
    again = in_environment(installed, program, tmp_path).split()
    assert first[:2] == ["built", "prebuilt"]
    assert second[:2] == ["built", "built"] and second[2] != first[2]
    assert again == ["disk", "prebuilt", first[2]]


def test_editable_installations_hold_their_kernels(build: Build, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment")
    options = ("install", "--no-index", "--no-deps", "--no-build-isolation", "-e")
    packages = (build.source / "flash_attn_interface", build.source / "hopper")
    try:
        for folder in (build.source, build.source / "hopper"):
            environment.pip(*options, folder, **PREBUILD)
        program = """
import flash_attn_3.fwd_tiles
for spec in (
    forward_spec(problem((16, 16)), "sm_90"),
    flash_attn_3.fwd_tiles.forward_spec(problem((16, 16)), "sm_90a"),
):
    print(cubins.default_kernels().image(spec).folder)
"""
        found = in_environment(environment, program, tmp_path).split()
        assert [Path(entry).parent for entry in found] == [p / "_prebuilt" for p in packages]
    finally:
        for package in packages:
            shutil.rmtree(package / "_prebuilt", ignore_errors=True)


def test_setup_py_install(build: Build, tmp_path: Path) -> None:
    """Both distributions by hand; again; and with another list, over the first installation."""
    environment = Environment(tmp_path / "environment")

    def install() -> list[str]:
        """What was said of the main distribution, and of the Hopper one."""
        folders = (build.source, build.source / "hopper")
        return [environment.run("setup.py", "install", cwd=f, **PREBUILD) for f in folders]

    def installed() -> set[str]:
        entries = [path.parent.name for path in environment.site.rglob("_prebuilt/*/kernel.cubin")]
        assert len(set(entries)) == len(entries)
        return {entry.rpartition("-")[0] for entry in entries}

    install()
    assert installed() == {*kernels_in(build.main), *kernels_in(build.hopper)}
    program = """
import flash_attn_3.fwd_tiles
for spec in (
    forward_spec(problem((16, 16)), "sm_80"),
    flash_attn_3.fwd_tiles.forward_spec(problem((16, 16)), "sm_90a"),
):
    print(cubins.default_kernels().image(spec).origin)
"""
    assert (
        in_environment(environment, program, tmp_path, without_nvrtc=True).split()
        == ["prebuilt"] * 2
    )
    for told in install():
        assert "kernels are up to date" in told and ": compiling" not in told
    try:
        write_listing(build.source, pairs=[[8, 24]], archs=["80"])
        install()
    finally:
        write_listing(build.source)
    left = installed()
    assert left and all("-qk8-v24-" in name and name.endswith("-sm_80") for name in left)


def builds(source: Path, out: Path) -> list[list[str]]:
    """Ways to build, which must all notice a mistake."""
    pip = [sys.executable, "-m", "pip"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    return [
        [*pip, "wheel", *offline, "-w", str(out), "."],
        [*pip, "install", *offline, "--target", str(out), "."],
        [*pip, "install", *offline, "--prefix", str(out), "-e", "."],
        [sys.executable, "setup.py", "bdist_wheel", "-d", str(out)],
    ]


@pytest.mark.parametrize("way", range(4), ids=["wheel", "install", "editable", "setup.py"])
def test_a_mistake_in_the_list_fails_every_build(way: int, build: Build, tmp_path: Path) -> None:
    try:
        write_listing(build.source, pairs=[[16, 16], [64]])
        result = attempt(*builds(build.source, tmp_path)[way], cwd=build.source, **PREBUILD)
    finally:
        write_listing(build.source)
    assert result.returncode != 0
    assert "headdim.json: pairs[1] is [64]: expected a pair" in result.stdout + result.stderr


def test_a_skipped_build_takes_seconds_and_compiles_nothing(build: Build, tmp_path: Path) -> None:
    wheel, told = build_wheel(build.source, tmp_path, **{SKIP_CUDA_BUILD: "TRUE"})
    assert kernels_in(wheel) == []
    assert "no kernels are prebuilt: each is compiled at its first use" in told


def test_hopper_alone_is_built_without_kernels(build: Build, tmp_path: Path) -> None:
    """Taken out of the checkout it lacks the headers; what it lacks is compiled at first use."""
    alone = tmp_path / "alone"
    shutil.copytree(build.source / "hopper", alone, ignore=shutil.ignore_patterns("build"))
    wheel, told = build_wheel(alone, tmp_path / "out", **PREBUILD)
    assert kernels_in(wheel) == []
    assert "no kernels are prebuilt, common/ is not beside this folder" in told


@pytest.mark.slow
def test_a_source_archive_builds_in_a_clean_environment(build: Build, tmp_path: Path) -> None:
    """With build isolation: needs a package index, which pip is configured for or not."""
    run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=build.source)
    (archive,) = tmp_path.glob("*.tar.gz")
    python = tmp_path / "clean" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "clean"], check=True)
    pip = [python, "-m", "pip", "install", "--no-deps", "-v", archive]
    result = attempt(*pip, cwd=tmp_path, **PREBUILD)
    if "Could not find a version" in result.stdout + result.stderr:
        pytest.skip("no package index within reach")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "head dims (16,16)" in result.stdout + result.stderr
    (contents,) = (tmp_path / "clean").rglob("_prebuilt/contents.txt")
    assert "head dims (16,16)" in contents.read_text()
