"""Sixteen processes call a function at once and none of them finds a kernel: each is built once,
and all results are right. Kernels of the simulator; test_cache.py does the same with NVRTC's.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

PROCESSES = 16


def process(folder: str, go: Any, results: Any) -> None:
    try:
        results.put(first_call(folder, go))
    except Exception as error:
        results.put(error)


def first_call(folder: str, go: Any) -> tuple[list[str], float]:
    """In a process of its own: (what it built, largest error of its result)."""
    os.environ["FLASH_ATTN_INTERFACE_CACHE_DIR"] = folder
    os.environ["FLASH_ATTN_INTERFACE_SIM_THREADS"] = "1"
    torch.set_num_threads(1)
    import flash_attn_interface
    from flash_attn_interface._common.sim import build
    from flash_attn_interface.reference.forward import attention_reference

    built: list[str] = []
    compile_object = build._compile

    def counted(label: str, *arguments: Any) -> Any:
        built.append(label)
        return compile_object(label, *arguments)

    setattr(build, "_compile", counted)  # noqa: B010
    torch.manual_seed(os.getpid())
    q, k, v = (torch.randn(1, 20, 1, dim).half() for dim in (8, 8, 16))
    want, _, _ = attention_reference(q.float(), k.float(), v.float(), causal=True)
    go.wait()
    with flash_attn_interface.simulate("sm_80"):
        out = flash_attn_interface.flash_attn_func(q, k, v, causal=True)
    return built, float((out.float() - want).abs().max())


@pytest.mark.sim
def test_sixteen_processes_with_a_cold_cache(tmp_path: Path) -> None:
    # A server that has imported everything and run nothing; each process is a fork of it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "flash_attn_interface", __name__])
    go, results = context.Event(), context.Queue()
    arguments = (str(tmp_path / "cache"), go, results)
    processes = [context.Process(target=process, args=arguments) for _ in range(PROCESSES)]
    for started in processes:
        started.start()
    go.set()
    found = []
    for _ in processes:
        result = results.get(timeout=240)
        if isinstance(result, Exception):
            raise result
        found.append(result)
    for started in processes:
        started.join()
    builds = Counter(label for built, _ in found for label in built)
    assert any(label.startswith("simulated-flash2-fwd-") for label in builds)
    assert set(builds.values()) == {1}, builds
    assert max(error for _, error in found) < 0.01
