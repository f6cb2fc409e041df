"""The distribution: what the wheel holds, and that it works away from the checkout.

Everything is built and installed without a network, with this environment's setuptools.
"""

from __future__ import annotations

import email
import importlib.util
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from installs import ROOT, build_wheel, copy_checkout, run

FOLDER_OF = {  # import folder in the wheel -> folder in the checkout; longest first
    "flash_attn_interface/_common/": "common/",
    "flash_attn_interface/_flash2/": "flash2/",
    "flash_attn_interface/": "flash_attn_interface/",
    "flash_attn/": "flash_attn/",
}
SHIPPED = (".py", ".cu", ".cuh", ".h", ".hpp", ".cpp", ".S", ".json", "py.typed")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None,
    reason="setuptools and pip are not installed in this environment",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("source") / "flash-attn")


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))[0]


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, "--target", target, wheel, cwd=target)
    return target


def metadata(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [n for n in archive.namelist() if n.endswith(f".dist-info/{name}")]
        return archive.read(path).decode()


def test_wheel_is_pure_python_and_named_as_clients_expect(wheel: Path) -> None:
    assert wheel.name == "flash_attn-2.8.3-py3-none-any.whl"


def test_wheel_owns_only_its_top_levels(wheel: Path, names: list[str]) -> None:
    top_levels = set(metadata(wheel, "top_level.txt").split())
    assert top_levels == {"flash_attn", "flash_attn_2_cuda", "flash_attn_interface"}
    shipped = {n.split("/")[0].removesuffix(".py") for n in names if ".dist-info/" not in n}
    assert shipped == top_levels


def test_wheel_holds_every_shipped_file_of_the_tree(names: list[str]) -> None:
    """A new subfolder or kind of file must be entered in setup.py, or only users miss it."""
    shipped = set()
    for name in names:
        prefix = next((p for p in FOLDER_OF if name.startswith(p)), None)
        if prefix:
            shipped.add(FOLDER_OF[prefix] + name[len(prefix) :])
    tree = {
        path.relative_to(ROOT).as_posix()
        for folder in FOLDER_OF.values()
        for path in (ROOT / folder).rglob("*")
        if path.name.endswith(SHIPPED) and not {"__pycache__", "_prebuilt"} & set(path.parts)
    }
    assert tree - shipped == set(), "missing in the wheel: see PACKAGES and DATA in setup.py"
    made_by_the_build = {"flash_attn_interface/_source_state.txt"}
    assert shipped - tree == made_by_the_build, (
        "in the wheel but not of a kind that is meant to be shipped"
    )


def test_metadata(wheel: Path) -> None:
    message = email.message_from_string(metadata(wheel, "METADATA"))
    assert message["Name"] == "flash-attn"
    assert message["Version"] == "2.8.3"
    assert message["Requires-Python"] == ">=3.10"
    assert "BSD-3-Clause" in (message["License"] or message["License-Expression"] or "")
    assert "Redistribution and use" in "".join(
        zipfile.ZipFile(wheel).read(n).decode()
        for n in zipfile.ZipFile(wheel).namelist()
        if n.endswith("LICENSE")
    )
    requires = [line for line in message.get_all("Requires-Dist", []) if "extra ==" not in line]
    needed = {line.split(">")[0].split(";")[0].strip() for line in requires}
    assert needed == {
        "torch", "numpy", "cuda-bindings", "nvidia-cuda-nvrtc", "ninja", "packaging", "filelock",
    }  # fmt: skip
    pinned = [line for line in requires if "==" in line.split(";")[0] or "<" in line.split(";")[0]]
    assert not pinned, "an upper bound or pin could make pip replace what torch was built with"
    assert set(message.get_all("Provides-Extra", [])) == {"cu12", "test", "lint", "bench", "docs"}


def test_versions_agree(wheel: Path, site: Path, tmp_path: Path) -> None:
    program = (
        "import flash_attn, flash_attn_interface as i; print(flash_attn.__version__, i.__version__)"
    )
    answer = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(site))
    assert answer.split() == ["2.8.3", "2.8.3"]


def test_installed_package_works_outside_the_checkout(site: Path, tmp_path: Path) -> None:
    """Public names import, generic folder names do not, and nothing comes from the checkout."""
    program = f"""
import importlib.util, sys
from pathlib import Path
for leak in ("common", "flash2", "hopper", "benchmarks", "tests"):
    assert importlib.util.find_spec(leak) is None, leak
import flash_attn, flash_attn_interface
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_qkvpacked_func
from flash_attn_interface import flash_attn_func as fa3_style, explain, simulate
import flash_attn_interface._flash2
from flash_attn_interface._common.runtime import sources
site = Path({str(site)!r})
for name, module in sys.modules.items():
    if name.partition(".")[0] in ("flash_attn", "flash_attn_interface"):
        assert site in Path(module.__file__).parents, (name, module.__file__)
texts = sources.resolve("flash2/fwd.cu")
assert "common/ptx/mma.cuh" in texts, sorted(texts)
simulated = sources.resolve("flash2/fwd.cu", simulate=True)
assert simulated["common/ptx/mma.cuh"] != texts["common/ptx/mma.cuh"]
"""
    run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(site))


def test_clients_find_the_distribution_by_its_metadata(site: Path, tmp_path: Path) -> None:
    """transformers, diffusers and TransformerEngine decide by these look-ups, not by importing."""
    program = """
import importlib.metadata as m, sys
owners = m.packages_distributions()
print(m.version("flash_attn"), m.version("flash-attn"))
print([n for n in owners["flash_attn"] if n.replace("_", "-") == "flash-attn"])
print("flash_attn_3" in owners)
"""
    answer = run(sys.executable, "-S", "-c", program, cwd=tmp_path, PYTHONPATH=str(site))
    assert answer.splitlines()[0] == "2.8.3 2.8.3"
    assert "flash" in answer.splitlines()[1]
    assert answer.splitlines()[2] == "False"


def test_import_is_cheap(site: Path, tmp_path: Path) -> None:
    """No CUDA context, no compiler library, no file written by importing."""
    program = """
import sys, torch
before = set(sys.modules)
import flash_attn, flash_attn_interface
assert not torch.cuda.is_initialized()
loaded = {m for m in set(sys.modules) - before if m.startswith(("cuda.bindings", "ninja"))}
assert not loaded, loaded
"""
    cache = tmp_path / "cache"
    paths = {"PYTHONPATH": str(site), "FLASH_ATTN_INTERFACE_CACHE_DIR": str(cache)}
    run(sys.executable, "-c", program, cwd=tmp_path, **paths)
    assert not cache.exists()


def test_source_archive_builds_the_same_wheel(
    source: Path, names: list[str], tmp_path: Path
) -> None:
    run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path)
    (unpacked,) = [p for p in tmp_path.iterdir() if p.is_dir()]
    run(sys.executable, "setup.py", "-q", "bdist_wheel", "-d", tmp_path, cwd=unpacked)
    (rebuilt,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(rebuilt) as wheel_again:
        assert sorted(wheel_again.namelist()) == sorted(names)
