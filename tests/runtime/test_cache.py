"""KernelCache: what enters the key, and memory -> prebuilt -> disk -> compile. Needs no GPU."""

from __future__ import annotations

import functools
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_kernels import OP, tiny_spec, tiny_tree

from flash_attn_interface._common.runtime import compiler, cubins, sources, store
from flash_attn_interface._common.runtime.cubins import ArtifactStore, KernelCache, KernelImage
from flash_attn_interface._common.runtime.spec import KernelSpec

__all__ = ["tiny_tree"]
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _needs_nvrtc(tiny_tree: Path) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Labels of the kernels that were really compiled, in order."""
    seen: list[str] = []
    compile_cubin = compiler.compile_cubin

    def counted(spec: KernelSpec, *arguments: Any) -> compiler.Compiled:
        seen.append(spec.label())
        return compile_cubin(spec, *arguments)

    monkeypatch.setattr(compiler, "compile_cubin", counted)
    return seen


def key(spec: KernelSpec) -> str:
    sources.read.cache_clear()
    return cubins._disk_key(spec, sources.resolve(spec.source))


# ---- the key ----------------------------------------------------------------------------------


def test_the_key_is_stable() -> None:
    assert key(tiny_spec()) == key(tiny_spec())
    assert len(key(tiny_spec())) == 64


def test_a_change_in_an_included_header_changes_the_key(tiny_tree: Path) -> None:
    before = key(tiny_spec())
    (tiny_tree / "op.cuh").write_text(OP + "// a comment\n")
    after = key(tiny_spec())
    assert after != before
    (tiny_tree / "op.cuh").write_text(OP)
    assert key(tiny_spec()) == before


def test_a_change_in_an_unrelated_file_does_not(tiny_tree: Path) -> None:
    before = key(tiny_spec())
    (tiny_tree / "unused.cuh").write_text("// another text\n")
    (tiny_tree / "new.cuh").write_text("// another file\n")
    assert key(tiny_spec()) == before


@pytest.mark.parametrize(
    "other",
    [
        tiny_spec(num_threads=128),
        tiny_spec(causal=True),
        tiny_spec(causal=False),
        tiny_spec("sm_86"),
    ],
    ids=["constant", "on", "off", "arch"],
)
def test_constants_and_arch_change_the_key(other: KernelSpec) -> None:
    assert key(other) != key(tiny_spec())


def test_options_and_compiler_version_change_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {key(tiny_spec())}
    monkeypatch.setattr(compiler, "compiler_version", lambda: "nvrtc 12.0.1")
    keys.add(key(tiny_spec()))
    monkeypatch.setattr(compiler, "options", lambda spec: ("--std=c++20",))
    keys.add(key(tiny_spec()))
    assert len(keys) == 3


def test_the_compiler_version_is_all_that_a_prebuilt_key_leaves_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = sources.resolve("tiny/scale.cu")
    before = cubins.source_key(tiny_spec(), texts)
    monkeypatch.setattr(compiler, "compiler_version", lambda: "nvrtc 12.0.1")
    assert cubins.source_key(tiny_spec(), texts) == before
    assert cubins.source_key(tiny_spec(causal=True), texts) != before
    assert cubins.source_key(tiny_spec(), {**texts, "tiny/op.cuh": ""}) != before


# ---- the way of a look-up ---------------------------------------------------------------------


def test_compiled_once_then_memory_then_disk(tmp_path: Path, compiles: list[str]) -> None:
    spec = tiny_spec(causal=True)
    kernels = KernelCache(ArtifactStore(tmp_path / "cache"))
    first = kernels.image(spec)
    assert first.origin == "built" and kernels.image(spec) is first
    again = KernelCache(ArtifactStore(tmp_path / "cache")).image(spec)
    assert again.origin == "disk" and again.cubin == first.cubin
    assert again.resources == first.resources and again.resources.registers > 0
    assert compiles == ["tiny-scale-causal-sm_80"]


def test_an_entry_can_be_read_by_a_person(tmp_path: Path) -> None:
    spec = tiny_spec(causal=True)
    image = KernelCache(ArtifactStore(tmp_path)).image(spec)
    folder = image.folder
    assert folder is not None and folder.name == f"tiny-scale-causal-sm_80-{key(spec)[:16]}"
    names = {"kernel.cubin", "prelude.cuh", "spec.json", "compile.log"}
    assert {p.name for p in folder.iterdir()} == names
    assert (folder / "prelude.cuh").read_text() == spec.prelude()
    assert "ptxas info" in (folder / "compile.log").read_text()
    facts = json.loads((folder / "spec.json").read_text())["facts"]
    assert KernelSpec.from_dict(facts["spec"]) == spec
    assert facts["compiler"] == compiler.loaded_version()
    assert list(facts["sources"]) == ["tiny/op.cuh", "tiny/scale.cu"]


def test_folder_tells_where_without_compiling(tmp_path: Path, compiles: list[str]) -> None:
    spec = tiny_spec()
    kernels = KernelCache(ArtifactStore(tmp_path / "cache"))
    folder = kernels.folder(spec)
    assert folder is not None and not folder.exists() and compiles == []
    assert kernels.image(spec).folder == folder == kernels.folder(spec)
    assert KernelCache(ArtifactStore(None)).folder(spec) is None


def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    specs = [tiny_spec(num_threads=threads) for threads in (32, 64, 96)]
    count, go = FORK.Value("i", 0), FORK.Event()
    results: Any = FORK.Queue()
    compile_cubin = compiler.compile_cubin

    def worker() -> None:
        def counted(*arguments: Any) -> compiler.Compiled:
            with count.get_lock():
                count.value += 1
            return compile_cubin(*arguments)

        setattr(compiler, "compile_cubin", counted)  # noqa: B010
        go.wait()
        kernels = KernelCache(ArtifactStore(tmp_path / "cache"))
        results.put([(image.origin, image.cubin) for image in map(kernels.image, specs)])

    processes = [FORK.Process(target=worker) for _ in range(16)]
    for process in processes:
        process.start()
    go.set()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert count.value == len(specs)
    for images in zip(*found, strict=True):
        assert sorted(origin for origin, _ in images) == ["built"] + ["disk"] * 15
        assert len({cubin for _, cubin in images}) == 1


def test_a_compile_error_is_not_cached(tiny_tree: Path, tmp_path: Path) -> None:
    kernels = KernelCache(ArtifactStore(tmp_path / "cache"))
    (tiny_tree / "op.cuh").write_text("#error no\n")
    with pytest.raises(compiler.CompileError):
        kernels.image(tiny_spec())
    (tiny_tree / "op.cuh").write_text(OP)
    sources.read.cache_clear()
    assert kernels.image(tiny_spec()).origin == "built"


def test_the_slow_compile_line_says_what_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    nvrtc = compiler.load_nvrtc()
    real = nvrtc.nvrtcCompileProgram

    def slow(*arguments: Any) -> Any:
        time.sleep(0.2)
        return real(*arguments)

    monkeypatch.setattr(nvrtc, "nvrtcCompileProgram", slow)
    quick = functools.partial(compiler.announce_if_slow, seconds=0.05)
    monkeypatch.setattr(compiler, "announce_if_slow", quick)
    image = KernelCache(ArtifactStore(tmp_path)).image(tiny_spec())
    assert capfd.readouterr().err == (
        "flash_attn_interface: compiling tiny-scale-sm_80: first use of this kernel; "
        f"later processes load it from {image.folder}\n"
    )


def test_a_warm_start_needs_no_compiler_and_little_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    KernelCache(ArtifactStore(tmp_path)).image(tiny_spec())

    def no_compiler() -> None:
        raise AssertionError("NVRTC was loaded")

    monkeypatch.setattr(compiler, "load_nvrtc", no_compiler)
    seconds = []
    for _ in range(5):
        sources.read.cache_clear()
        compiler.compiler_version.cache_clear()
        begin = time.perf_counter()
        image = KernelCache(ArtifactStore(tmp_path)).image(tiny_spec())
        seconds.append(time.perf_counter() - begin)
        assert image.origin == "disk"
    assert min(seconds) < 0.05


# ---- prebuilt ---------------------------------------------------------------------------------


def _fetch(tmp_path: Path, spec: KernelSpec) -> KernelImage:
    return _kernels(tmp_path).image(spec)


def _kernels(tmp_path: Path) -> KernelCache:
    return KernelCache(ArtifactStore(tmp_path / "cache"), lambda spec: [tmp_path / "prebuilt"])


def test_prebuilt_kernels_serve_any_compiler_version(
    tmp_path: Path, compiles: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = cubins.prebuild(tiny_spec(), tmp_path / "prebuilt")
    assert entry.parent == tmp_path / "prebuilt" and (entry / "kernel.cubin").is_file()
    monkeypatch.setattr(compiler, "compiler_version", lambda: "nvrtc 99.0")
    image = _fetch(tmp_path, tiny_spec())
    assert (image.origin, image.folder) == ("prebuilt", entry)
    assert _fetch(tmp_path, tiny_spec(causal=True)).origin == "built"
    assert len(compiles) == 2


def test_prebuilt_kernels_work_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cubins.prebuild(tiny_spec(), tmp_path / "prebuilt")

    def missing(*arguments: object) -> Any:
        raise compiler.MissingCompilerError("cuda-bindings cannot be imported")

    monkeypatch.setattr(compiler, "compiler_version", missing)
    monkeypatch.setattr(compiler, "load_nvrtc", missing)
    assert _fetch(tmp_path, tiny_spec()).origin == "prebuilt"
    (tmp_path / "prebuilt" / cubins.CONTENTS).write_text("one kernel for sm_80\n")
    with pytest.raises(ImportError) as raised:
        _fetch(tmp_path, tiny_spec(causal=True))
    told = str(raised.value)
    assert "tiny-scale-causal-sm_80 is not prebuilt here and cannot be compiled" in told
    assert "cuda-bindings cannot be imported" in told
    assert f"Prebuilt: one kernel for sm_80 ({tmp_path / 'prebuilt'})" in told
    assert tiny_spec(causal=True).describe() in told


def test_prebuilt_comes_before_the_disk_and_touches_nothing(tmp_path: Path) -> None:
    cubins.prebuild(tiny_spec(), tmp_path / "prebuilt")
    assert _fetch(tmp_path, tiny_spec()).origin == "prebuilt"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("built_for", "runs_on", "serves"),
    [
        ("sm_80", "sm_86", True),
        ("sm_80", "sm_89", True),
        ("sm_86", "sm_89", True),
        ("sm_86", "sm_80", False),
        ("sm_80", "sm_87", False),
        ("sm_80", "sm_90", False),
        ("sm_90", "sm_90a", False),
        ("sm_90a", "sm_90", False),
        ("sm_120", "sm_121", True),
    ],
)
def test_prebuilt_code_serves_later_gpus_of_its_major_version(
    built_for: str, runs_on: str, serves: bool, tmp_path: Path
) -> None:
    cubins.prebuild(tiny_spec(built_for), tmp_path / "prebuilt")
    found = _kernels(tmp_path).find(tiny_spec(runs_on))
    assert (found is not None) == serves
    if found is not None:
        assert found.spec == tiny_spec(runs_on) and found.facts["spec"]["arch"] == built_for
    assert _kernels(tmp_path).find(tiny_spec(runs_on, causal=True)) is None


def test_prebuilt_code_of_the_very_gpu_is_preferred(tmp_path: Path) -> None:
    for arch in ("sm_80", "sm_86"):
        cubins.prebuild(tiny_spec(arch), tmp_path / "prebuilt")
    assert _fetch(tmp_path, tiny_spec("sm_86")).facts["spec"]["arch"] == "sm_86"
    assert _fetch(tmp_path, tiny_spec("sm_89")).facts["spec"]["arch"] == "sm_86"


def test_a_prebuilt_kernel_that_does_not_load_is_compiled_here(
    tmp_path: Path, compiles: list[str]
) -> None:
    cubins.prebuild(tiny_spec(), tmp_path / "prebuilt")
    kernels = _kernels(tmp_path)
    assert kernels.image(tiny_spec()).origin == "prebuilt"
    assert kernels.image_made_here(tiny_spec()).origin == "built"
    assert kernels.image(tiny_spec()).origin == "built"
    assert len(compiles) == 2


def test_the_environment_names_a_prebuilt_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cubins.prebuild(tiny_spec(), tmp_path / "fleet")
    monkeypatch.setenv("FLASH_ATTN_INTERFACE_CACHE_DIR", str(tmp_path / "mine"))
    monkeypatch.setenv("FLASH_ATTN_INTERFACE_PREBUILT_DIR", str(tmp_path / "fleet"))
    found = cubins.default_kernels().image(tiny_spec())
    assert found.origin == "prebuilt" and found.folder is not None
    assert found.folder.parent == tmp_path / "fleet"
    monkeypatch.delenv("FLASH_ATTN_INTERFACE_PREBUILT_DIR")
    assert cubins.default_kernels().find(tiny_spec()) is None


def test_a_separately_installed_tree_has_a_prebuilt_folder_of_its_own(
    tiny_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cubins.prebuild(tiny_spec(), tiny_tree / sources.PREBUILT)
    monkeypatch.setenv("FLASH_ATTN_INTERFACE_CACHE_DIR", str(tmp_path / "own"))
    assert cubins.default_kernels().image(tiny_spec()).origin == "prebuilt"


def test_prebuilt_kernels_of_other_sources_are_not_used(tiny_tree: Path, tmp_path: Path) -> None:
    cubins.prebuild(tiny_spec(), tmp_path / "prebuilt")
    (tiny_tree / "op.cuh").write_text(OP + "// edited\n")
    sources.read.cache_clear()
    assert _fetch(tmp_path, tiny_spec()).origin == "built"


def test_prebuilding_again_compiles_nothing(tmp_path: Path, compiles: list[str]) -> None:
    first = cubins.prebuild(tiny_spec(), tmp_path)
    assert cubins.prebuild(tiny_spec(), tmp_path) == first
    assert len(compiles) == 1


def test_a_folder_that_cannot_take_the_prebuilt_kernel_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_write_file", full)
    with pytest.warns(RuntimeWarning), pytest.raises(OSError, match="cannot write the prebuilt"):
        cubins.prebuild(tiny_spec(), tmp_path)


# ---- this process's cache ---------------------------------------------------------------------


def test_the_default_cache_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASH_ATTN_INTERFACE_CACHE_DIR", str(tmp_path / "mine"))
    monkeypatch.delenv("FLASH_ATTN_INTERFACE_DISK_CACHE", raising=False)
    kernels = cubins.default_kernels()
    assert kernels is cubins.default_kernels()
    assert kernels.image(tiny_spec()).folder is not None
    assert not (tmp_path / "mine").stat().st_mode & 0o077
    monkeypatch.setenv("FLASH_ATTN_INTERFACE_DISK_CACHE", "0")
    assert cubins.default_kernels().image(tiny_spec()).folder is None


def test_damage_is_repaired_by_a_compile(tmp_path: Path, compiles: list[str]) -> None:
    first = KernelCache(ArtifactStore(tmp_path)).image(tiny_spec())
    assert first.folder is not None
    (first.folder / "kernel.cubin").write_bytes(first.cubin[:1000])
    with pytest.warns(RuntimeWarning, match="damaged"):
        again = KernelCache(ArtifactStore(tmp_path)).image(tiny_spec())
    assert again.cubin == first.cubin and len(compiles) == 2
