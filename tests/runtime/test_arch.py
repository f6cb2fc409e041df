"""Hardware limits and the choice of architecture; ptxas serves as the oracle for what it knows."""

from __future__ import annotations

from typing import Any

import pytest

from flash_attn_interface._common.runtime import arch


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_87"),
        ((8, 8), "sm_87"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_103"),
        ((11, 0), "sm_110"),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_121"),
    ],
)
def test_arch_of(capability: tuple[int, int], name: str) -> None:
    assert arch.arch_of(capability) == name


@pytest.mark.parametrize("capability", [(7, 5), (6, 1), (13, 0)])
def test_unsupported_devices_are_refused_with_a_way_out(capability: tuple[int, int]) -> None:
    with pytest.raises(
        NotImplementedError, match=r"compute capability \d+\.\d .*sm_80.*CPU tensors"
    ):
        arch.arch_of(capability)


def test_limits_accept_suffixes_and_refuse_unknown_names() -> None:
    assert arch.limits("sm_90a") is arch.limits("sm_90")
    assert arch.limits("sm_120f") is arch.limits("sm_120")
    with pytest.raises(ValueError, match=r"unknown architecture 'sm_75' \(known: sm_80, "):
        arch.limits("sm_75")


@pytest.mark.parametrize("name", [80, None, 9.0, (9, 0), ["sm_80"], b"sm_80", "", "sm_80aa", "a"])
def test_what_is_no_name_of_an_architecture_is_a_value_error(name: object) -> None:
    with pytest.raises(ValueError, match=r"unknown architecture .*known: sm_80"):
        arch.limits(name)  # type: ignore[arg-type]


def test_published_shared_memory_sizes() -> None:
    sizes = {name: arch.limits(name).max_smem_per_cta for name in arch.known_archs()}
    assert sizes["sm_80"] == 166912 and sizes["sm_86"] == 101376
    assert sizes["sm_90"] == 232448 and sizes["sm_100"] == 232448
    assert sizes["sm_120"] == 101376


def test_resident_ctas_by_shared_memory_and_threads() -> None:
    a100 = arch.limits("sm_80")
    assert a100.max_ctas_per_sm(80 * 1024, 128) == 2
    assert a100.max_ctas_per_sm(82 * 1024, 128) == 1  # each CTA costs one KiB more
    assert a100.max_ctas_per_sm(0, 512) == 4
    assert a100.max_ctas_per_sm(a100.max_smem_per_cta, 128) == 1
    assert a100.max_ctas_per_sm(a100.max_smem_per_cta + 1, 128) == 0


@pytest.mark.parametrize("name", arch.known_archs())
def test_threads_per_sm_agree_with_ptxas(name: str) -> None:
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    if int(name[3:]) not in nvrtc.nvrtcGetSupportedArchs()[1]:
        pytest.skip(f"this NVRTC does not know {name}")
    # ptxas complains where the CTAs that it shall keep resident have more threads than the SM.
    fitting = arch.limits(name).max_threads_per_sm // 512
    assert "threads per SM" not in _ptxas_log(nvrtc, name, ctas=fitting)
    assert "threads per SM" in _ptxas_log(nvrtc, name, ctas=fitting + 1)


def _ptxas_log(nvrtc: Any, name: str, ctas: int) -> str:
    text = f'extern "C" __global__ void __launch_bounds__(512, {ctas}) k(float* p) {{ *p = 1; }}'
    _, program = nvrtc.nvrtcCreateProgram(text.encode(), b"k.cu", 0, [], [])
    options = [f"--gpu-architecture={name}".encode(), b"--ptxas-options=-v"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    assert int(status) == 0
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytearray(size)
    nvrtc.nvrtcGetProgramLog(program, log)
    return log.decode()
