"""What is prebuilt, and how: the planned calls are covered, only what is missing is compiled."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import hopper_tree
import pytest
import torch
from asked import cache_call, forward_call
from tiny_kernels import OP, tiny_spec, tiny_tree

import flash_attn_interface
from flash_attn_interface._common import env
from flash_attn_interface._common.ask.backward_problem import BackwardProblem
from flash_attn_interface._common.ask.call import Backward, Call, Tensors
from flash_attn_interface._common.ask.check import check
from flash_attn_interface._common.ask.problem import Problem, Target
from flash_attn_interface._common.prebuild import build as prebuild
from flash_attn_interface._common.prebuild.build import PrebuildError, Trees, headdim
from flash_attn_interface._common.prebuild.headdim import Wanted
from flash_attn_interface._common.runtime import cubins, sources
from flash_attn_interface._common.runtime.spec import KernelSpec
from flash_attn_interface._flash2 import BACKEND as FLASH2
from flash_attn_interface._flash2 import prebuild as flash2_prebuild
from flash_attn_interface._flash2.decode_tiles import combine_spec

__all__ = ["tiny_tree"]
NAMES = ("flash_attn_interface", "flash_attn_interface._common", "flash_attn_interface._flash2")
PACKAGES = {name: Path(importlib.import_module(name).__path__[0]) for name in NAMES}
TREES = Trees(["flash_attn_interface._flash2.prebuild"], PACKAGES)


# ---- which kernels ----------------------------------------------------------------------------


def forward_problem(
    dims: tuple[int, int],
    dtype: torch.dtype,
    heads_k: int,
    varlen: bool,
    causal: bool,
    seqlen: int = 150,
) -> Problem:
    """Of an ordinary call, as the public functions make it."""
    shape = (2 * seqlen,) if varlen else (2, seqlen)
    q = torch.zeros(*shape, 4, dims[0], dtype=dtype)
    k = torch.zeros(*shape, heads_k, dims[0], dtype=dtype)
    v = torch.zeros(*shape, heads_k, dims[1], dtype=dtype)
    ends = torch.tensor([0, seqlen, 2 * seqlen], dtype=torch.int32) if varlen else None
    longest = seqlen if varlen else None
    return check(
        forward_call(
            q,
            k,
            v,
            cu_seqlens_q=ends,
            cu_seqlens_k=ends,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=causal,
            return_lse=True,
        )
    )


def backward_problem(forward: Problem) -> BackwardProblem:
    shape = (300,) if forward.varlen_q else (2, 150)
    q, out = (
        torch.zeros(*shape, forward.num_heads_q, d)
        for d in (forward.head_dim_qk, forward.head_dim_v)
    )
    k, v = (
        torch.zeros(*shape, forward.num_heads_k, d)
        for d in (forward.head_dim_qk, forward.head_dim_v)
    )
    lse = torch.zeros(0)
    return BackwardProblem.of(forward, Call(Tensors(q, k, v)), Backward(out, out, lse, q, k, v))


ORDINARY = [
    (dtype, heads_k, varlen, causal)
    for dtype in (torch.bfloat16, torch.float16)
    for heads_k in (4, 2, 1)
    for varlen in (False, True)
    for causal in (False, True)
]


@pytest.mark.parametrize("dims", Wanted().pairs, ids=lambda d: f"qk{d[0]}-v{d[1]}")
@pytest.mark.parametrize(
    ("listed", "runs_on"),
    [("sm_80", "sm_80"), ("sm_80", "sm_86"), ("sm_80", "sm_89"), ("sm_90a", "sm_90")],
)
def test_ordinary_calls_of_a_listed_pair_are_prebuilt(
    listed: str, runs_on: str, dims: tuple[int, int]
) -> None:
    prebuilt = set(flash2_prebuild.specs(dims, Wanted(), listed))
    target = Target(runs_on, 0)
    for dtype, heads_k, varlen, causal in ORDINARY:
        forward = forward_problem(dims, dtype, heads_k, varlen, causal)
        specs = [FLASH2.plan_forward(forward, target).spec]
        specs += FLASH2.plan_backward(backward_problem(forward), target).specs
        for spec in specs:
            assert replace(spec, arch=listed.rstrip("a")) in prebuilt, spec.describe()


@pytest.mark.parametrize("dims", Wanted().pairs, ids=lambda d: f"qk{d[0]}-v{d[1]}")
def test_ordinary_calls_of_a_listed_pair_are_prebuilt_for_hopper(dims: tuple[int, int]) -> None:
    backend = hopper_tree.load().BACKEND
    planner = importlib.import_module("flash_attn_3.prebuild")
    prebuilt = set(planner.specs(dims, Wanted(), "sm_90a"))
    assert prebuilt and planner.specs(dims, Wanted(), "sm_80") == []
    target = Target("sm_90a", 0, simulated=True)
    for dtype, heads_k, varlen, causal in ORDINARY:
        for seqlen in (150, 800, 1700, 4000, 7000):
            if heads_k != 4 and seqlen < 1000:
                continue  # so few rows of several heads are packed
            forward = forward_problem(dims, dtype, heads_k, varlen, causal, seqlen)
            assert backend.refuses_forward(forward, target) is None
            assert backend.plan_forward(forward, target).spec in prebuilt
            backward = replace(backward_problem(forward), vector_bytes=16)
            assert set(backend.plan_backward(backward, target).specs) <= prebuilt


def cache_specs(
    rows: int,
    paged: bool,
    heads_k: int = 2,
    append: bool = False,
    rotary: bool = False,
    interleaved: bool = True,
    num_splits: int = 0,
) -> list[KernelSpec]:
    """The kernels of a call over a cache: bf16, head dims (64, 128), 2 sequences, 8 heads."""
    slots = (16, 256) if paged else (2, 2048)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.bfloat16)

    call = cache_call(
        q=zeros(2, rows, 8, 64),
        k_cache=zeros(*slots, heads_k, 64),
        v_cache=zeros(*slots, heads_k, 128),
        k=zeros(2, rows, heads_k, 64) if append else None,
        v=zeros(2, rows, heads_k, 128) if append else None,
        rotary_cos=zeros(2048, 32) if rotary else None,
        rotary_sin=zeros(2048, 32) if rotary else None,
        cache_seqlens=torch.zeros(2, dtype=torch.int32),
        page_table=torch.arange(16, dtype=torch.int32).reshape(2, 8) if paged else None,
        causal=True,
        rotary_interleaved=interleaved,
        num_splits=num_splits,
    )
    plan = FLASH2.plan_forward(check(call), Target("sm_80", 0, simulated=True))
    return [step.spec for step in (plan.append, plan.forward, plan.decode) if step]


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_ordinary_calls_over_a_cache_are_prebuilt(paged: bool) -> None:
    prebuilt = set(flash2_prebuild.specs((64, 128), Wanted(), "sm_80"))
    entries = set()
    for steps in (
        cache_specs(1, paged),
        cache_specs(1, paged, heads_k=8),
        cache_specs(1, paged, append=True),
        cache_specs(1, paged, append=True, rotary=True),
        cache_specs(1, paged, append=True, rotary=True, interleaved=False),
        cache_specs(1, paged, num_splits=1),
        cache_specs(1, paged, num_splits=32),
        cache_specs(4, paged, num_splits=3),  # speculative decoding
        cache_specs(512, paged, num_splits=1),  # prefill
    ):
        for spec in steps:
            entries.add(spec.entry)
            assert spec in prebuilt, spec.describe()
    assert {"flash2_append", "flash2_fwd", "flash2_decode"} <= entries
    for num_splits in (2, 8, 9, 200):  # where the splits are too large for one CTA to merge
        assert combine_spec("sm_80", "bf16", 128, num_splits, True, True) in prebuilt


def test_each_tree_prebuilds_what_it_serves_of_a_pair() -> None:
    hopper_tree.load()
    planner = importlib.import_module("flash_attn_3.prebuild")
    decoding = {"flash2_append", "flash2_decode", "flash2_combine"}
    for pair in ((64, 512), (576, 512)):
        entries = {spec.entry for spec in flash2_prebuild.specs(pair, Wanted(), "sm_90a")}
        assert entries >= decoding | {"flash2_fwd", "flash2_bwd"}
    for pair, entry in (((64, 512), "hopper_fwd"), ((576, 512), "hopper_fwd_wide")):
        specs = planner.specs(pair, Wanted(), "sm_90a")
        assert len(specs) >= 8 and {spec.entry for spec in specs} == {entry}
    wide_q = {spec.entry for spec in flash2_prebuild.specs((576, 64), Wanted(), "sm_80")}
    assert wide_q >= decoding | {"flash2_fwd", "flash2_bwd"}
    assert {s.entry for s in planner.specs((576, 64), Wanted(), "sm_90a")} == {"hopper_fwd"}


def test_features_and_dtypes_choose_kernels() -> None:
    def constants(*features: str, dtypes: tuple[str, ...] = ("bf16",)) -> list[KernelSpec]:
        wanted = Wanted(((64, 128),), dtypes, headdim.features(features, "test"))
        return flash2_prebuild.specs((64, 128), wanted, "sm_120")

    plain = constants("causal", "dense")
    assert [spec.entry for spec in plain] == ["flash2_fwd"] and plain[0]["causal"]
    assert {spec["bf16"] for spec in constants("causal", dtypes=("fp16",))} == {False}
    assert any(spec["local"] for spec in constants("local", "dense"))
    assert {spec["varlen_q"] for spec in constants("full")} == {False, True}
    for extra in ("softcap", "alibi", "dropout"):
        assert {bool(spec[extra]) for spec in constants("full", extra)} == {False, True}
    backward = constants("full", "dense", "backward", "deterministic")
    assert {s["deterministic"] for s in backward if s.entry == "flash2_bwd"} == {False, True}


def test_features_choose_kernels_of_the_hopper_backward() -> None:
    hopper_tree.load()
    planner = importlib.import_module("flash_attn_3.prebuild")

    def constants(*features: str, dims: tuple[int, int] = (64, 128)) -> list[KernelSpec]:
        wanted = Wanted((dims,), ("bf16",), headdim.features(features, "test"))
        return planner.specs(dims, wanted, "sm_90a")

    assert {spec.entry for spec in constants("causal", "dense", "decode")} == {"hopper_fwd"}
    backward = constants("causal", "dense", "backward", "deterministic")
    entries = {spec.entry for spec in backward} - {"hopper_fwd"}
    assert entries == {"hopper_bwd", *(f"flash2_bwd_{x}" for x in ("preprocess", "convert", "sum"))}
    assert all(spec["programmatic"] for spec in backward if spec.entry.startswith("flash2"))
    assert {spec["ordered"] for spec in backward if spec.entry == "hopper_bwd"} == {False, True}
    assert {spec.arch for spec in backward} == {"sm_90a"}
    for extra in ("local", "softcap", "alibi", "dropout"):
        main = [s for s in constants("full", "dense", "backward", extra) if s.entry == "hopper_bwd"]
        assert {bool(spec[extra]) for spec in main} == {False, True}
    wide = constants("full", "dense", "backward", dims=(64, 512))  # a forward alone
    assert {spec.entry for spec in wide} == {"hopper_fwd"}


def test_code_for_sm_80_comes_with_the_tiles_that_later_gpus_prefer() -> None:
    """An A10 has less shared memory than an A100; it runs the same machine code."""
    for dims in Wanted().pairs:
        specs = flash2_prebuild.specs(dims, Wanted(), "sm_80")
        assert {spec.arch for spec in specs} == {"sm_80"}
        small = [spec for spec in specs if spec["smem_bytes"] <= 99 * 1024]
        assert {spec.entry for spec in small} == {spec.entry for spec in specs}


def test_gpu_models_with_tables_of_their_own_get_their_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flash_attn_interface._common.tiles import tuned_tiles
    from flash_attn_interface._flash2 import fwd_tiles

    forward = forward_problem((64, 128), torch.bfloat16, 4, False, False)
    tuned = fwd_tiles.ForwardTile(64, 32, 4)
    entry = tuned_tiles.Entry(tuned_tiles.as_record(tuned))
    table = tuned_tiles.Table(
        "NVIDIA X", "sm_80", "a test", {tuned_tiles.key("flash2", "fwd", forward): entry}
    )
    tuned_tiles.write(tmp_path / tuned_tiles.file_name("sm_80", "NVIDIA X"), table)
    monkeypatch.setenv(env.TUNED_TILES.name, str(tmp_path))
    tuned_tiles.forget()
    wanted = Wanted(features=("full", "dense"), dtypes=("bf16",))
    specs = flash2_prebuild.specs((64, 128), wanted, "sm_80")
    assert fwd_tiles.forward_spec(forward, "sm_80", tuned) in specs
    assert (
        fwd_tiles.forward_spec(forward, "sm_80", fwd_tiles.forward_tile(forward, "sm_80")) in specs
    )
    tuned_tiles.forget()


@pytest.mark.parametrize(
    ("tree", "arch"), [("flash_attn_interface._flash2", "sm_80"), ("flash_attn_3", "sm_90a")]
)
def test_planning_a_build_needs_no_torch(tree: str, arch: str, tmp_path: Path) -> None:
    hopper_tree.load()
    planner = importlib.import_module(f"{tree}.prebuild")
    packages = {**PACKAGES, "flash_attn_3": hopper_tree.FOLDER}
    program = f"""
import sys
sys.modules["torch"] = None
sys.path.insert(0, {str(PACKAGES["flash_attn_interface._common"])!r})
import bare_packages
del sys.path[0]
packages = {[(name, str(folder)) for name, folder in packages.items()]!r}
prebuild = bare_packages.load_prebuild(dict(packages))
trees = prebuild.Trees(["{tree}.prebuild"], dict(packages))
print(len(trees.specs(prebuild.Wanted(((64, 128),)), ["{arch}"])))
"""
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert int(answer.stdout) == len(planner.specs((64, 128), Wanted(), arch))


# ---- how --------------------------------------------------------------------------------------


@pytest.fixture
def trees(tiny_tree: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trees]:
    """A tree whose planner wants one kernel for each pair: kernels that compile in no time."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    if not prebuild._ninja():
        pytest.skip("ninja is not installed")

    class Planner:
        @staticmethod
        def specs(pair: tuple[int, int], wanted: Wanted, arch: str) -> list[KernelSpec]:
            return [tiny_spec(arch, num_threads=32 * pair[0])]

    monkeypatch.setitem(sys.modules, "tiny_planner", Planner)
    for variable in (env.SKIP_CUDA_BUILD, env.MAX_JOBS):
        monkeypatch.delenv(variable.name, raising=False)
    yield Trees(["tiny_planner"], PACKAGES, {"tiny": tiny_tree})


def listing(tmp_path: Path, *pairs: int) -> Path:
    path = tmp_path / "headdim.json"
    path.write_text(json.dumps([[pair, pair] for pair in pairs]))
    return path


def installed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("tiny"))


def test_only_what_is_missing_is_compiled(
    trees: Trees, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(env.CUDA_ARCHS.name, "80")
    store, package = tmp_path / "build", tmp_path / "package"

    def install(*pairs: int) -> str:
        prebuild.install(trees, listing(tmp_path, *pairs), package, store)
        return capfd.readouterr().out

    told = install(1, 2)
    assert "compiling 2 of 2 kernels" in told and "[2/2, " in told
    assert installed(package) == installed(store) and len(installed(store)) == 2
    built = {path: path.stat().st_mtime_ns for path in package.rglob("*.cubin")}

    assert "all 2 kernels are up to date" in install(1, 2)
    assert {path: path.stat().st_mtime_ns for path in package.rglob("*.cubin")} == built

    assert "compiling 1 of 2 kernels" in install(1, 3)
    assert len(installed(package)) == 2 and len(installed(store)) == 3
    assert "all 2 kernels are up to date" in install(1, 2)
    assert (package / cubins.CONTENTS).read_text().startswith("2 kernels for sm_80")

    (trees.roots["tiny"] / "op.cuh").write_text(OP + "// edited\n")
    sources.read.cache_clear()
    assert "compiling 2 of 2 kernels" in install(1, 2)
    assert len(installed(package)) == 2


def test_damaged_results_are_compiled_or_copied_again(
    trees: Trees, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.CUDA_ARCHS.name, "80")
    store, package = tmp_path / "build", tmp_path / "package"
    prebuild.install(trees, listing(tmp_path, 1), package, store)
    (cubin,) = package.rglob("*.cubin")
    good = cubin.read_bytes()
    cubin.write_bytes(good[:100])
    prebuild.install(trees, listing(tmp_path, 1), package, store)
    assert cubin.read_bytes() == good
    for damaged in (cubin, *store.glob("tiny*/*.cubin")):
        damaged.write_bytes(b"")
    prebuild.install(trees, listing(tmp_path, 1), package, store)
    assert cubin.read_bytes() == good


def test_skipping_leaves_nothing_behind(
    trees: Trees, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.CUDA_ARCHS.name, "80")
    package = tmp_path / "package"
    prebuild.install(trees, listing(tmp_path, 1), package, tmp_path / "build")
    assert package.is_dir()
    monkeypatch.setenv(env.SKIP_CUDA_BUILD.name, "TRUE")
    prebuild.install(trees, tmp_path / "absent.json", package, tmp_path / "build")
    assert not package.exists()
    assert prebuild.build_requires() == []


def test_a_kernel_that_does_not_compile_ends_the_build(
    trees: Trees, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(env.CUDA_ARCHS.name, "80")
    (trees.roots["tiny"] / "op.cuh").write_text("#error not today\n")
    sources.read.cache_clear()
    with pytest.raises(SystemExit, match="error: kernels could not be compiled"):
        prebuild.install(trees, listing(tmp_path, 1), tmp_path / "package", tmp_path / "build")
    told = "".join(capfd.readouterr())
    assert "not today" in told and "tiny-scale-sm_80" in told
    assert not (tmp_path / "package").exists()


def test_a_full_disk_ends_the_build_and_leaves_nothing_half_written(
    trees: Trees, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiling processes may write less than a kernel's size to a file."""
    monkeypatch.setenv(env.CUDA_ARCHS.name, "80")
    ninja = prebuild._ninja()
    limited = ["bash", "-c", 'ulimit -f 1; trap "" XFSZ; exec "$@"', "-", *ninja]
    monkeypatch.setattr(prebuild, "_ninja", lambda: limited)
    with pytest.raises(SystemExit, match="error: kernels could not be compiled"):
        prebuild.install(trees, listing(tmp_path, 1), tmp_path / "package", tmp_path / "build")
    assert not (tmp_path / "package").exists()
    assert [p.name for p in (tmp_path / "build").iterdir() if not p.name.startswith(".")] == []


def test_bad_listings_end_the_build(trees: Trees, tmp_path: Path) -> None:
    path = tmp_path / "headdim.json"
    path.write_text("[[64, 128], [64, 1280]]")
    with pytest.raises(SystemExit, match=r"error: headdim.json: pairs\[1\] is \[64, 1280\]"):
        prebuild.install(trees, path, tmp_path / "package", tmp_path / "build")


def test_without_a_compiler_the_build_says_what_to_do(
    trees: Trees, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prebuild.compiler, "load_nvrtc", _no_nvrtc)
    with pytest.raises(SystemExit, match="no NVRTC(.|\n)*FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE"):
        prebuild.install(trees, listing(tmp_path, 1), tmp_path / "package", tmp_path / "build")


def _no_nvrtc() -> None:
    raise prebuild.compiler.MissingCompilerError("no NVRTC")


def test_without_ninja_the_build_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(prebuild.shutil, "which", lambda name: "/bin/ninja")
    assert prebuild._ninja() == ["/bin/ninja"]
    monkeypatch.setattr(prebuild.shutil, "which", lambda name: None)
    with pytest.raises(PrebuildError, match="pip install ninja"):
        prebuild._ninja()


@pytest.mark.parametrize(
    ("chosen", "cpus", "files", "expected"),
    [
        ("3", 8, {}, 3),
        ("", 8, {}, 8),
        ("", 8, {"/proc/meminfo": "MemTotal: 99999999 kB\nMemAvailable: 2097152 kB\n"}, 5),
        ("", 8, {"/proc/meminfo": "MemAvailable: 1024 kB\n"}, 1),
        ("", 8, {"/sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ("", 8, {"/sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        (
            "",
            8,
            {
                "/sys/fs/cgroup/memory.max": "2147483648\n",
                "/sys/fs/cgroup/memory.current": "1073741824\n",
            },
            2,
        ),
        ("", 8, {"/sys/fs/cgroup/memory.max": "max\n", "/sys/fs/cgroup/memory.current": "1\n"}, 8),
    ],
)
def test_jobs_follow_cpus_and_memory(
    chosen: str,
    cpus: int,
    files: dict[str, str],
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(env.MAX_JOBS.name, chosen)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)), raising=False)
    monkeypatch.setattr(prebuild, "_lines", lambda path: files.get(path, "").splitlines())
    assert prebuild.jobs() == expected


def test_the_package_folder_is_found_by_the_runtime() -> None:
    folder = Path(flash_attn_interface.__file__).parent / "_prebuilt"
    assert sources.prebuilt_folder("flash2") == folder
