"""Kernels and tables come only from where no other user could have put them.

Cases with two users run as root, in a child that has become the first; their twins, which run
always, pretend that a file belongs to somebody else.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_store import ENTRY, FORK, KEY, LABEL, NAME, built, get, never
from tiny_kernels import tiny_spec, tiny_tree

from flash_attn_interface._common import env
from flash_attn_interface._common.runtime import compiler, cubins, entries, trust
from flash_attn_interface._common.runtime.store import ArtifactStore
from flash_attn_interface._common.runtime.trust import UntrustedError
from flash_attn_interface._common.tiles import tuned_tiles

__all__ = ["tiny_tree"]

USER, OTHER = 65533, 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act for two users")


@pytest.fixture(autouse=True)
def each_warning_is_shown() -> Iterator[None]:
    trust.warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
        yield
    trust.warn_once.cache_clear()


@pytest.fixture
def public() -> Iterator[Path]:
    """As /tmp: everybody may make files there, and rename only their own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


def as_user(body: Callable[[], None]) -> None:
    """Runs `body` in a child process of USER."""

    def child() -> None:
        os.setgid(USER)
        os.setuid(USER)
        body()

    process = FORK.Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0


def give(path: Path, owner: int) -> Path:
    """Hands a file, or a folder and what it holds, over to a user."""
    for each in (path, *path.rglob("*")):
        os.chown(each, owner, owner, follow_symlinks=False)
    return path


def of_another_user(monkeypatch: pytest.MonkeyPatch, *paths: Path) -> None:
    """Lets these seem to belong to OTHER."""
    numbers = {(status.st_dev, status.st_ino) for status in map(os.lstat, paths)}
    check = trust._check_owner

    def check_as_if(status: os.stat_result, what: str) -> None:
        fields: list[Any] = list(status)
        if (status.st_dev, status.st_ino) in numbers:
            fields[stat.ST_UID] = OTHER
        check(os.stat_result(fields), what)

    monkeypatch.setattr(trust, "_check_owner", check_as_if)


# ---- resolve ----------------------------------------------------------------------------------


def test_a_folder_of_ones_own_is_resolved_to_its_real_path(tmp_path: Path) -> None:
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real/../real")
    assert trust.resolve(tmp_path / "link" / "deep") == tmp_path / "real" / "deep"
    assert trust.folder(tmp_path / "link" / ".." / "real") == tmp_path / "real"
    assert trust.resolve(tmp_path / "link" / "a" / "b") == tmp_path / "real" / "a" / "b"


def test_links_in_a_circle_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        trust.resolve(tmp_path / "a")


@pytest.mark.parametrize("which", ["end", "parent", "link"])
def test_each_folder_and_link_on_the_way_has_to_have_a_trusted_owner(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = tmp_path / "parent" / "end"
    end.mkdir(parents=True)
    (tmp_path / "link").symlink_to(end)
    path = {"end": end, "parent": end.parent, "link": tmp_path / "link"}[which]
    assert trust.resolve(tmp_path / "link") == end
    of_another_user(monkeypatch, path)
    with pytest.raises(UntrustedError, match=f"belongs to user id {OTHER}"):
        trust.resolve(tmp_path / "link")


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_a_parent_that_others_may_write_to_is_refused(mode: int, tmp_path: Path) -> None:
    (tmp_path / "parent" / "end").mkdir(parents=True)
    (tmp_path / "parent").chmod(mode)
    with pytest.raises(
        UntrustedError, match=f"its parent folder .*/parent .mode {mode:04o}; chmod"
    ):
        trust.resolve(tmp_path / "parent" / "end")
    (tmp_path / "parent").chmod(mode | stat.S_ISVTX)
    assert trust.resolve(tmp_path / "parent" / "end") == tmp_path / "parent" / "end"


def test_a_group_of_one_counts_as_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With umask 002, which such systems have, all folders are 0775."""
    tmp_path.chmod(0o775)
    monkeypatch.setattr(trust, "_is_private_group", lambda gid: True)
    assert trust.resolve(tmp_path) == tmp_path
    tmp_path.chmod(0o777)
    with pytest.raises(UntrustedError, match="other users may write"):
        trust.resolve(tmp_path)


def test_the_checks_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o777)
    monkeypatch.setenv(env.TRUST_FOLDERS.name, "1")
    assert trust.resolve(tmp_path) == tmp_path


def test_only_plain_files_are_read_and_a_pipe_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    assert trust.read(tmp_path / "file") == b"1"
    with pytest.raises(OSError, match="symbolic links"):
        trust.read(tmp_path / "link")
    with pytest.raises(UntrustedError, match="not a plain file"):
        trust.read(tmp_path / "pipe")
    (tmp_path / "file").chmod(0o666)
    with pytest.raises(UntrustedError, match="other users may write"):
        trust.read(tmp_path / "file")


# ---- the cache --------------------------------------------------------------------------------


def refused(root: Path, reason: str) -> None:
    """The store over `root` says so once and builds into memory."""
    cache_ = ArtifactStore(root)
    with pytest.warns(RuntimeWarning, match=f"is not used: .*{reason}") as seen:
        artifact = get(cache_)
    assert len(seen) == 1
    assert (artifact.data, artifact.folder) == (b"artifact", None)
    assert get(cache_, never) is artifact


def planted(root: Path) -> Path:
    get(ArtifactStore(root), lambda: built(b"planted"))
    return root


def test_a_link_of_another_user_to_the_cache_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(tmp_path / "cache")
    (tmp_path / "link").symlink_to("cache")
    of_another_user(monkeypatch, tmp_path / "link")
    refused(tmp_path / "link", "the link .* belongs to user id")


@needs_root
def test_a_link_of_another_user_in_a_sticky_folder_is_refused(public: Path) -> None:
    give(planted(public / "of_user"), USER)
    (public / "cache").symlink_to(public / "of_user")
    give(public / "cache", OTHER)
    as_user(lambda: refused(public / "cache", "the link .* belongs to user id"))


def test_a_writable_parent_of_the_cache_is_refused(tmp_path: Path) -> None:
    planted(tmp_path / "shared" / "cache")
    (tmp_path / "shared").chmod(0o777)
    refused(tmp_path / "shared" / "cache", "other users may write to its parent folder")


@needs_root
def test_a_parent_of_another_user_is_refused(public: Path) -> None:
    give(planted(public / "home" / "cache"), USER)
    os.chown(public / "home", OTHER, OTHER)
    (public / "home").chmod(0o755)
    as_user(lambda: refused(public / "home" / "cache", "its parent folder .* belongs to user id"))


def test_the_cache_is_checked_at_each_miss(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    cache_ = ArtifactStore(root)
    assert get(cache_).folder == root / ENTRY
    root.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="other users may write to it"):
        assert get(cache_).folder is None


def test_a_link_that_is_turned_round_later_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    planted(tmp_path / "other")
    (tmp_path / "cache").symlink_to("mine")
    cache_ = ArtifactStore(tmp_path / "cache")
    assert get(cache_).folder == tmp_path / "mine" / ENTRY
    (tmp_path / "cache").unlink()
    (tmp_path / "cache").symlink_to("other")
    assert get(cache_, never).data == b"artifact"


def test_a_relative_folder_stays_where_it_was_when_the_process_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    planted(tmp_path / "b" / "relative_cache")
    monkeypatch.setenv(env.CACHE_DIR.name, "relative_cache")
    monkeypatch.chdir(tmp_path / "a")
    before = env.cache_dir()
    cache_ = ArtifactStore(Path("relative_cache"))
    monkeypatch.chdir(tmp_path / "b")
    assert env.cache_dir() == before == tmp_path / "a" / "relative_cache"
    assert get(cache_).folder == tmp_path / "a" / "relative_cache" / ENTRY


@pytest.mark.parametrize("what", [ENTRY, f"{ENTRY}/{NAME}", f"{ENTRY}/spec.json"])
def test_an_entry_that_others_may_write_to_is_set_aside(what: str, tmp_path: Path) -> None:
    planted(tmp_path / "cache")
    (tmp_path / "cache" / what).chmod(0o777)
    with pytest.warns(RuntimeWarning, match="damaged .*other users may write"):
        assert get(ArtifactStore(tmp_path / "cache")).data == b"artifact"


@needs_root
@pytest.mark.parametrize("what", [ENTRY, f"{ENTRY}/{NAME}", f"{ENTRY}/spec.json"])
def test_an_entry_of_another_user_is_set_aside(what: str, public: Path) -> None:
    give(planted(public / "cache"), USER)
    path = public / "cache" / what
    os.chown(path, OTHER, OTHER)
    path.chmod(0o755)

    def body() -> None:
        with pytest.warns(RuntimeWarning, match=f"damaged .*belongs to user id {OTHER}"):
            assert get(ArtifactStore(public / "cache")).data == b"artifact"

    as_user(body)


def test_an_entry_that_is_a_file_or_a_link_to_nothing_heals(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    for make in (Path.touch, lambda path: path.symlink_to("nowhere")):
        entries.remove(tmp_path / ENTRY)
        make(tmp_path / ENTRY)
        for origin in ("built", "disk"):
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                found = get(ArtifactStore(tmp_path))
            assert (found.origin, found.folder) == (origin, tmp_path / ENTRY)
            assert len(seen) == (origin == "built")


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_what_this_store_writes_it_also_reads(umask: int, tmp_path: Path) -> None:
    """Whatever the umask, in folders that it makes."""
    before = os.umask(umask)
    try:
        get(ArtifactStore(tmp_path / "parent" / "cache"))
        get(ArtifactStore(tmp_path / "fleet", trusted=True))
    finally:
        os.umask(before)
    assert get(ArtifactStore(tmp_path / "parent" / "cache"), never).origin == "disk"
    assert trust.folder(tmp_path / "fleet")
    assert entries.find_prebuilt(tmp_path / "fleet", KEY, LABEL, NAME, checked=True) is not None


# ---- prebuilt folders -------------------------------------------------------------------------


@pytest.fixture
def fleet(tiny_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of prebuilt kernels, named by the environment."""
    compiled = compiler.Compiled(b"\x7fELF of the fleet", LOG, 0.1)
    monkeypatch.setattr(compiler, "compile_cubin", lambda *arguments: compiled)
    monkeypatch.setattr(compiler, "loaded_version", lambda: "nvrtc 0.0")
    folder = tmp_path / "fleet"
    cubins.prebuild(tiny_spec(), folder)
    monkeypatch.setenv(env.PREBUILT_DIR.name, str(folder))
    return folder


LOG = """ptxas info : 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info : Used 8 registers"""


def origin(fleet: Path) -> str:
    kernels = cubins.KernelCache(ArtifactStore(None), named=env.PREBUILT_DIR.get())
    return kernels.image(tiny_spec()).origin


def test_a_prebuilt_folder_of_ones_own_is_used(fleet: Path) -> None:
    assert origin(fleet) == "prebuilt"


@pytest.mark.parametrize("what", ["", "entry", "file"])
def test_a_prebuilt_kernel_that_others_may_write_to_is_refused(what: str, fleet: Path) -> None:
    (entry,) = entries.entries(fleet)
    {"": fleet, "entry": entry, "file": entry / "kernel.cubin"}[what].chmod(0o777)
    with pytest.warns(RuntimeWarning, match="not used.*other users may write"):
        assert origin(fleet) == "built"


@pytest.mark.parametrize("what", ["", "entry", "file"])
def test_a_prebuilt_kernel_of_another_user_is_refused(
    what: str, fleet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (entry,) = entries.entries(fleet)
    path = {"": fleet, "entry": entry, "file": entry / "kernel.cubin"}[what]
    of_another_user(monkeypatch, path)
    with pytest.warns(RuntimeWarning, match=f"not used.*belongs to user id {OTHER}"):
        assert origin(fleet) == "built"


@needs_root
def test_prebuilt_kernels_of_root_serve_all_and_those_of_another_user_none(
    fleet: Path, public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = public / "kernels"
    shutil.copytree(fleet, shared)
    monkeypatch.setenv(env.PREBUILT_DIR.name, str(shared))

    def used() -> None:
        assert origin(shared) == "prebuilt"

    def not_used() -> None:
        with pytest.warns(RuntimeWarning, match=f"it belongs to user id {OTHER}"):
            assert origin(shared) == "built"

    as_user(used)
    give(shared, OTHER)
    as_user(not_used)


@pytest.mark.parametrize("reason", ["does not exist", "other users may write"])
def test_a_prebuilt_folder_that_is_missing_or_refused_is_said_once(
    reason: str, fleet: Path
) -> None:
    if reason == "does not exist":
        shutil.rmtree(fleet)
    else:
        fleet.chmod(0o777)
    with pytest.warns(RuntimeWarning, match=f"{env.PREBUILT_DIR.name} names .*{reason}") as seen:
        for _ in range(2):
            assert origin(fleet) == "built"
    assert len(seen) == 1


# ---- tables of tiles --------------------------------------------------------------------------


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The default folder of tables, in the cubins."""
    monkeypatch.delenv(env.TUNED_TILES.name, raising=False)
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "tuned"
    table = tuned_tiles.Table("", "sm_80", "a test", {"key": tuned_tiles.Entry({"size": 3})})
    tuned_tiles.write(folder / "sm_80.json", table)
    tuned_tiles.forget()
    yield folder
    tuned_tiles.forget()


def table_is_used() -> bool:
    tuned_tiles.forget()
    return tuned_tiles.tile(dict, "key", "sm_80", "", lambda tile: None) is not None


def test_a_table_in_a_folder_that_the_cache_refuses_is_refused(tables: Path) -> None:
    assert table_is_used()
    for folder in (tables, tables.parent):
        folder.chmod(0o777)
        trust.warn_once.cache_clear()
        with pytest.warns(RuntimeWarning, match="tables of tiles .*other users may write") as seen:
            assert [table_is_used() for _ in range(2)] == [False, False]
        assert len(seen) == 1
        folder.chmod(0o700)
    assert table_is_used()


@needs_root
def test_a_table_in_a_folder_of_another_user_is_refused(tables: Path, public: Path) -> None:
    shutil.copytree(tables.parent, public / "cache")
    give(public / "cache", OTHER)
    os.environ[env.CACHE_DIR.name] = str(public / "cache")  # of the fixture's monkeypatch

    def body() -> None:
        with pytest.warns(RuntimeWarning, match=f"tables of tiles .*user id {OTHER}"):
            assert not table_is_used()

    (public / "cache").chmod(0o755)
    as_user(body)


def test_a_table_that_others_may_write_to_is_an_error(tables: Path) -> None:
    (tables / "sm_80.json").chmod(0o666)
    with pytest.raises(tuned_tiles.TunedTilesError, match="other users may write"):
        table_is_used()


def test_a_folder_of_tables_that_is_named_and_missing_is_said_once(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.TUNED_TILES.name, str(tmp_path / "nowhere"))
    with pytest.warns(RuntimeWarning, match="tables of tiles .*does not exist") as seen:
        assert [table_is_used() for _ in range(2)] == [False, False]
    assert len(seen) == 1


# ---- misspelt variables -----------------------------------------------------------------------


def test_a_misspelt_variable_is_said_once_when_kernels_are_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = [
        "FLASH_ATTN_INTERFACE_NO is not read",
        "FLASH_ATTN_CACHE_DIR is not read; did you mean FLASH_ATTN_INTERFACE_CACHE_DIR?",
        "FLASH_ATTENTION_OF_OTHERS is not read",
    ]
    monkeypatch.setattr(env, "misspelt", lambda: told)
    cubins._kernels.cache_clear()
    with pytest.warns(RuntimeWarning, match="environment variable") as seen:
        for _ in range(2):
            cubins.default_kernels()
    assert len(seen) == 2
    assert not any("OF_OTHERS" in str(warning.message) for warning in seen)
    cubins._kernels.cache_clear()
