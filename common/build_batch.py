"""`python build_batch.py JOB.json FIRST END`: compiles some kernels into a folder, without torch.

What ninja runs for `prebuild.py`, which writes JOB.json::

    {"packages": {import name: folder}, "roots": {include root: folder},
     "out": folder, or null for this user's cache, "specs": [KernelSpec.as_dict(), ...]}
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path


def main(job_path: str, first: str, end: str) -> int:
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    here = str(Path(__file__).resolve().parent)
    bare_packages = importlib.import_module("bare_packages")
    # Python put this folder there, whose `cache.py` and `env.py` no other module should find.
    sys.path[:] = [entry for entry in sys.path if str(Path(entry or ".").resolve()) != here]
    bare_packages.load(job["packages"])
    package = "flash_attn_interface._common"
    cache, compiler, sources, spec = (
        importlib.import_module(f"{package}.{name}")
        for name in ("cache", "compiler", "sources", "spec")
    )
    for name, folder in job["roots"].items():
        sources.register_root(name, folder)
    try:
        for record in job["specs"][int(first) : int(end)]:
            wanted = spec.KernelSpec.from_dict(record)
            if job["out"] is None:
                cache.default_kernels().image(wanted, announce=False)
            else:
                cache.prebuild(wanted, Path(job["out"]))
    except (compiler.CompileError, compiler.MissingCompilerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
