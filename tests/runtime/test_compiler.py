"""NVRTC compilation: results, reports and messages. Needs the NVRTC wheel, no GPU."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from tiny_kernels import tiny_spec, tiny_tree

from flash_attn_interface._common.runtime import arch, compiler, sass, sources
from flash_attn_interface._common.runtime.compiler import ResourceUsage
from flash_attn_interface._common.runtime.nvrtc import Nvrtc

__all__ = ["tiny_tree"]


@pytest.fixture
def nvrtc() -> Nvrtc:
    try:
        return compiler.load_nvrtc()
    except compiler.MissingCompilerError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", arch.known_archs())
def test_compiles_for_every_arch(name: str, tiny_tree: Path, nvrtc: Nvrtc) -> None:
    if int(name[3:]) not in nvrtc.nvrtcGetSupportedArchs()[1]:
        pytest.skip(f"this NVRTC does not know {name}")
    compiled = compiler.compile_cubin(tiny_spec(name), sources.resolve("tiny/scale.cu"))
    assert compiled.cubin.startswith(b"\x7fELF")
    assert f"'tiny_scale' for '{name}'" in compiled.log
    assert compiled.seconds > 0
    used = compiled.resources
    assert 8 <= used.registers <= 64
    assert (used.spill_store_bytes, used.spill_load_bytes, used.stack_bytes) == (0, 0, 0)


def test_exactly_the_given_texts_are_compiled(tiny_tree: Path, nvrtc: Nvrtc) -> None:
    texts = sources.resolve("tiny/scale.cu")
    shutil.rmtree(tiny_tree)  # what is on disk no longer matters
    wrong = {**texts, "tiny/op.cuh": '#error "the text that was handed over"\n'}
    compiler.compile_cubin(tiny_spec(), texts)
    with pytest.raises(compiler.CompileError, match="the text that was handed over"):
        compiler.compile_cubin(tiny_spec(), wrong)


def test_an_error_names_the_kernel_and_holds_the_log(tiny_tree: Path, nvrtc: Nvrtc) -> None:
    (tiny_tree / "op.cuh").write_text("__device__ float op(float x, float f) { return x ** f; }\n")
    spec = tiny_spec()
    with pytest.raises(compiler.CompileError) as error:
        compiler.compile_cubin(spec, sources.resolve("tiny/scale.cu"))
    assert spec.describe() in str(error.value)
    assert "tiny/op.cuh(1): error" in str(error.value)
    assert error.value.spec is spec and "error" in error.value.log


def test_an_arch_newer_than_the_compiler_is_named(
    tiny_tree: Path, nvrtc: Nvrtc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(arch._LIMITS, "sm_999", arch._row("sm_999", 228, 2048))
    with pytest.raises(
        compiler.CompileError, match=r"nvrtc \d+\.\d+ cannot compile for sm_999 .*newer NVRTC"
    ):
        compiler.compile_cubin(tiny_spec("sm_999"), sources.resolve("tiny/scale.cu"))


def test_threads_compile_in_parallel(tiny_tree: Path, nvrtc: Nvrtc) -> None:
    texts = sources.resolve("tiny/scale.cu")
    specs = [tiny_spec(num_threads=threads) for threads in (32, 64, 96, 128)]
    cubins: dict[int, bytes] = {}

    def run(index: int) -> None:
        cubins[index] = compiler.compile_cubin(specs[index], texts).cubin

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, spec in enumerate(specs):
        assert cubins[index] == compiler.compile_cubin(spec, texts).cubin


def test_spills_and_stack_are_reported(tiny_tree: Path, nvrtc: Nvrtc) -> None:
    (tiny_tree / "op.cuh").write_text(
        """
__device__ float op(float x, float f) {
  float table[64];
  for (int i = 0; i < 64; ++i) table[i] = x * i;
  for (int i = 0; i < int(f); ++i) table[(i * 7) & 63] += x;
  return table[int(x) & 63];
}
"""
    )
    compiled = compiler.compile_cubin(tiny_spec(), sources.resolve("tiny/scale.cu"))
    assert compiled.resources.stack_bytes == 256
    assert sass.count(compiled.cubin, "tiny_scale", "STL") > 0
    assert sass.count(compiled.cubin, "tiny_scale", "LDL") > 0


@pytest.mark.parametrize(
    "log",
    [
        # CUDA 12
        "ptxas info    : 0 bytes gmem\n"
        "ptxas info    : Compiling entry function 'k' for 'sm_90a'\n"
        "ptxas info    : Function properties for k\n"
        "    40 bytes stack frame, 36 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 3 barriers, 512 bytes cmem[0]\n",
        # CUDA 13
        "ptxas info    : Function properties for k\n"
        "ptxas         .     40 bytes stack frame, 36 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 3 barriers, 40 bytes cumulative stack size\n",
    ],
)
def test_parse_resources(log: str) -> None:
    assert compiler.parse_resources(log) == ResourceUsage(168, 36, 16, 40)


def test_a_log_without_report_is_an_error() -> None:
    with pytest.raises(ValueError, match="no ptxas resource report"):
        compiler.parse_resources("nothing to see")


# ---- the line about slow compiles -------------------------------------------------------------


def test_a_slow_compile_says_so_once_and_before_it_ends(capfd: pytest.CaptureFixture[str]) -> None:
    with compiler.announce_if_slow("compiling flash2-fwd: first use", seconds=0.05):
        time.sleep(0.3)
        during = capfd.readouterr().err
    assert during == "flash_attn_interface: compiling flash2-fwd: first use\n"
    assert capfd.readouterr().err == ""


def test_a_fast_compile_says_nothing(
    tiny_tree: Path, nvrtc: Nvrtc, capfd: pytest.CaptureFixture[str]
) -> None:
    compiler.compile_cubin(tiny_spec(), sources.resolve("tiny/scale.cu"), "first use")
    with compiler.announce_if_slow("nothing", seconds=0.05):
        pass
    time.sleep(0.1)
    captured = capfd.readouterr()
    assert captured.err == "" and "compiling" not in captured.out


def test_a_slow_compile_that_fails_stops_the_clock(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), compiler.announce_if_slow("nothing", seconds=0.05):
        raise RuntimeError
    time.sleep(0.1)
    assert capfd.readouterr().err == ""


# ---- the compiler itself: test_nvrtc.py --------------------------------------------------------


def test_importing_the_runtime_loads_no_cuda() -> None:
    program = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "from flash_attn_interface._common.launch import driver\n"
        "from flash_attn_interface._common.runtime import compiler, cubins, sass\n"
        "print(*[n for n in ('cuda.bindings', 'cuda.bindings.driver', 'filelock')"
        " if n in sys.modules.keys() - before])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("", 0), done.stderr


# ---- instructions -----------------------------------------------------------------------------

INSTRUCTIONS = r"""
#include "prelude.cuh"
using u32 = unsigned;
extern "C" __global__ void tiny_scale(float* p, const u32* a, unsigned long long desc, int n) {
  extern __shared__ u32 staged[];
  const u32 s = (u32)__cvta_generic_to_shared(staged);
  u32 r0, r1, r2, r3;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3) : "r"(s + threadIdx.x * 16));
  float d[4] = {p[0], p[1], p[2], p[3]};
#define MMA(type) asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 " \
    "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) \
    : "r"(r0), "r"(r1), "r"(r2), "r"(r3), "r"(r0), "r"(r1))
  MMA("f16"); MMA("bf16"); MMA("bf16");
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(s), "l"(a), "r"(n));
  asm volatile("cp.async.wait_all;");
  __syncthreads();
  float e; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(d[0]));
  float table[64];
  for (int i = 0; i < 64; ++i) table[i] = p[i] * e;
  for (int i = 0; i < n; ++i) table[(i * 7) & 63] += p[i];
  d[1] += table[n & 63];
  d[2] = fmaxf(__shfl_xor_sync(~0u, d[1], 1), d[3]);
  atomicAdd(p + 9, d[2]);
  staged[threadIdx.x] = atomicAdd((u32*)p + 77, 1u);
  __syncwarp();
  u32 packed; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(d[1]), "f"(d[2]));
  p[threadIdx.x] = __uint_as_float(staged[threadIdx.x ^ 1] + packed);
  if constexpr (Cfg::kWgmma) {
#if __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("wgmma.fence.sync.aligned;");
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, %4, %5, "
                 "1, 1, 1, 0, 0;" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "l"(desc), "l"(desc + 8));
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0,%1,%2,%3}, "
                 "{%4,%5,%6,%7}, %8, 1, 1, 1, 0;" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(r0), "r"(r1), "r"(r2), "r"(r3), "l"(desc + 8));
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;");
    p[5] = d[0] + d[1] + d[2] + d[3];
#endif
  }
}
"""


def _instructions(name: str, tiny_tree: Path, nvrtc: Nvrtc) -> bytes:
    if int(re.sub(r"\D", "", name)) not in nvrtc.nvrtcGetSupportedArchs()[1]:
        pytest.skip(f"this NVRTC does not know {name}")
    (tiny_tree / "scale.cu").write_text(INSTRUCTIONS)
    spec = tiny_spec(name, wgmma=name == "sm_90a")
    return compiler.compile_cubin(spec, sources.resolve("tiny/scale.cu")).cubin


SASS_ARCHS = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"]


@pytest.mark.parametrize("name", SASS_ARCHS)
def test_instruction_counts(name: str, tiny_tree: Path, nvrtc: Nvrtc) -> None:
    cubin = _instructions(name, tiny_tree, nvrtc)

    def count(mnemonic: str) -> int:
        return sass.count(cubin, "tiny_scale", mnemonic)

    assert count("HMMA") == 3
    assert count("HGMMA") == (2 if name == "sm_90a" else 0)
    assert (count("LDSM"), count("LDGSTS"), count("MUFU")) == (1, 1, 1)
    assert (count("RED"), count("ATOMG"), count("F2FP")) == (1, 1, 1)
    assert count("STL") >= 16 and count("LDL") >= 1
    assert count("LDG") > 0 and count("STG") > 0 and count("LDS") > 0 and count("STS") > 0


@pytest.mark.parametrize("name", SASS_ARCHS)
def test_counts_agree_with_nvdisasm(
    name: str, tiny_tree: Path, tmp_path: Path, nvrtc: Nvrtc
) -> None:
    nvdisasm = _find_nvdisasm()
    if nvdisasm is None:
        pytest.skip("nvdisasm is not installed")
    cubin = _instructions(name, tiny_tree, nvrtc)
    path = tmp_path / "kernel.cubin"
    path.write_bytes(cubin)
    listing = subprocess.run([nvdisasm, path], capture_output=True, text=True, check=True).stdout
    mnemonics = re.findall(
        r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", listing, re.MULTILINE
    )
    expected = Counter(mnemonics)
    expected["RED"] += expected["REDG"]  # the newer name
    assert sum(sass.opcode_counts(cubin, "tiny_scale").values()) == len(mnemonics)
    ours = {m: sass.count(cubin, "tiny_scale", m) for m in sass.OPERATIONS}
    assert ours == {m: expected[m] for m in sass.OPERATIONS}


def _find_nvdisasm() -> str | None:
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in Path(folder).glob("*/bin/nvdisasm"):
            return str(path)
    return shutil.which("nvdisasm")


def test_sass_refuses_what_is_no_cubin_or_lacks_the_kernel(tiny_tree: Path, nvrtc: Nvrtc) -> None:
    with pytest.raises(ValueError, match="not a 64-bit ELF file"):
        sass.opcode_counts(b"PTX", "k")
    cubin = compiler.compile_cubin(tiny_spec(), sources.resolve("tiny/scale.cu")).cubin
    with pytest.raises(ValueError, match=r"no section .text.other \(there are .*.text.tiny_scale"):
        sass.opcode_counts(cubin, "other")
