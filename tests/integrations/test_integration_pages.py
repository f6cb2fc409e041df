"""The snippets of docs/integrations run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from installs import ROOT

PAGES = ROOT / "docs" / "integrations"
NEEDS = {
    "transformers": find_spec("transformers") is not None,
    "torch": hasattr(torch.nn.attention, "restore_flash_attention_impl"),
    "hub_kernels": find_spec("kernels") is not None,
}


def test_every_page_is_known():
    assert {page.stem for page in PAGES.glob("*.md")} == NEEDS.keys()


@pytest.mark.parametrize("page", NEEDS)
def test_snippets(page: str, tmp_path: Path):
    if not NEEDS[page]:
        pytest.skip(f"what docs/integrations/{page}.md is about is not installed, or too old")
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert snippets
    for snippet in snippets:
        variables = {**os.environ, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", snippet]
        subprocess.run(command, cwd=tmp_path, env=variables, check=True)
