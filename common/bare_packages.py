"""Makes the planners and the compiler importable without torch, for builds.

They need none, but the `__init__` of their packages do. `setup.py` and `build_batch.py` import this
file from its folder, by a name without a package, before anything is installed.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def load(packages: Mapping[str, Path | str]) -> None:
    """Import name -> folder, parents first. Each becomes a package whose `__init__` is not run.

    Packages that are there already stay as they are.
    """
    for name, folder in packages.items():
        if name in sys.modules:
            continue
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def load_prebuild(packages: Mapping[str, Path | str]) -> Any:
    """The module `prebuild/build.py`, after `load`."""
    load(packages)
    return importlib.import_module("flash_attn_interface._common.prebuild.build")
