"""One fresh process: what its way to the first result takes. Prints seconds as JSON.

    python benchmarks/cold_start.py 64x128

Run by bench_host_overhead.py, as a program of its own: nothing but the standard library may be
imported before the clock runs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

_clock = time.perf_counter


class Stages:
    """Seconds by stage. A stage inside another counts for itself only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside: list[float] = []

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time added to a stage."""

        def call(*arguments: Any, **options: Any) -> Any:
            self._inside.append(0.0)
            started = _clock()
            try:
                return function(*arguments, **options)
            finally:
                took = _clock() - started
                self.add(name, took - self._inside.pop())
                if self._inside:
                    self._inside[-1] += took

        return call

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def watch(self, name: str, owner: Any, *functions: str) -> None:
        for function in functions:
            setattr(owner, function, self.timed(name, getattr(owner, function)))


def main(dims: str) -> None:
    head_dim_qk, _, head_dim_v = dims.partition("x")
    stages, started = Stages(), _clock()

    def lap(name: str) -> None:
        nonlocal started
        stages.add(name, _clock() - started)
        started = _clock()

    import torch

    lap("import_torch")
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    lap("cuda_context")
    from flash_attn_interface import flash_attn_func

    lap("import_package")
    shapes = [(1, 64, 2, int(d)) for d in (head_dim_qk, head_dim_qk, head_dim_v or head_dim_qk)]
    q, k, v = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes)
    torch.cuda.synchronize()
    started = _clock()
    _watch_the_first_call(stages)
    lap("import_runtime")
    with torch.no_grad():
        stages.timed("other", flash_attn_func)(q, k, v, causal=True)
        issued = _clock() - started
        torch.cuda.synchronize()
        stages.add("wait_for_gpu", _clock() - started - issued)
        first = _clock() - started + stages.seconds["import_runtime"]
        started = _clock()
        flash_attn_func(q, k, v, causal=True)
        torch.cuda.synchronize()
        warm = _clock() - started
    facts = {"first_call": first, "warm_call": warm, "modules": len(sys.modules)}
    print(json.dumps(stages.seconds | facts))


def _watch_the_first_call(stages: Stages) -> None:
    """Splits the first call: imports of the kernel trees, the kernel from its cache or compiler,
    its way into the driver, its launch. What is left over is `other`.

    The imports here are those that the call would begin with, so they are part of it.
    """
    from flash_attn_interface._common.launch import driver, tensor_map
    from flash_attn_interface._common.runtime import cubins
    from flash_attn_interface.call import backends

    stages.watch("import_trees", backends, "flash2", "hopper")
    stages.watch("fetch_kernel", cubins.KernelCache, "image")
    stages.watch("import_bindings", driver, "load_bindings")
    stages.watch("load_module", driver.DeviceKernel, "__init__", "prepare")
    stages.watch("launch", driver.DeviceKernel, "launch")
    stages.watch("tensor_maps", tensor_map, "encode")


if __name__ == "__main__":
    main(sys.argv[1])
