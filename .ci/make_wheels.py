"""Builds the wheels of both distributions and tries them: `python .ci/make_wheels.py dist`.

One wheel of each serves every torch, every Python from 3.10 on, and x86-64 as well as arm64: they
hold Python, sources, and machine code of GPUs. A wheel is good if its tag says so, it is below
MOST_BYTES, it holds the kernels of headdim.json, and both work in an environment that has nothing
but them and what they require, away from the checkout: imports, the report with its self-check
(without a GPU in the simulator, which needs g++), and every listed pair of head dims found
prebuilt.

Kernels stay in build/prebuilt, so that a second run compiles only what changed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = 40 * 2**20
WHEELS = {"flash_attn": ROOT, "flash_attn_3": ROOT / "hopper"}  # name -> folder of its setup.py

# Runs in the bare environment. The Hopper tree's kernels are looked for as a Hopper GPU would.
PROBE = """
import sys
import flash_attn, flash_attn_3, flash_attn_interface
from flash_attn_interface import explain

missing = []
for qk, v in {pairs}:
    for arch, backend in (("sm_80", "flash2"), ("sm_90", "hopper")):
        for causal in (False, True):
            shapes = ((2, 512, 8, qk), (2, 512, 8, qk), (2, 512, 8, v))
            found = explain(*shapes, causal=causal, arch=arch)
            if found.backend != backend or found.cache_state != "prebuilt":
                missing.append(f"({{qk}}, {{v}}) for {{arch}}, causal {{causal}}: {{found}}")
sys.exit("\\n".join(missing) or None)
"""


def build(name: str, folder: Path, out: Path) -> Path:
    """The wheel. What an earlier build copied goes first: it may hold files that are gone."""
    shutil.rmtree(folder / "build/lib", ignore_errors=True)
    for old in out.glob(f"{name}-[0-9]*.whl"):
        old.unlink()
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FLASH_ATTN_")}
    kept.pop("FLASH_ATTENTION_SKIP_CUDA_BUILD", None)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", out, folder], cwd=folder, env=kept, check=True)
    (wheel,) = out.glob(f"{name}-[0-9]*.whl")
    return wheel


def faults(wheel: Path, size: int, names: list[str]) -> list[str]:
    """What is wrong with a wheel of this size that holds these files."""
    found = []
    if not wheel.name.endswith("-py3-none-any.whl"):
        found.append(f"{wheel.name} is not for every Python and machine")
    if size >= MOST_BYTES:
        found.append(
            f"{wheel.name} has {size / 2**20:.1f} MiB, at most {MOST_BYTES >> 20} are good"
        )
    if not any("/_prebuilt/" in name and name.endswith(".cubin") for name in names):
        found.append(f"{wheel.name} holds no prebuilt kernel")
    if strange := [name for name in names if name.endswith((".so", ".pyc", ".o"))]:
        found.append(f"{wheel.name} holds {', '.join(strange)}")
    return found


def clean_environment(folder: Path) -> dict[str, str]:
    """Without this checkout's path and settings, with caches of its own."""
    env = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("FLASH_ATT", "PYTHON", "VIRTUAL_ENV"))
    }
    return {**env, "FLASH_ATTN_INTERFACE_CACHE_DIR": str(folder / "cache")}


def check_installed(wheels: list[Path], pairs: list[list[int]]) -> None:
    """CalledProcessError unless the wheels work in a fresh environment."""
    with tempfile.TemporaryDirectory(prefix="flash-attn-wheels-") as temporary:
        folder = Path(temporary)
        env = clean_environment(folder)
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv/bin/python"
        torch = os.environ.get("TORCH", "torch")
        pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "-q"]
        subprocess.run([*pip, torch, *wheels], cwd=folder, env=env, check=True)
        subprocess.run([*pip[:3], "check"], cwd=folder, env=env, check=True)
        program = PROBE.format(pairs=pairs)
        subprocess.run([python, "-c", program], cwd=folder, env=env, check=True)
        subprocess.run([python, "-m", "flash_attn_interface"], cwd=folder, env=env, check=True)


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "dist").resolve()
    out.mkdir(parents=True, exist_ok=True)
    wheels = [build(name, folder, out) for name, folder in WHEELS.items()]
    found = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            found += faults(wheel, wheel.stat().st_size, archive.namelist())
        print(f"[wheels] {wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB", flush=True)
    if found:
        sys.exit("\n".join(found))
    listing = json.loads((ROOT / "headdim.json").read_text(encoding="utf-8"))
    pairs = listing if isinstance(listing, list) else listing["pairs"]
    check_installed(wheels, pairs)
    print(f"[wheels] both are good: {out}")


if __name__ == "__main__":
    main()
