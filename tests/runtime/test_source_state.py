"""Two distributions of one release that were built from different sources are not run together."""

from __future__ import annotations

import email
import importlib.util
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
from installs import ROOT, attempt, build_wheel, copy_checkout, run

from flash_attn_interface._common.runtime import source_state

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None,
    reason="setuptools and pip are not installed in this environment",
)
EDITABLE = "import sys, setuptools.build_meta as b; b.build_editable(sys.argv[1])"


def edit(source: Path) -> None:
    """Another state of the sources, with the same release number."""
    with (source / "common" / "philox.py").open("a", encoding="utf-8") as file:
        file.write("# edited\n")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of two states of the sources, and editable ones of both, which are different checkouts."""
    top = tmp_path_factory.mktemp("states")
    found = {}
    for state in ("first", "second"):
        source = copy_checkout(top / state)
        if state == "second":
            edit(source)
        for name, folder in (("main", source), ("hopper", source / "hopper")):
            found[f"{name} {state}"] = build_wheel(folder, top / f"{name}-{state}")[0]
            out = top / f"editable-{name}-{state}"
            out.mkdir()
            run(sys.executable, "-c", EDITABLE, out, cwd=folder)
            (found[f"editable {name} {state}"],) = out.glob("*.whl")
    return found


def imported(wheels: list[Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """What `import flash_attn_3` says where these are installed."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    run(*pip, "--target", folder / "site", *wheels, cwd=folder)
    program = (
        f"import site; site.addsitedir({str(folder / 'site')!r})\n"
        "import sys; sys.path.insert(0, sys.path.pop())\n"
        "import flash_attn_3, flash_attn_interface; print('imported')"
    )
    # -S: the editable installation of this environment is not seen.
    paths = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    paths = [str(folder / "site"), *paths]
    return attempt(sys.executable, "-S", "-c", program, cwd=folder, PYTHONPATH=":".join(paths))


@pytest.mark.parametrize("way", ["", "editable "], ids=["wheels", "editable"])
def test_one_state_is_imported(way: str, wheels: dict[str, Path], tmp_path: Path) -> None:
    parts = [wheels[f"{way}main first"], wheels[f"{way}hopper first"]]
    result = imported(parts, tmp_path)
    assert result.stdout.strip() == "imported", result.stderr
    assert "different sources" not in result.stderr


@pytest.mark.parametrize("way", ["", "editable "], ids=["wheels", "editable"])
@pytest.mark.parametrize("hopper", ["first", "second"])
def test_two_states_are_refused(
    way: str, hopper: str, wheels: dict[str, Path], tmp_path: Path
) -> None:
    main = {"first": "second", "second": "first"}[hopper]
    result = imported([wheels[f"{way}main {main}"], wheels[f"{way}hopper {hopper}"]], tmp_path)
    assert result.returncode != 0 and result.stdout == ""
    assert "ImportError: flash_attn_3 and flash_attn_interface have one release" in result.stderr
    assert "pip install . && cd hopper && pip install ." in result.stderr


@pytest.mark.parametrize("editable", ["main", "hopper"])
@pytest.mark.parametrize("state", ["first", "second"])
def test_an_editable_side_goes_on_with_a_warning(
    editable: str, state: str, wheels: dict[str, Path], tmp_path: Path
) -> None:
    """Whoever works on one side must not have to install the other after each edit."""
    parts = [wheels["main first"], wheels[f"hopper {state}"]]
    index = ["main", "hopper"].index(editable)
    parts[index] = wheels["editable " + ["main first", f"hopper {state}"][index]]
    result = imported(parts, tmp_path)
    assert result.stdout.strip() == "imported", result.stderr
    assert ("different sources" in result.stderr) == (state == "second")


def test_without_the_main_distribution_the_import_says_what_is_missing(
    wheels: dict[str, Path], tmp_path: Path
) -> None:
    """Also beside another project's module of that name."""
    for other in (False, True):
        folder = tmp_path / str(other)
        folder.mkdir()
        if other:
            (folder / "flash_attn_interface.py").write_text("")  # FlashAttention-3's own
        result = imported([wheels["hopper first"]], folder)
        assert result.returncode != 0
        assert "ImportError: flash_attn_3 needs the distribution flash-attn" in result.stderr


def test_the_hopper_wheel_asks_no_index_for_flash_attn_and_carries_the_licence(
    wheels: dict[str, Path],
) -> None:
    """A `flash-attn` from an index is another project."""
    with zipfile.ZipFile(wheels["hopper first"]) as archive:
        names = archive.namelist()
        (path,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        message = email.message_from_string(archive.read(path).decode())
        (licence,) = [name for name in names if name.endswith("LICENSE")]
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
        assert "flash_attn_3/_source_state.txt" in names
    assert message.get_all("Requires-Dist") is None
    assert message["License-File"] == "LICENSE"


def test_the_digest_covers_code_and_nothing_else(tmp_path: Path) -> None:
    source = copy_checkout(tmp_path / "source")
    before = source_state.of_checkout(source)
    (source / "common" / "__pycache__").mkdir(exist_ok=True)
    (source / "common" / "__pycache__" / "x.py").write_text("1")
    (source / "flash_attn_interface" / "_prebuilt" / "k").mkdir(parents=True)
    (source / "flash_attn_interface" / "_prebuilt" / "k" / "prelude.cuh").write_text("1")
    (source / "common" / "tiles" / "tuned" / "mine.json").write_text("{}")
    assert source_state.of_checkout(source) == before is not None
    linked = tmp_path / "linked"  # as editable installations of setuptools' strict kind
    for path in (source / name for name in source_state.FOLDERS):
        (linked / path.name).mkdir(parents=True)
        for inside in path.iterdir():
            (linked / path.name / inside.name).symlink_to(inside)
    assert source_state.of_checkout(linked) == before
    edit(source)
    assert source_state.of_checkout(source) != before
    shutil.rmtree(source / "flash2")
    assert source_state.of_checkout(source) is None


def test_this_checkout_is_in_one_state() -> None:
    assert source_state.installed() == source_state.of_checkout(ROOT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source_state.check(ROOT / "hopper")
