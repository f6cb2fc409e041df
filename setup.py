"""Builds the distribution `flash-attn`: Python, CUDA C++ sources, and the kernels of headdim.json.

All other kernels are compiled from the sources at run time; these here in the same way, ahead of
it, into `flash_attn_interface/_prebuilt` (docs/prebuild.md). NVRTC does that, which is a wheel:
neither torch, nor a GPU, nor a CUDA toolkit is needed. FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE leaves
it out, which installs in seconds.

The metadata stands here, not in pyproject.toml, because setuptools releases from 65 on disagree
about how pyproject.toml spells a licence, and all of them must build this project.

The checkout's folders differ from the import names: `common/` and `flash2/` are installed inside
`flash_attn_interface`, so that no generic top-level name such as `common` reaches an environment.
tests/prebuild/test_packaging.py compares PACKAGES and DATA with the tree.
"""

import ast
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.install_lib import install_lib

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "common"))
from bare_packages import load_prebuild  # noqa: E402

sys.path.pop(0)


def version() -> str:
    """`__version__` of flash_attn_interface/version.py, read as text: importing needs torch."""
    tree = ast.parse((ROOT / "flash_attn_interface/version.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__version__":
            return ast.literal_eval(node.value)
    raise RuntimeError("flash_attn_interface/version.py defines no __version__")


# import name -> folder. One line per folder that holds Python modules.
PACKAGES = {
    "flash_attn": "flash_attn",
    "flash_attn.layers": "flash_attn/layers",
    "flash_attn.losses": "flash_attn/losses",
    "flash_attn.ops": "flash_attn/ops",
    "flash_attn.ops.triton": "flash_attn/ops/triton",
    "flash_attn_interface": "flash_attn_interface",
    **{
        f"flash_attn_interface.{room}": f"flash_attn_interface/{room}"
        for room in (
            "api",
            "call",
            "compat",
            "context_parallel",
            "integrations",
            "layers",
            "reference",
            "tools",
            "tune",
        )
    },
    "flash_attn_interface._common": "common",
    "flash_attn_interface._common.ask": "common/ask",
    "flash_attn_interface._common.features": "common/features",
    "flash_attn_interface._common.launch": "common/launch",
    "flash_attn_interface._common.prebuild": "common/prebuild",
    "flash_attn_interface._common.ptx": "common/ptx",
    "flash_attn_interface._common.runtime": "common/runtime",
    "flash_attn_interface._common.sim": "common/sim",
    "flash_attn_interface._common.tiles": "common/tiles",
    "flash_attn_interface._flash2": "flash2",
}

# Top-level modules that are single files of the checkout's root.
MODULES = ["flash_attn_2_cuda"]

# Files that the runtime reads: device code for NVRTC, simulator code for the host compiler.
DATA = {
    "flash_attn": ["py.typed"],
    "flash_attn_interface": ["py.typed"],
    "flash_attn_interface._common": ["device/*.cuh", "device/params/*.cuh"],
    "flash_attn_interface._common.ptx": ["*.cuh"],
    "flash_attn_interface._common.sim": [
        "ptx/*.cuh",
        *(f"runtime/*.{x}" for x in ("h", "cpp", "S")),
    ],
    "flash_attn_interface._common.tiles": ["tuned/*.json"],
    "flash_attn_interface._flash2": ["*.cu", "device/*.cuh"],
}

# What compiling needs of them; parents first.
KERNEL_PACKAGES = (
    "flash_attn_interface", "flash_attn_interface._common", "flash_attn_interface._flash2",
)  # fmt: skip


class BuildPy(build_py):
    """Adds the prebuilt kernels: to the build folder, or to an editable package's own."""

    def run(self) -> None:
        super().run()
        packages = {name: ROOT / PACKAGES[name] for name in KERNEL_PACKAGES}
        prebuild = load_prebuild(packages)
        prebuild.install(
            prebuild.Trees(["flash_attn_interface._flash2.prebuild"], packages),
            listing=ROOT / "headdim.json",
            destination=self.prebuilt_folder(),
            store=Path(self.get_finalized_command("build").build_base, "prebuilt"),
        )
        if not self.is_editable():
            prebuild.record_sources(self.package_folder(), ROOT)

    def is_editable(self) -> bool:
        return bool(getattr(self, "editable_mode", False))

    def package_folder(self) -> Path:
        return (ROOT if self.is_editable() else Path(self.build_lib)) / "flash_attn_interface"

    def prebuilt_folder(self) -> Path:
        return self.package_folder() / "_prebuilt"

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        kernels = [str(path) for path in self.prebuilt_folder().rglob("*") if path.is_file()]
        record = [str(path) for path in self.package_folder().glob("_source_state.txt")]
        return [*super().get_outputs(include_bytecode), *kernels, *record]


class InstallLib(install_lib):
    """Takes kernels away that an earlier `setup.py install` listed and this one does not."""

    def install(self) -> list[str]:
        prebuild = load_prebuild({name: ROOT / PACKAGES[name] for name in KERNEL_PACKAGES})
        folders = (self.install_dir, self.build_dir)
        prebuild.remove_unlisted(*(Path(f, "flash_attn_interface", "_prebuilt") for f in folders))
        return super().install()


def build_requires() -> list[str]:
    """What an isolated build (PEP 517) has to install first; nobody else asks."""
    if "setuptools.build_meta" not in sys.modules:
        return []
    prebuild = load_prebuild({name: ROOT / PACKAGES[name] for name in KERNEL_PACKAGES})
    return prebuild.build_requires()


# NVIDIA publishes nothing for it; the reference runs there.
NOT_MACOS = 'platform_system != "Darwin"'

REQUIRES = [
    "torch>=2.5",
    "numpy",
    # Lower bounds only: torch pins the exact releases that it was built with, and those are kept.
    f"cuda-bindings>=12.9; {NOT_MACOS}",
    f"nvidia-cuda-nvrtc>=13.0; {NOT_MACOS}",
    "ninja",
    "packaging",
    "filelock",
]

EXTRAS = {
    # For drivers of the CUDA 12 generation, which refuse cubins made by CUDA 13's compiler. Bounds
    # so wide that each torch built for CUDA 12, which pins the compiler, keeps its own: 12.4 is
    # that of torch 2.5 and 2.6. GPUs from sm_100 on need 12.8.
    "cu12": ["cuda-bindings>=12.9,<13", "nvidia-cuda-nvrtc-cu12>=12.4"],
    "test": [
        "pytest>=7.4",
        "pytest-xdist>=3.2",
        "hypothesis>=6.80",
        f"nvidia-cuda-nvdisasm>=13.0; {NOT_MACOS}",  # to check our own reading of cubins
        'transformers>=5.24; python_version >= "3.11"',  # 14 MB; its tests are skipped without
        "kernels>=0.17",
    ],
    # Formatters change their minds between releases: one release line each, so that all agree.
    "lint": ["ruff==0.17.*", "mypy==2.4.*", "clang-format==23.1.*"],
    "bench": ["matplotlib>=3.7"],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=1.0"],
}

setup(
    name="flash-attn",
    version=version(),
    description="Exact attention for any pair of head dims, specialised at run time; "
    "drop-in for FlashAttention-2 and -3 imports",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    classifiers=[
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    packages=list(PACKAGES),
    py_modules=MODULES,
    package_dir=PACKAGES,
    package_data=DATA,
    cmdclass={"build_py": BuildPy, "install_lib": InstallLib},
    setup_requires=build_requires(),
    include_package_data=False,  # DATA is the whole list; MANIFEST.in is for source archives
    zip_safe=False,  # g++ and NVRTC are given real paths and real files
)
