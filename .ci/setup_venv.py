"""Prepares `.venv/` for the Makefile: `python3 .ci/setup_venv.py .venv EXTRA [EXTRA...]`.

Runs in the user's own Python and needs its standard library only. Which torch is used, in this
order:

1. $TORCH, a pip requirement, for whoever wants a certain one (`make test TORCH=torch==2.12.0`);
2. the torch of the Python that runs this script, if it imports (and sees the GPU where there is
   one). Its site-packages are appended to the environment's path, so nothing is downloaded twice;
3. on a machine with an NVIDIA GPU the current torch, or the last one for CUDA 12 under an older
   driver;
4. else CPU_TORCH, whose CPU build pip prefers where one is offered. A CUDA build works too.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_TORCH = "torch==2.13.0"
CUDA12_TORCH = "torch<2.11"  # later releases are built for CUDA 13 only
BUILD_TOOLS = ["setuptools>=65", "wheel"]

PROBE = """
import sys, torch
if {gpu} and not torch.cuda.is_available(): sys.exit("its torch does not see the GPU")
print(torch.__version__)
"""


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def driver_cuda_major() -> int | None:
    """Newest CUDA major version that the NVIDIA driver speaks, or None where there is no GPU."""
    version = driver_version()
    if version is not None:
        return version // 1000
    if shutil.which("nvidia-smi") is None:
        return None
    answer = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        return None
    found = re.search(r"CUDA(?: \w+)? Version:\s*(\d+)", answer.stdout)
    return int(found.group(1)) if found else 13


def driver_version() -> int | None:
    """E.g. 12040, from the driver itself; None without one, or without a GPU that it serves."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        version, count = ctypes.c_int(), ctypes.c_int()
        if cuda.cuInit(0) or cuda.cuDriverGetVersion(ctypes.byref(version)):
            return None
        if cuda.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value


def inheritable_torch(gpu: bool) -> str | None:
    """Version of a working torch in the Python that runs this script, or None."""
    answer = subprocess.run(
        [sys.executable, "-c", PROBE.format(gpu=gpu)], capture_output=True, text=True, check=False
    )
    if answer.returncode == 0:
        return answer.stdout.strip()
    if "No module named 'torch'" not in answer.stderr:
        reason = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
        say(f"not reusing torch of {sys.executable}: {reason}")
    return None


def inherit_site_packages(venv: Path, python: Path) -> None:
    """Appends this Python's site-packages to the environment's path, after the environment's own.

    `--system-site-packages` would not do: started from another virtual environment it links the
    interpreter below that one, which lacks the packages.
    """
    folders = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    lines = [f"import site; site.addsitedir({folder!r})" for folder in folders]
    Path(own, "inherited_site_packages.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")


def create(venv: Path) -> Path:
    """Makes the environment, or keeps a working one of the same Python; returns its interpreter."""
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    version = "import sys; print(sys.version_info[:2])"
    if python.exists():
        answer = subprocess.run(
            [python, "-c", version], capture_output=True, text=True, check=False
        )
        if answer.stdout.strip() == str(sys.version_info[:2]):
            return python
        say(f"{venv} was made with another Python: making it anew")
        shutil.rmtree(venv)
    answer = subprocess.run([sys.executable, "-m", "venv", str(venv)], check=False)
    if answer.returncode != 0:
        shutil.rmtree(venv, ignore_errors=True)
        sys.exit(
            f"[setup] {sys.executable} cannot make virtual environments. On Debian and Ubuntu "
            f"install python{sysconfig.get_python_version()}-venv, or name another Python: "
            "make PYTHON=..."
        )
    return python


def pip_install(python: Path, *arguments: str) -> bool:
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "-qq", *arguments]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def has_module(python: Path, name: str) -> bool:
    return subprocess.run([python, "-c", f"import {name}"], capture_output=True).returncode == 0


def default_torch(cuda_major: int | None) -> str:
    """What to ask pip for, by the driver."""
    if cuda_major is None:
        return CPU_TORCH
    return "torch" if cuda_major >= 13 else CUDA12_TORCH


def extras_for(cuda_major: int | None, extras: list[str]) -> list[str]:
    """The project's extras: also CUDA 12's compiler under a driver that refuses CUDA 13's code."""
    return [*extras, "cu12"] if cuda_major is not None and cuda_major < 13 else extras


def install_torch(python: Path, cuda_major: int | None) -> None:
    wanted = os.environ.get("TORCH")
    if not wanted and has_module(python, "torch"):
        return
    requirement = wanted or default_torch(cuda_major)
    say(f"installing {requirement} (the largest download: one to several minutes)")
    if pip_install(python, requirement):
        return
    if wanted or requirement == "torch" or not pip_install(python, "torch"):
        sys.exit(f"[setup] could not install {requirement}; choose one with make TORCH=torch==...")


def main() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036 (the user's own Python may be any)
        sys.exit(f"[setup] Python 3.10 or newer is needed, this is {sys.version.split()[0]}")
    venv, extras = Path(sys.argv[1]), sys.argv[2:]
    started = time.monotonic()
    cuda_major = driver_cuda_major()
    inherited = None if os.environ.get("TORCH") else inheritable_torch(cuda_major is not None)

    say(f"{venv} with Python {sys.version.split()[0]}, GPU: {'yes' if cuda_major else 'no'}")
    python = create(venv)
    if inherited:
        say(f"reusing torch {inherited} of {sys.executable}")
        inherit_site_packages(venv, python)
    install_torch(python, cuda_major)

    extras = extras_for(cuda_major, extras)
    # Compiling what the tests ask for, when they ask for it, is quicker than headdim.json.
    os.environ.setdefault("FLASH_ATTENTION_SKIP_CUDA_BUILD", "TRUE")
    say(f"installing this project, editable, with its dependencies ({', '.join(extras)})")
    target = f".[{','.join(extras)}]"
    # Build tools come from the environment: no second download of them for an isolated build.
    if not pip_install(python, *BUILD_TOOLS):
        sys.exit("[setup] could not install setuptools and wheel (messages above)")
    if not pip_install(python, "--no-build-isolation", "-e", target):
        # Without a network, an inherited Python that holds what matters is enough.
        if not inherited or not pip_install(python, "--no-build-isolation", "--no-deps", "-e", "."):
            sys.exit("[setup] could not install the project and its dependencies (messages above)")
        say(f"WITHOUT the missing dependencies named above; using what {sys.executable} has")
    say(f"done in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
