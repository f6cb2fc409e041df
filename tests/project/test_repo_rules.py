"""Rules that the tree keeps: where assembly lives, what files may contain, which links resolve.

They look at the checkout, not at the installed package. CONTRIBUTING.md says why each exists.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE_FOLDERS = ("common", "flash2", "hopper", "flash_attn", "flash_attn_interface")
DEVICE_SUFFIXES = (".cu", ".cuh")
TEXT_SUFFIXES = (
    ".py", ".cu", ".cuh", ".h", ".cpp", ".S", ".md", ".toml", ".json", ".yaml", ".in", ".csv",
)  # fmt: skip
TEXT_NAMES = ("Makefile", "run", ".gitignore", ".clang-format")
LIMITS = {"kernel": 500, "device header": 300, "Python module": 400, "test": 500}  # lines


def tree_files() -> list[Path]:
    """Files under version control or about to be; a source archive without git: all of them."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listing.returncode == 0:
        paths = (ROOT / line for line in listing.stdout.splitlines())
    else:
        skipped = {".venv", "build", "dist", "__pycache__"}
        paths = (p for p in ROOT.rglob("*") if not skipped & set(p.relative_to(ROOT).parts))
    return sorted(p for p in paths if p.is_file())


FILES = tree_files()


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def texts(*suffixes: str) -> Iterator[tuple[str, str]]:
    for path in FILES:
        if path.suffix in suffixes or (suffixes == TEXT_SUFFIXES and path.name in TEXT_NAMES):
            yield relative(path), path.read_text(encoding="utf-8")


def matches(pattern: str, *suffixes: str, flags: int = 0) -> list[str]:
    """`path:line: text` of every line that the pattern hits."""
    found = []
    for name, text in texts(*suffixes):
        for number, line in enumerate(text.splitlines(), 1):
            if re.search(pattern, line, flags):
                found.append(f"{name}:{number}: {line.strip()}")
    return found


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


# Signatures that users, other programs or torch prescribe: there arguments are many.
PUBLIC = (
    "flash_attn_interface/api/",
    "flash_attn_interface/compat/",
    "flash_attn_interface/integrations/",
    "flash_attn_interface/layers/",
    "flash_attn_interface/tools/explain.py",
    "flash_attn_interface/tools/explain_kv.py",
    "flash_attn_interface/context_parallel/function.py",
    "flash_attn_interface/reference/forward.py",
    "flash_attn_interface/reference/kvcache.py",
)
MANY = 12
TABLES = ("struct.pack", "BackwardTile")  # arguments that are values in columns


def inner_code() -> Iterator[tuple[str, list[str], ast.Module]]:
    """(name, lines, syntax) of the packages' Python but what has a public signature."""
    for name, text in texts(".py"):
        if name.startswith(CODE_FOLDERS) and not name.startswith(PUBLIC):
            yield name, text.splitlines(), ast.parse(text)


def is_operator(function: ast.FunctionDef) -> bool:
    """Whether its arguments are those of a schema."""
    decorators = [ast.unparse(each) for each in function.decorator_list]
    return any("custom_op(" in each or "register_fake" in each for each in decorators)


def test_no_function_has_so_many_arguments() -> None:
    """They travel in a `Call`: what is passed by hand through many layers is forgotten in one."""
    offenders = []
    for name, _, tree in inner_code():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not is_operator(node):
                arguments = node.args
                every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
                if len(every) >= MANY:
                    offenders.append(f"{name}:{node.lineno}: {node.name} has {len(every)}")
    assert not offenders


def test_no_argument_list_is_kept_from_the_formatter() -> None:
    """`fmt: skip` folds tables of values, not arguments: those of a call that needs it are too many
    to read."""
    offenders = []
    for name, lines, tree in inner_code():
        skipped = {number for number, line in enumerate(lines, 1) if "# fmt: skip" in line}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                header = range(node.lineno, node.body[0].lineno)
                if skipped & set(header):
                    offenders.append(f"{name}:{node.lineno}: {node.name}")
            if isinstance(node, ast.Call) and node.end_lineno in skipped:
                if len(node.args) >= MANY and ast.unparse(node.func) not in TABLES:
                    offenders.append(f"{name}:{node.lineno}: {ast.unparse(node.func)}")
    assert not offenders


def test_assembly_only_in_the_ptx_wrappers() -> None:
    """The simulator replaces the wrappers; assembly elsewhere would escape it."""
    outside = [
        name
        for name, text in texts(*DEVICE_SUFFIXES)
        if re.search(r"\basm\b", without_comments(text)) and not name.startswith("common/ptx/")
    ]
    assert not outside


def test_device_code_uses_only_the_wrappers() -> None:
    """CUDA builtins and headers compile for the GPU, but not in the simulator."""
    builtin = r"\b(__syncthreads|__syncwarp|__shfl\w*|threadIdx|blockIdx|gridDim|atomicAdd)\b"
    offenders = []
    for name, text in texts(*DEVICE_SUFFIXES):
        if name.startswith(("common/ptx/", "common/sim/")):
            continue
        code = without_comments(text)
        offenders += [f"{name}: {hit}" for hit in re.findall(builtin, code)]
        offenders += [
            f"{name}: {hit}" for hit in re.findall(r"#\s*include\s*<[^>]*>|\bstd::", code)
        ]
    assert not offenders


def test_ptx_wrappers_and_simulator_twins_come_in_pairs() -> None:
    wrappers = {p.name for p in FILES if relative(p.parent) == "common/ptx" and p.suffix == ".cuh"}
    twins = {p.name for p in FILES if relative(p.parent) == "common/sim/ptx"}
    assert wrappers, "common/ptx/ has no wrappers: was it moved?"
    assert wrappers - twins == set(), "wrappers without a simulator twin"
    assert twins - wrappers == set(), "simulator twins without a wrapper"


def test_device_includes_resolve() -> None:
    """Includes name a file from the checkout's root; only the generated ones are virtual."""
    generated = ("prelude.cuh", "common/ptx/wgmma_shapes.cuh")
    missing = []
    for name, text in texts(*DEVICE_SUFFIXES):
        if name.startswith("common/sim/"):
            continue  # host C++: its own include folders
        for target in re.findall(r'#\s*include\s*"([^"]+)"', text):
            if target not in generated and not (ROOT / target).is_file():
                missing.append(f"{name} includes {target}")
    assert not missing


def test_no_feature_macros_in_device_code() -> None:
    """Features are `if constexpr` on Cfg. Only common/ptx/ chooses by macro (GPU or simulator)."""
    offenders = [
        line
        for line in matches(r"^\s*#\s*(if|ifdef|ifndef|elif|define)\b", *DEVICE_SUFFIXES)
        if not line.startswith(("common/ptx/", "common/sim/"))
    ]
    assert not offenders


def test_products_with_strides_have_64_bits() -> None:
    """Strides are i64, hence their products; nothing narrows them but RowStride, by its rule.

    What is narrowed implicitly, the simulator's compiler refuses (-Werror=conversion).
    """
    files = sorted((ROOT / "common/device").rglob("*params.cuh"))
    assert len(files) > 5
    blocks = "".join(file.read_text(encoding="utf-8") for file in files)
    declared = re.findall(r"^\s*(\w+)\s+([^;/]*stride[^;/]*);", blocks, flags=re.MULTILINE)
    assert len(declared) > 30 and {kind for kind, _ in declared} == {"i64"}
    narrow = r"\b(?:[iu](?:8|16|32)|int|unsigned|f32|bool)\b"
    patterns = (
        rf"{narrow}\s+[&*]?\w*stride\w*",  # a variable, a parameter
        rf"{narrow}[({{][^;]*?stride\w*",  # a cast or a construction
        rf"static_cast<{narrow}>\([^;]*?stride\w*",
    )

    def hits(code: str) -> list[str]:
        return [hit for pattern in patterns for hit in re.findall(pattern, code, re.IGNORECASE)]

    for planted in ("i32 row_stride)", "u32(2 * p.k_row_stride)", "static_cast<int>(stride * 8)"):
        assert hits(planted), planted
    offenders = []
    for name, text in texts(*DEVICE_SUFFIXES):
        in_shared_memory = name.endswith("/wgmma_desc.cuh")
        if name.startswith(("flash2/", "hopper/", "common/device/")) and not in_shared_memory:
            offenders += [f"{name}: {hit}" for hit in hits(without_comments(text))]
    # check_paged.py and check_kv.py bound what a page table spans.
    assert offenders == ["flash2/device/kv_source.cuh: i32(row * p.page_table_stride"]
    rule = (ROOT / "flash2/device/row_stride.cuh").read_text(encoding="utf-8")
    assert "Select<kWide, i64, i32> bytes" in rule
    flags = (ROOT / "common/sim/build.py").read_text(encoding="utf-8")
    assert '"-Werror=conversion"' in flags


def kind_of(path: Path) -> str:
    if path.suffix == ".py":
        return "test" if relative(path).startswith("tests/") else "Python module"
    return {".cu": "kernel", ".cuh": "device header"}.get(path.suffix, "")


@pytest.mark.parametrize("kind", LIMITS)
def test_files_stay_readable(kind: str) -> None:
    files = [path for path in FILES if kind_of(path) == kind]
    sizes = {relative(p): len(p.read_text(encoding="utf-8").splitlines()) for p in files}
    too_long = {name: lines for name, lines in sizes.items() if lines > LIMITS[kind]}
    assert files
    assert not too_long, f"over {LIMITS[kind]} lines: find the seam and split"


def test_no_machine_paths() -> None:
    """A path below a home, work or temporary folder means something on one machine only."""
    folders = "home|root|Users|work|tmp|mnt|scratch"
    invented = "someone"  # whose home the tests may use
    assert not matches(rf"(?<![\w.~$}}/])/({folders})/(?!{invented}\b)\w", *TEXT_SUFFIXES)


def test_no_package_index_is_named() -> None:
    """Where packages come from is the user's configuration: mirrors must work."""
    hosts = "pypi" + r"\.org|python" + r"hosted|download\.py" + "torch|pypi" + r"\.nvidia"
    flags = r"--(extra-)?index-" + "url|--find-" + "links"
    assert not matches(f"{hosts}|{flags}", *TEXT_SUFFIXES, flags=re.IGNORECASE)


def test_open_work_names_its_issue() -> None:
    """`TODO(#12): ...` can be found and closed; a bare one is forgotten."""
    words = "TO" + "DO|FIX" + "ME|XX" + "X"
    assert not matches(rf"\b({words})\b(?!\(#\d+\))", *TEXT_SUFFIXES)


def test_whitespace() -> None:
    offenders = []
    for name, text in texts(*TEXT_SUFFIXES):
        if text and not text.endswith("\n"):
            offenders.append(f"{name}: no newline at the end")
        if "\t" in text and not name.endswith(("Makefile", ".S")):
            offenders.append(f"{name}: tabs")
        if "\r" in text:
            offenders.append(f"{name}: carriage returns")
        offenders += [f"{name}:{n}" for n, s in enumerate(text.split("\n"), 1) if s != s.rstrip()]
    assert not offenders


def heading_anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+\s+(.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def test_documentation_links_resolve() -> None:
    broken = []
    for name, text in texts(".md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue  # the web is not tested here
            path, _, anchor = target.partition("#")
            file = (ROOT / name).parent / path if path else ROOT / name
            if not file.exists():
                broken.append(f"{name} -> {target}")
            elif anchor and anchor not in heading_anchors(file.read_text(encoding="utf-8")):
                broken.append(f"{name} -> {target}: no such heading")
    assert not broken


def test_files_named_in_the_documentation_exist() -> None:
    """`common/device/mask.cuh` in backticks is a promise; so is a test's name."""
    folders = "common|flash2|flash_attn|flash_attn_interface|tests|benchmarks|docs|examples"
    pattern = rf"`((?:{folders})/[\w./-]+\.(?:py|cu|cuh|md|h|cpp|json))`"
    broken = [
        f"{name}: {target}"
        for name, text in texts(".md")
        for target in re.findall(pattern, text)
        if not (ROOT / target).exists()
    ]
    assert not broken


def test_make_commands_in_the_documentation_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, flags=re.MULTILINE))
    wrong = [
        f"{name}: make {target}"
        for name, text in texts(".md")
        for target in re.findall(r"(?:`|^\s*)make ([a-z][\w-]*)", text, flags=re.MULTILINE)
        if target not in targets
    ]
    assert not wrong
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in readme and "make test" in readme


def test_the_formatter_sees_the_sources_and_no_build_results() -> None:
    """`make wheels` leaves copies of device code in hopper/build, which nobody formats."""
    answer = subprocess.run(
        ["make", "-n", "lint"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (command,) = re.findall(r"\S*clang-format --dry-run --Werror (.*)", answer.stdout)
    suffixes = (*DEVICE_SUFFIXES, ".h", ".cpp")
    sources = {relative(p) for p in FILES if p.suffix in suffixes}
    sources = {name for name in sources if name.startswith(("common/", "flash2/", "hopper/"))}
    assert sources and set(command.split()) == sources


@pytest.mark.parametrize(
    "name", ["bench_forward.py", "bench_host_overhead.py", "bench_context_parallel.py"]
)
def test_benchmarks_refuse_a_machine_without_gpu(name: str) -> None:
    """Status 2 and a reason, not a traceback and not a number."""
    command = [sys.executable, str(ROOT / "benchmarks" / name)]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    answer = subprocess.run(command, env=hidden, capture_output=True, text=True, check=False)
    assert answer.returncode == 2, answer.stderr
    assert "needs an NVIDIA GPU" in answer.stdout


def prose() -> Iterator[tuple[str, int, str]]:
    """(file, line number, line) of documents, less what benchmarks write (one folder a run)."""
    for name, text in texts(".md"):
        if not re.match(r"docs/performance/\d{4}-\d\d-\d\d-", name):
            for number, line in enumerate(text.splitlines(), 1):
                yield name, number, line


def test_lines_of_documents_can_be_read() -> None:
    """Beyond 300 characters a line is a paragraph in a table's cell: make it rows, or a text."""
    assert not [f"{name}:{number}" for name, number, line in prose() if len(line) > 300]


def test_rows_of_tables_are_as_wide_as_their_heads() -> None:
    """A cell that is missing is shown as an empty one, and one too many is not shown at all."""
    wrong, width = [], 0
    for name, number, line in prose():
        row = line.strip()
        cells = len(re.split(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", row))) if row[:1] == "|" else 0
        if cells and width not in (0, cells):
            wrong.append(f"{name}:{number}")
        width = cells
    assert not wrong


def test_hardware_is_not_somebody() -> None:
    """Hardware waits or is idle; nobody and somebody are people, whom documents address directly.

    In Python, what stands beside a word of the hardware or of waiting is looked at, and in device
    code and the simulator everything.
    """
    person = r"\b(?:no|some)body\b"
    machine = r"\b(?:CTA|SM|warp|warpgroup|thread|lane|tile|wait|works?|idle)s?\b"
    hits = [f"{name}:{number}" for name, number, line in prose() if re.search(person, line, re.I)]
    either = f"{person}.*{machine}|{machine}.*{person}"
    hits += [hit for hit in matches(either, ".py", flags=re.I) if not hit.startswith("tests/")]
    hits += matches(person, ".cu", ".cuh", ".cpp", ".h", flags=re.I)
    assert not hits


def test_changelog_follows_keep_a_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert releases and releases[0] == "[Unreleased]"
    for release in releases[1:]:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", release), release
    allowed = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, flags=re.MULTILINE)) <= allowed


def test_headdim_json_lists_pairs() -> None:
    pairs = json.loads((ROOT / "headdim.json").read_text(encoding="utf-8"))
    assert pairs
    for pair in pairs:
        assert len(pair) == 2 and all(isinstance(d, int) and 1 <= d <= 256 for d in pair), pair
