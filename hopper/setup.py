"""Builds the distribution `flash-attn-3`: the Hopper kernels, found by `flash_attn_interface`.

Nothing is compiled here; see the checkout's main setup.py for that and for why the metadata stands
here. This folder is the import package `flash_attn_3`.

Clients believe in FlashAttention-3 if a distribution of this name and version declares
`flash_attn_interface` among its top-level names. The files of that package belong to the main
distribution alone, so the name is declared without shipping any.
"""

import os
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info

# setuptools resolves package_dir from here, whatever folder the build was started in.
os.chdir(Path(__file__).resolve().parent)

TOP_LEVELS = ("flash_attn_3", "flash_attn_interface")


class EggInfo(egg_info):
    """Writes TOP_LEVELS as top_level.txt, which wheels and editable installs copy."""

    def run(self) -> None:
        super().run()
        path = os.path.join(self.egg_info, "top_level.txt")
        self.write_file("top-level names", path, "\n".join(TOP_LEVELS) + "\n")


class BuildPy(build_py):
    """Leaves this file out, which lies in the package's folder."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[1] != "setup"]


setup(
    name="flash-attn-3",
    version="3.0.0",  # FlashAttention-3's, whose interface this serves; ours is in backend.py
    description="Hopper (sm_90a) kernels for the distribution flash-attn: WGMMA, TMA",
    license="BSD-3-Clause",
    classifiers=[
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    install_requires=["flash-attn"],
    packages=["flash_attn_3"],
    package_dir={"flash_attn_3": "."},
    package_data={"flash_attn_3": ["*.cu", "*.cuh", "py.typed"]},
    include_package_data=False,
    entry_points={"flash_attn_interface.backends": ["hopper = flash_attn_3:BACKEND"]},
    cmdclass={"build_py": BuildPy, "egg_info": EggInfo},
    zip_safe=False,  # NVRTC is given the files' texts, the simulator's compiler real files
)
