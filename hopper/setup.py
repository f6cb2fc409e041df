"""Builds the distribution `flash-attn-3`: the Hopper kernels, found by `flash_attn_interface`.

This folder is the import package `flash_attn_3`. See the checkout's main setup.py for how kernels
are prebuilt, into `_prebuilt` here, and for why the metadata stands here.

Clients believe in FlashAttention-3 if a distribution of this name and version declares
`flash_attn_interface` among its top-level names. The files of that package belong to the main
distribution alone, so the name is declared without shipping any.

The main distribution is not among the requirements: where it is absent, pip would take the
`flash-attn` of its index, which is another project. Importing `flash_attn_3` says what is missing.
"""

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info
from setuptools.command.install_lib import install_lib

# setuptools resolves package_dir from here, whatever folder the build was started in.
ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)

# What compiling needs; parents first. Absent where this folder was taken out of the checkout: then
# nothing is prebuilt.
KERNEL_PACKAGES = {
    "flash_attn_interface": ROOT.parent / "flash_attn_interface",
    "flash_attn_interface._common": ROOT.parent / "common",
    "flash_attn_interface._flash2": ROOT.parent / "flash2",
    "flash_attn_3": ROOT,
}

TOP_LEVELS = ("flash_attn_3", "flash_attn_config", "flash_attn_interface")

MODULES = ["flash_attn_config"]


class EggInfo(egg_info):
    """Writes TOP_LEVELS as top_level.txt, which wheels and editable installs copy."""

    def run(self) -> None:
        super().run()
        path = os.path.join(self.egg_info, "top_level.txt")
        self.write_file("top-level names", path, "\n".join(TOP_LEVELS) + "\n")


def load_prebuild() -> Any:
    """common/prebuild/build.py of the checkout; None without one."""
    common = KERNEL_PACKAGES["flash_attn_interface._common"]
    if not common.is_dir():
        return None
    sys.path.insert(0, str(common))
    try:
        import bare_packages
    finally:
        sys.path.pop(0)
    return bare_packages.load_prebuild(KERNEL_PACKAGES)


class BuildPy(build_py):
    """Leaves out this file and MODULES, which lie in the package's folder but are not of it; adds
    the prebuilt kernels.
    """

    def run(self) -> None:
        super().run()
        prebuild = load_prebuild()
        if prebuild is None:
            print("flash-attn-3: no kernels are prebuilt, common/ is not beside this folder")
        else:
            prebuild.install(
                prebuild.Trees(["flash_attn_3.prebuild"], KERNEL_PACKAGES, {"hopper": ROOT}),
                listing=ROOT.parent / "headdim.json",
                destination=self.prebuilt_folder(),
                store=Path(self.get_finalized_command("build").build_base, "prebuilt"),
            )
            if not self.is_editable():
                prebuild.record_sources(self.package_folder(), ROOT.parent)

    def is_editable(self) -> bool:
        return bool(getattr(self, "editable_mode", False))

    def package_folder(self) -> Path:
        return ROOT if self.is_editable() else Path(self.build_lib, "flash_attn_3")

    def prebuilt_folder(self) -> Path:
        return self.package_folder() / "_prebuilt"

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        kernels = [str(path) for path in self.prebuilt_folder().rglob("*") if path.is_file()]
        record = [str(path) for path in self.package_folder().glob("_source_state.txt")]
        return [*super().get_outputs(include_bytecode), *kernels, *record]

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[1] not in ("setup", *MODULES)]


class InstallLib(install_lib):
    """Takes kernels away that an earlier `setup.py install` listed and this one does not."""

    def install(self) -> list[str]:
        prebuild = load_prebuild()
        if prebuild is not None:
            folders = (self.install_dir, self.build_dir)
            prebuild.remove_unlisted(*(Path(f, "flash_attn_3", "_prebuilt") for f in folders))
        return super().install()


def build_requires() -> list[str]:
    """What an isolated build (PEP 517) has to install first; nobody else asks."""
    prebuild = load_prebuild() if "setuptools.build_meta" in sys.modules else None
    return [] if prebuild is None else prebuild.build_requires()


setup(
    name="flash-attn-3",
    version="3.0.0",  # FlashAttention-3's, whose interface this serves; ours is in version.py
    description="Hopper (sm_90a) kernels for the distribution flash-attn: WGMMA, TMA",
    license="BSD-3-Clause",
    license_files=["LICENSE"] if Path("LICENSE").is_file() else [],  # a link to the checkout's
    classifiers=[
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    install_requires=[],  # see above
    packages=["flash_attn_3", "flash_attn_3.flash_attn_interface"],
    package_dir={"flash_attn_3": ".", "flash_attn_3.flash_attn_interface": "interface"},
    py_modules=MODULES,
    package_data={"flash_attn_3": ["*.cu", "*.cuh", "py.typed"]},
    include_package_data=False,
    entry_points={"flash_attn_interface.backends": ["hopper = flash_attn_3:BACKEND"]},
    cmdclass={"build_py": BuildPy, "egg_info": EggInfo, "install_lib": InstallLib},
    setup_requires=build_requires(),
    zip_safe=False,  # NVRTC is given the files' texts, the simulator's compiler real files
)
