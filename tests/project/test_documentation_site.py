"""The site's table of contents: every page and every public name has its place.

`make docs`, which continuous integration runs, builds the site itself; here nothing is built.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import flash_attn
import flash_attn_interface
from flash_attn_interface import context_parallel

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
CONFIG = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = re.findall(r"\S+\.md\b", CONFIG.partition("\nnav:\n")[2])
    folders = (DOCS, DOCS / "api", DOCS / "integrations")
    pages = [page for folder in folders for page in folder.glob("*.md")]
    there = {page.relative_to(DOCS).as_posix() for page in pages}
    from_the_root = {"index.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"}
    assert len(listed) == len(set(listed))
    assert set(listed) == there | from_the_root | {"performance/README.md"}


@pytest.mark.parametrize(
    "module, page",
    [
        (flash_attn_interface, "flash_attn_interface.md"),
        (flash_attn, "flash_attn.md"),
        (context_parallel, "context_parallel.md"),
    ],
)
def test_every_public_function_is_in_the_api_reference(module, page: str) -> None:
    text = (ROOT / "docs/api" / page).read_text(encoding="utf-8")
    text += (ROOT / "docs/api/tools.md").read_text(encoding="utf-8")
    public = [name for name in module.__all__ if not name.startswith("_")]
    assert public
    if module is flash_attn:  # all of one module that begin with the filter's word
        from flash_attn_interface.api import fa2

        assert 'filters: ["^flash_attn"]' in text
        shown = {name for name in vars(fa2) if name.startswith("flash_attn")}
        public = [name for name in public if name not in shown]
    missing = [name for name in public if not re.search(rf"\b{name}\b", text)]
    assert not missing


def test_warnings_end_the_build() -> None:
    """--quiet would silence them, and --strict counts only what is not silenced."""
    (command,) = re.findall(r"mkdocs build .*", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert command == "mkdocs build --strict"
    assert "make docs" in (ROOT / ".ci/run").read_text(encoding="utf-8")
    for kind in ("anchors: warn", "not_found: warn"):
        assert kind in CONFIG
