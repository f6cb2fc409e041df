"""docs/tour.md walks a real call: each function that it places in a file is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOUR = (ROOT / "docs/tour.md").read_text(encoding="utf-8")
FOLDERS = ("common", "flash2", "hopper", "flash_attn_interface")
PLACES = re.findall(r"`(\w+)`(?: \([^)]*\))? in\s+`([\w/]+\.(?:py|cuh?))`", TOUR)


def files_called(name: str) -> list[Path]:
    if "/" in name:
        return [ROOT / name]
    return [file for folder in FOLDERS for file in (ROOT / folder).rglob(name)]


@pytest.mark.parametrize("name, file", PLACES)
def test_a_name_is_where_the_tour_says(name: str, file: str) -> None:
    found = files_called(file)
    assert found, f"no file {file}"
    defined = re.compile(
        rf"(?:\b(?:def|class|struct|void|u32) |^KERNEL\(.*\) ){name}\b", re.MULTILINE
    )
    assert any(defined.search(path.read_text(encoding="utf-8")) for path in found)


def test_the_tour_places_its_hops() -> None:
    assert len(PLACES) >= 6
    hops = re.findall(r"^## (\d)\. ", TOUR, re.MULTILINE)
    assert hops == [str(number) for number in range(1, 6)]


def test_the_diagram_of_the_kernel_names_its_functions() -> None:
    kernel = (ROOT / "flash2/fwd.cu").read_text(encoding="utf-8")
    diagram = TOUR.partition("```\nwait for K")[2].partition("```")[0]
    names = re.findall(r"(\w+) +-> ", diagram)
    assert len(names) == 5
    for name in names:
        assert re.search(rf"\b{name}\b", kernel), name
