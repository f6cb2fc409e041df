"""Comments and docstrings that point to a file: it exists, and it holds the name that they give."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from test_repo_rules import CODE_FOLDERS, FILES, relative

FILE = r"(?:[\w.]+/)*\w+\.(?:cuh|cu|py)"
# `Smem` in fwd.cu; key_tile() in bwd.cu; kMaxStep of `row_stride.cuh`; RowStride::kMaxStep in it.
NAME = r"`[\w.:]+(?:\(\))?`|\w+\(\)|\w+::\w+|\w+_\w+|[a-z]+[A-Z]\w*|[A-Z]+[a-z]+[A-Z]\w*"
# But for "Problem -> KernelSpec of append.cu", which says what is made.
HELD = re.compile(rf"(?<![\w`:])(?<!-> )({NAME}) (?:in|of) `?({FILE})`?")
GENERATED = {"prelude.cuh", "wgmma_shapes.cuh", "kernel.cu"}

SOURCES = {
    relative(path): path.read_text(encoding="utf-8")
    for path in FILES
    if path.suffix in (".py", ".cu", ".cuh") and relative(path).startswith(CODE_FOLDERS)
}
NAMES = [relative(path) for path in FILES]


def prose(name: str, text: str) -> Iterator[str]:
    """Comments and docstrings, each as one line."""
    if name.endswith(".py"):
        blocks = re.findall(r'"""(.*?)"""', text, flags=re.DOTALL)
        blocks += re.findall(r"(?:^[ \t]*# .*\n)+|(?<=  )# .*", text, flags=re.MULTILINE)
    else:
        blocks = re.findall(r"(?:^[ \t]*//.*\n)+|(?<= )//.*", text, flags=re.MULTILINE)
    for block in blocks:
        yield " ".join(re.sub(r"^[ \t]*(//|#)[ \t]?", "", block, flags=re.MULTILINE).split())


def meant(target: str, here: str) -> list[str]:
    """Sources that a comment in `here` may mean: of its own tree, if they are there."""
    found = [name for name in SOURCES if f"/{name}".endswith(f"/{target}")]
    own = [name for name in found if name.split("/")[0] == here.split("/")[0]]
    return own or found


def holds(text: str, name: str) -> bool:
    """Whether the source defines the name, or passes it on as `__init__.py` does."""
    *owners, word = re.findall(r"\w+", name)
    definitions = (
        rf"\b(?:struct|enum|class|def|using)\s+{word}\b",
        rf"\b{word}\b(?:\[\w*\])*(?:\s*:[^=\n]*)?\s*[=;](?!=)",  # a constant, a field
        rf"\bDEVICE\b[^;{{}}()]*\b{word}\(",
        rf"^from .* import .*\b{word}\b",
    )
    defined = any(re.search(pattern, text, flags=re.MULTILINE) for pattern in definitions)
    return defined and all(re.search(rf"\b{owner}\b", text) for owner in owners)


def wrong(here: str, text: str) -> list[str]:
    """What the comments of a source say wrongly of others."""
    found = []
    for line in prose(here, text):
        for name, target in HELD.findall(line):
            sources = meant(target, here)
            if not any(holds(SOURCES[source], name) for source in sources):
                found.append(f"{here}: {name} is not in {target}")
        for target in re.findall(rf"(?<![\w/.*]){FILE}", line):
            exists = any(f"/{file}".endswith(f"/{target}") for file in NAMES)
            if not exists and target.split("/")[-1] not in GENERATED:
                found.append(f"{here}: there is no {target}")
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_comments_point_to_what_is_there(name: str) -> None:
    assert not wrong(name, SOURCES[name])


def test_wrong_pointers_are_seen() -> None:
    here = "flash2/planted.cuh"
    for comment in (
        "// The map is `NoSuchThing` in fwd.cu.",
        "// Shared memory: `Smem` in bwd.cu",  # which uses it only
        "// by no_such_function() of `bwd_tiles.py`",
        "// rules: mask.cuh and\n// row_keyz() in mask.cuh",
        "// moved to old_place.cuh",
    ):
        assert wrong(here, comment + "\n"), comment
    assert not wrong(here, "// row_keys() in mask.cuh; `Smem` of fwd.cu; bwd_tiles.py\n")
