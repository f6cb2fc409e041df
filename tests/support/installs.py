"""Builds and installs the distributions for tests: offline, from a copy of the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SKIP_CUDA_BUILD = "FLASH_ATTENTION_SKIP_CUDA_BUILD"


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed. Nothing is prebuilt unless asked for."""
    result = attempt(*command, cwd=cwd, **environment)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def attempt(
    *command: str | Path, cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """As `run`, whatever the exit status."""
    own = ("PYTHONPATH", "PYTEST_CURRENT_TEST", "MAX_JOBS", "FLASH_ATTN_CUDA_ARCHS")
    clean = {k: v for k, v in os.environ.items() if k not in own}
    clean[SKIP_CUDA_BUILD] = "TRUE"
    return subprocess.run(
        command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, check=False
    )


def not_source(folder: str, names: list[str]) -> set[str]:
    """What a checkout holds besides the sources: environments, caches, build results."""
    hidden = {n for n in names if n.startswith(".")} - {".ci", ".clang-format"}
    built = {n for n in names if n.endswith(".egg-info")}
    return hidden | built | {"build", "dist", "__pycache__", "_prebuilt"}


def copy_checkout(target: Path) -> Path:
    """Building in place would leave build/ and *.egg-info behind."""
    shutil.copytree(ROOT, target, ignore=not_source)
    return target


def build_wheel(source: Path, out: Path, **environment: str) -> tuple[Path, str]:
    """(the wheel, what its build said), with this environment's build tools."""
    pip = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation"]
    result = attempt(*pip, "--no-index", "-w", out, source, cwd=source, **environment)
    told = result.stdout + result.stderr
    assert result.returncode == 0, told
    (wheel,) = out.glob("*.whl")
    return wheel, told


class Environment:
    """A fresh virtual environment that sees the packages of this one, but no editable install."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True, with_pip=False)
        self.python = folder / "bin" / "python"
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.site = Path(run(self.python, "-c", where, cwd=folder).strip())
        outer = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        # On the path, but not as site folders: their .pth files, editable installs, stay unread.
        (self.site / "outer.pth").write_text("\n".join([*outer, ""]), encoding="utf-8")

    def run(self, *arguments: str | Path, cwd: Path, **environment: str) -> str:
        """Python with these arguments, as `run`."""
        return run(self.python, *arguments, cwd=cwd, **environment)

    def pip(self, *arguments: str | Path, **environment: str) -> str:
        """pip of this environment, installing into the other."""
        command = [sys.executable, "-m", "pip", "--python", self.python, *arguments]
        return run(*command, cwd=self.site, **environment)
