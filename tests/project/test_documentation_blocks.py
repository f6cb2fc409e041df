"""Every Python block of README and docs runs as printed.

The blocks of a page run in their order and share their names, as a reader would run them. An HTML
comment above a block says what it needs: `<!-- python: gpu -->` a CUDA device, `sim` the simulator,
`torchrun` the environment of a rank. A page with such a block is a test of that kind, too. Where
there is no GPU, a `gpu` block also runs with "cpu" in the place of "cuda", so that a wrong name is
found on any machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
_OPEN = r"(?:^<!-- python: (\w+) -->\n)?^```(python|py)\b[^\n]*\n"
BLOCK = re.compile(_OPEN + r"(.*?)^```$", re.M | re.S)
NEEDS = {"", "gpu", "sim", "torchrun"}


@dataclass(frozen=True)
class Block:
    needs: str
    line: int
    text: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(found[1] or "", text.count("\n", 0, found.start(3)), found[3])
        for found in BLOCK.finditer(text)
    ]


def pages() -> list[Path]:
    candidates = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
    return [page for page in candidates if blocks(page)]


def run(page: Path, device: str) -> None:
    names: dict[str, object] = {"__name__": "documentation"}
    for block in blocks(page):
        text = block.text
        if device == "cpu" and block.needs == "gpu":
            text = text.replace('"cuda"', '"cpu"')
        code = compile("\n" * block.line + text, str(page), "exec")  # tracebacks name the line
        exec(code, names)


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torchrun tells the only rank of a world."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "0")
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def parameters() -> list[object]:
    found = []
    for page in pages():
        needs = {block.needs for block in blocks(page)}
        marks = [pytest.mark.sim] if "sim" in needs else []
        found.append(pytest.param(page, "cpu", marks=marks, id=f"{named(page)}-cpu"))
        marks = [*marks, pytest.mark.gpu]
        found.append(pytest.param(page, "cuda", marks=marks, id=f"{named(page)}-gpu"))
    return found


@pytest.mark.parametrize("page, device", parameters())
def test_python_blocks_run_as_printed(
    page: Path, device: str, rank: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # some blocks write files
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run(page, device)


def test_every_block_is_found() -> None:
    """A block that is indented or spelt otherwise would escape; so would a misspelt marker."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")):
        text = page.read_text(encoding="utf-8")
        fences = re.findall(r"^\s*```\s*(?:python|py|pycon)\b", text, flags=re.MULTILINE)
        assert len(fences) == len(blocks(page)), named(page)
        markers = re.findall(r"^ *<!--\s*python.*-->", text, flags=re.MULTILINE)
        found = [f"<!-- python: {block.needs} -->" for block in blocks(page) if block.needs]
        assert markers == found, named(page)
        assert {block.needs for block in blocks(page)} <= NEEDS, named(page)
