"""Which NVRTC is loaded: the one that fits the driver, and that one is reported and hashed."""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from tiny_kernels import tiny_spec, tiny_tree

from flash_attn_interface._common import env
from flash_attn_interface._common.launch import driver
from flash_attn_interface._common.prebuild import build as prebuild
from flash_attn_interface._common.runtime import compiler, cubins, nvrtc, sources
from flash_attn_interface._common.runtime.nvrtc import Library

__all__ = ["tiny_tree"]

CACHED = (compiler.load_nvrtc, compiler.compiler_version, compiler.unfit_for_the_driver)
DRIVERS = [None, (12, 0), (12, 8), (13, 0), (13, 9), (14, 1)]


@pytest.fixture(autouse=True)
def looked_for_anew() -> Iterator[None]:
    for cached in (*CACHED, nvrtc.driver_version):
        cached.cache_clear()
    real = nvrtc.driver_version
    yield
    for cached in (*CACHED, real):
        cached.cache_clear()


class Site:
    """A site folder with wheels of NVRTC, none of which can be loaded."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        outside = [p for p in sys.path if not Path(p, "nvidia").is_dir()]
        monkeypatch.setattr(sys, "path", [str(folder), *outside])
        monkeypatch.setattr(nvrtc, "of_the_system", list)

    def add(self, distribution: str, version: str) -> str:
        """The library's path."""
        major = version.partition(".")[0]
        inside = f"cu{major}" if int(major) >= 13 else "cuda_nvrtc"
        library = self.folder / "nvidia" / inside / "lib" / f"libnvrtc.so.{major}"
        library.parent.mkdir(parents=True)
        library.write_bytes(b"not a library")
        library.with_name(f"libnvrtc.so.{major}.alt").touch()
        (library.parent / f"libnvrtc-builtins.so.{version[:4]}").touch()
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        return str(library)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path / "site", monkeypatch)


@pytest.fixture
def both(site: Site) -> dict[int, str]:
    """As beside torch 2.5.1, which pins CUDA 12's."""
    return {
        13: site.add("nvidia-cuda-nvrtc", "13.5.37"),
        12: site.add("nvidia-cuda-nvrtc-cu12", "12.4.127"),
    }


def machine(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int] | None, torch: int | None = None
) -> None:
    """A driver, and the CUDA version that torch was built for."""
    monkeypatch.setattr(nvrtc, "driver_version", lambda: version)
    monkeypatch.setattr(nvrtc, "torch_cuda_major", lambda: torch)


# ---- the choice -------------------------------------------------------------------------------


@pytest.mark.parametrize("version", DRIVERS)
@pytest.mark.parametrize("torch", [None, 12, 13])
def test_with_both_wheels_the_one_that_fits_the_driver_is_taken_reported_and_hashed(
    version: tuple[int, int] | None,
    torch: int | None,
    both: dict[int, str],
    tiny_tree: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, version, torch)
    limit = version[0] if version else (torch or 13)
    expected = 12 if limit == 12 else 13
    library = nvrtc.chosen()
    assert library == Library(both[expected], expected)
    assert compiler.compiler_version() == {12: "nvrtc 12.4.127", 13: "nvrtc 13.5.37"}[expected]
    with pytest.raises(compiler.MissingCompilerError, match="cannot be loaded") as error:
        compiler.load_nvrtc()  # the very file
    assert both[expected] in str(error.value)
    texts = sources.resolve("tiny/scale.cu")
    keys = {cubins._disk_key(tiny_spec(), texts)}
    compiler.compiler_version.cache_clear()
    machine(monkeypatch, (12, 4) if expected == 13 else (13, 0))
    keys.add(cubins._disk_key(tiny_spec(), texts))
    assert len(keys) == 2, "kernels of one compiler would be found by the other"
    assert compiler.unfit_for_the_driver() is None


@pytest.mark.parametrize("version", DRIVERS)
@pytest.mark.parametrize("only", [12, 13])
def test_a_single_wheel_is_taken_whatever_the_driver_and_a_misfit_is_said(
    version: tuple[int, int] | None, only: int, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "nvidia-cuda-nvrtc" + ("-cu12" if only == 12 else "")
    path = site.add(name, f"{only}.1.2")
    machine(monkeypatch, version)
    assert nvrtc.chosen() == Library(path, only)
    told = compiler.unfit_for_the_driver()
    if version is None or version[0] >= only:
        assert told is None
    else:
        assert told is not None and "the compiler is nvrtc 13.1.2" in told
        assert f"supports CUDA {version[0]}.{version[1]}" in told
        assert 'pip install "nvidia-cuda-nvrtc-cu12"' in told


def test_a_toolkits_library_is_taken_where_no_wheel_fits(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = Library(site.add("nvidia-cuda-nvrtc", "13.1.2"), 13)
    toolkit = Library("libnvrtc.so.12", 12)
    monkeypatch.setattr(nvrtc, "of_the_system", lambda: [toolkit])
    machine(monkeypatch, (12, 4))
    assert nvrtc.chosen() == toolkit
    machine(monkeypatch, (13, 4))
    assert nvrtc.chosen() == wheel


def test_a_version_is_not_taken_from_a_wheel_that_the_library_is_not_of(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.add("nvidia-cuda-nvrtc", "13.1.2")
    machine(monkeypatch, None)
    assert Library("libnvrtc.so.13", 13).wheel_version() is None
    assert Library(str(tmp_path / "toolkit" / "libnvrtc.so.13"), 13).wheel_version() is None
    monkeypatch.setattr(compiler, "loaded_version", lambda: "nvrtc 13.9")
    monkeypatch.setattr(nvrtc, "chosen", lambda: Library("libnvrtc.so.13", 13))
    assert compiler.compiler_version() == "nvrtc 13.9"


@pytest.mark.parametrize("version", [None, (12, 4), (13, 0)])
def test_without_any_the_error_names_the_wheel_for_the_driver(
    version: tuple[int, int] | None, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, version)
    monkeypatch.setattr(nvrtc, "_folders", list)
    wheel = "nvidia-cuda-nvrtc-cu12" if version == (12, 4) else "nvidia-cuda-nvrtc>=13"
    with pytest.raises(ImportError, match="no NVRTC library is found") as error:
        compiler.load_nvrtc()
    assert f'pip install "{wheel}"' in str(error.value)
    monkeypatch.delenv(env.SKIP_CUDA_BUILD.name, raising=False)
    monkeypatch.setattr(prebuild.platform, "system", lambda: "Linux")
    assert wheel in prebuild.build_requires()


# ---- facts about the machine ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "major"),
    [
        ("__version__ = '2.5.1+cu124'\ncuda: Optional[str] = '12.4'\nhip = None\n", 12),
        ("cuda: str | None = '13.0'\n", 13),
        ("cuda = None\n", None),
        ("", None),
    ],
)
def test_torchs_cuda_is_read_without_importing_it(
    text: str, major: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "torch" / "version.py").write_text(text)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert nvrtc.torch_cuda_major() == major


def test_an_imported_torch_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("torch")
    fake.version = types.SimpleNamespace(cuda="12.8")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", fake)
    assert nvrtc.torch_cuda_major() == 12
    fake.version.cuda = None  # type: ignore[attr-defined]
    assert nvrtc.torch_cuda_major() is None


def test_the_installed_torch_says_the_same_imported_or_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = nvrtc.torch_cuda_major()
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert nvrtc.torch_cuda_major() == before


# ---- a driver that is too old -----------------------------------------------------------------


def test_nothing_is_compiled_for_a_driver_that_will_refuse_it(
    site: Site, tiny_tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message comes before minutes of compiling, unless the kernel is there already."""
    site.add("nvidia-cuda-nvrtc", "13.1.2")
    machine(monkeypatch, (12, 4))
    monkeypatch.setenv(env.DISK_CACHE.name, "0")
    monkeypatch.setattr(cubins.KernelCache, "image", None)  # calling it would be a TypeError
    with pytest.raises(driver.DriverError, match="supports CUDA 12.4, the compiler is nvrtc 13.1"):
        driver.device_kernel(tiny_spec(num_threads=224), 0)  # none has compiled it


def test_a_driver_without_the_functions_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.SimpleNamespace(cuDriverGetVersion=lambda: (0, 11080))
    monkeypatch.setattr(driver, "load_bindings", lambda: fake)
    with pytest.raises(driver.DriverError, match=r"supports CUDA 11.8, which is too old .*12\.0"):
        driver.DeviceKernel(tiny_spec(), b"\x7fELF")


# ---- the real one -----------------------------------------------------------------------------


def real_libraries() -> list[Library]:
    return nvrtc.candidates()


@pytest.mark.parametrize("library", real_libraries(), ids=lambda library: f"cuda{library.major}")
def test_what_is_reported_is_what_compiles(
    library: Library, tiny_tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each installed library in turn; two majors may live in one process."""
    monkeypatch.setattr(nvrtc, "chosen", lambda: library)
    loaded = compiler.loaded_version()
    assert loaded.startswith(f"nvrtc {library.major}.")
    assert compiler.compiler_version().startswith(loaded)
    compiled = compiler.compile_cubin(tiny_spec(), sources.resolve("tiny/scale.cu"))
    assert compiled.cubin.startswith(b"\x7fELF") and compiled.resources.registers > 0


def test_a_copy_of_the_library_elsewhere_reports_its_own_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = real_libraries()
    if not found:
        pytest.skip("no wheel of NVRTC is installed")
    copy = tmp_path / "lib"
    shutil.copytree(Path(found[0].path).parent, copy, symlinks=True)
    library = Library(str(copy / Path(found[0].path).name), found[0].major)
    assert library.wheel_version() is None
    monkeypatch.setattr(nvrtc, "chosen", lambda: library)
    wheel = found[0].wheel_version()
    assert wheel is not None and f"nvrtc {wheel}".startswith(compiler.compiler_version())


@pytest.mark.gpu
def test_the_chosen_compiler_fits_this_driver() -> None:
    version, library = nvrtc.driver_version(), nvrtc.chosen()
    assert version is not None and library is not None and library.major <= version[0]
    status, asked = driver.load_bindings().cuDriverGetVersion()
    assert int(status) == 0 and version == (asked // 1000, asked % 1000 // 10)
    assert metadata.version("cuda-bindings")
