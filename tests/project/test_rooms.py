"""The house: which folder may import from which. CONTRIBUTING.md says what lives where."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "flash_attn_interface"
FOLDERS = {
    "common": f"{PACKAGE}._common",
    "flash2": f"{PACKAGE}._flash2",
    "hopper": "flash_attn_3",
    PACKAGE: PACKAGE,
}
"""Folder -> import name."""

# From the ground up: a room imports from those of lines above its own, and from its own line if it
# is the only room there. A module at the top of a folder is named with it.
FLOORS = (
    ("common/env", "common/ptx", f"{PACKAGE}/version", f"{PACKAGE}/command_line"),
    ("common/log",),
    ("common/runtime",),
    ("common/params",),
    ("common/sim", "common/ask"),
    ("common/launch", "common/tiles"),
    ("common/prebuild", "common/features"),
    ("flash2",),
    ("hopper",),
    (f"{PACKAGE}/reference",),
    (f"{PACKAGE}/call",),
    (f"{PACKAGE}/api", f"{PACKAGE}/layers"),
    (f"{PACKAGE}/compat",),
    (f"{PACKAGE}/cache",),
    (f"{PACKAGE}/tools",),
    (f"{PACKAGE}/context_parallel", f"{PACKAGE}/integrations", f"{PACKAGE}/tune"),
    (f"{PACKAGE}/build", f"{PACKAGE}/__init__"),
    (f"{PACKAGE}/__main__",),
)
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

# Doors that lead up, each with its reason.
UPSTAIRS = {
    ("flash_attn_interface/call", "hopper"): "found by its entry point",
    ("hopper", "flash_attn_interface/compat"): "hopper/_C.py is a name that clients import",
    ("hopper", "flash_attn_interface/__init__"): "hopper/interface re-exports the package",
}


def modules() -> dict[str, Path]:
    """Import name -> file."""
    found = {}
    for folder, name in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            if file.name in ("setup.py", "bare_packages.py", "build_batch.py"):
                continue
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((name, *parts))] = file
    return found


MODULES = modules()


def room_of(module: str) -> str:
    file = MODULES[module].relative_to(ROOT)
    top = file.parts[0]
    if top in ("flash2", "hopper"):
        return top
    return f"{top}/{file.parts[1].removesuffix('.py')}"


def imports(module: str, tree: ast.AST) -> Iterator[str]:
    """Modules of this project that this code of `module` imports."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        if not isinstance(node, ast.ImportFrom):
            continue
        base = node.module or ""
        if node.level:
            parts = package.split(".")
            parts = parts[: len(parts) - node.level + 1]
            base = ".".join([*parts, *([node.module] if node.module else [])])
        for alias in node.names:
            full = f"{base}.{alias.name}"
            if full in MODULES:
                yield full
            elif base in MODULES:
                yield base


def parsed(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", MODULES)
def test_no_room_imports_from_an_upper_one(module: str) -> None:
    here = room_of(module)
    assert here in FLOOR or here == "common/__init__", f"{here} has no floor: add it to FLOORS"
    for other in imports(module, parsed(module)):
        there = room_of(other)
        if there == here or there == "common/__init__" or (here, there) in UPSTAIRS:
            continue
        assert FLOOR[there] < FLOOR[here], f"{module} imports {other}"


def test_no_module_waits_for_itself() -> None:
    """No circle of imports at module level; those inside functions may close one."""
    graph = {}
    for module in MODULES:
        at_import = [
            node for node in parsed(module).body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        graph[module] = set(imports(module, ast.Module(at_import, []))) - {module}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in graph[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())
