"""The Hopper tree under its import name, installed or straight from the checkout."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parents[2] / "hopper"


def load() -> ModuleType:
    """The module `flash_attn_3`."""
    if "flash_attn_3" in sys.modules:
        return sys.modules["flash_attn_3"]
    spec = importlib.util.find_spec("flash_attn_3") or importlib.util.spec_from_file_location(
        "flash_attn_3", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["flash_attn_3"] = module
    spec.loader.exec_module(module)
    return module
