"""`python -m flash_attn_interface kernels`: stand in for kernels of the Hugging Face Hub.

    export LOCAL_KERNELS="$(python -m flash_attn_interface kernels)"

Libraries that load flash attention by the package `kernels` (transformers, diffusers) then get this
installation in place of kernels-community/flash-attn2, flash-attn3 and vllm-flash-attn3. Written is
a folder of two small files for each, which import this package from the environment that loads
them. docs/integrations/hub_kernels.md is the page for users.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .. import command_line

DEFAULT_FOLDER = "flash_attn_hub_kernels"
_REPOSITORIES = "kernels-community"


class _Kernel(NamedTuple):
    version: int  # of the Hub's kernel
    source: str  # of the module that stands in for it


_KERNELS = {
    "flash-attn2": _Kernel(
        2,
        "from flash_attn import *\n"
        "from flash_attn import __version__, bert_padding, flash_attn_interface\n",
    ),
    "flash-attn3": _Kernel(
        1,
        "import flash_attn_interface\n"
        "from flash_attn_interface import *\n"
        "from flash_attn_interface import _flash_attn_backward, _flash_attn_forward\n",
    ),
    "vllm-flash-attn3": _Kernel(
        1,
        "import flash_attn_interface\n"
        "from flash_attn_interface import flash_attn_combine, get_scheduler_metadata\n"
        "from flash_attn_interface.integrations.vllm_flash_attn3 import (\n"
        "    flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache,\n"
        ")\n",
    ),
}


@command_line.guarded
def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the folders and prints the value for LOCAL_KERNELS; returns the exit status."""
    parser = command_line.Parser(prog="python -m flash_attn_interface kernels", description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(DEFAULT_FOLDER),
        metavar="DIR",
        help=f"where to write, created if missing; default: {DEFAULT_FOLDER} in this folder",
    )
    options = parser.parse_args(arguments)
    print(write(options.out))
    return 0


def write(folder: Path | str) -> str:
    """Writes a folder for each kernel below `folder`; returns the value for LOCAL_KERNELS.

    Raises:
        ValueError: the path has a colon, which separates entries of LOCAL_KERNELS.
        OSError: something cannot be written.
    """
    top = Path(folder).resolve()
    if ":" in str(top):
        raise ValueError(f"{top} has a colon, which separates the entries of LOCAL_KERNELS")
    entries = []
    for name, kernel in _KERNELS.items():
        place = top / name
        place.mkdir(parents=True, exist_ok=True)
        metadata = json.dumps(_metadata(name, kernel), indent=2)
        (place / "metadata.json").write_text(metadata + "\n", encoding="utf-8")
        (place / "__init__.py").write_text(kernel.source, encoding="utf-8")
        entries.append(f"{_REPOSITORIES}/{name}={place}")
    return ":".join(entries)


def _metadata(name: str, kernel: _Kernel) -> dict[str, object]:
    """What the package `kernels` wants to know; the id is the module's name in sys.modules."""
    return {
        "id": f"_flash_attn_interface_{name.replace('-', '_')}",
        "name": name,
        "version": kernel.version,
        "license": "BSD-3-Clause",
        "python-depends": [],
        "backend": {"type": "cuda" if torch.version.cuda else "cpu"},
    }


if __name__ == "__main__":
    sys.exit(main())
