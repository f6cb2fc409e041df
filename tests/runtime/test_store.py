"""ArtifactStore: one build among threads and processes, and no fault that reaches the caller."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import stat
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest

from flash_attn_interface._common.runtime import store
from flash_attn_interface._common.runtime.store import Artifact, ArtifactStore, Built, content_key

KEY = content_key(["what the artifact is made of"])
LABEL = "thing-causal"
NAME = "thing.bin"
ENTRY = f"{LABEL}-{KEY[:16]}"
NOBODY = 65534
FORK = multiprocessing.get_context("fork")


def built(data: bytes = b"artifact") -> Built:
    return Built(data, {"build.log": "all is well\n"}, {"seconds": 1.5})


def never() -> Built:
    raise AssertionError("built again")


def get(cache: ArtifactStore, build: Callable[[], Built] = built) -> Artifact:
    return cache.get_or_build(KEY, LABEL, NAME, build)


def visible(root: Path) -> list[str]:
    """What the cache folder holds beside its lock files."""
    return sorted(p.name for p in root.iterdir() if p.name != ".locks")


@pytest.fixture(autouse=True)
def warnings_fail() -> Iterator[None]:
    """A warning that no test expects is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Python 3.12 dislikes fork() beside torch's threads; the children here use neither.
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
        yield


def test_an_entry_is_one_readable_folder(tmp_path: Path) -> None:
    artifact = get(ArtifactStore(tmp_path / "cache"))
    assert (artifact.origin, artifact.data) == ("built", b"artifact")
    folder = tmp_path / "cache" / ENTRY
    assert artifact.folder == folder and artifact.path() == folder / NAME
    assert sorted(p.name for p in folder.iterdir()) == ["build.log", "spec.json", NAME]
    record = json.loads((folder / "spec.json").read_text())
    assert record["key"] == KEY and record["label"] == LABEL and record["facts"] == {"seconds": 1.5}
    assert visible(tmp_path / "cache") == [ENTRY]


def test_the_next_process_loads_from_disk(tmp_path: Path) -> None:
    get(ArtifactStore(tmp_path))
    artifact = get(ArtifactStore(tmp_path), never)
    assert (artifact.origin, artifact.data) == ("disk", b"artifact")
    assert artifact.facts == {"seconds": 1.5}


def test_without_a_folder_the_artifact_is_kept_in_memory() -> None:
    cache = ArtifactStore(None)
    first = get(cache)
    assert first.folder is None
    assert get(cache, never) is first
    assert first.path().read_bytes() == b"artifact"  # dlopen wants a file nevertheless


def test_keys_are_unambiguous() -> None:
    assert content_key(["ab", "c"]) != content_key(["a", "bc"]) != content_key(["abc"])
    assert content_key(["a", b"b"]) == content_key([b"a", "b"])


def test_a_failing_build_is_passed_on_and_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> Built:
        raise ValueError("the kernel has a typo")

    cache = ArtifactStore(tmp_path)
    with pytest.raises(ValueError, match="typo"):
        get(cache, fail)
    assert visible(tmp_path) == []
    assert get(cache).origin == "built"  # and the lock was given back


# ---- one build for all ------------------------------------------------------------------------


def test_threads_build_once(tmp_path: Path) -> None:
    builds: list[int] = []
    results: list[Artifact] = []
    cache = ArtifactStore(tmp_path)

    def slow() -> Built:
        builds.append(1)
        time.sleep(0.1)
        return built()

    threads = [threading.Thread(target=lambda: results.append(get(cache, slow))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert [r.data for r in results] == [b"artifact"] * 8


def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    count, go = FORK.Value("i", 0), FORK.Event()
    origins: Any = FORK.Queue()

    def worker() -> None:
        def slow() -> Built:
            with count.get_lock():
                count.value += 1
            time.sleep(0.3)
            return built()

        go.wait()
        artifact = get(ArtifactStore(tmp_path / "cache"), slow)
        origins.put((artifact.origin, artifact.data))

    processes = [FORK.Process(target=worker) for _ in range(16)]
    for process in processes:
        process.start()
    go.set()
    found = sorted(origins.get(timeout=30) for _ in processes)
    for process in processes:
        process.join()
    assert count.value == 1
    assert found == [("built", b"artifact")] + [("disk", b"artifact")] * 15


def test_different_keys_build_at_the_same_time(tmp_path: Path) -> None:
    meeting = threading.Barrier(2, timeout=10)
    cache = ArtifactStore(tmp_path)

    def meet() -> Built:
        meeting.wait()  # passes only if both builds are under way
        return built()

    keys = [content_key([name]) for name in ("one", "two")]
    run = [lambda key=key: cache.get_or_build(key, LABEL, NAME, meet) for key in keys]
    threads = [threading.Thread(target=target) for target in run]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(visible(tmp_path)) == 2


def test_a_killed_builder_blocks_nobody_and_its_leftovers_go(tmp_path: Path) -> None:
    def killed_half_way() -> None:
        def write_and_die(path: Path, data: bytes) -> None:
            path.write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        store._write_file = write_and_die
        get(ArtifactStore(tmp_path))

    process = FORK.Process(target=killed_half_way)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [name for name in visible(tmp_path) if name.startswith(".tmp-")]
    assert get(ArtifactStore(tmp_path)).origin == "built"
    assert visible(tmp_path) == [ENTRY]


def test_where_locks_do_not_work_the_first_publisher_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(self: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", no_locks)

    def overtaken() -> Built:
        get(ArtifactStore(tmp_path))  # another process publishes while this one builds
        return built()

    assert get(ArtifactStore(tmp_path), overtaken).data == b"artifact"
    assert visible(tmp_path) == [ENTRY]


def test_a_hung_lock_holder_does_not_hang_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_LOCK_TIMEOUT_SECONDS", 0.1)
    inner: list[str] = []

    def hang() -> Built:
        inner.append(get(ArtifactStore(tmp_path)).origin)  # another store: another process
        return built()

    get(ArtifactStore(tmp_path), hang)
    assert inner == ["built"]


# ---- damaged entries --------------------------------------------------------------------------


def _truncate(folder: Path) -> None:
    (folder / NAME).write_bytes(b"artif")


def _flip_a_bit(folder: Path) -> None:
    (folder / NAME).write_bytes(b"artifacu")


def _lose_artifact(folder: Path) -> None:
    (folder / NAME).unlink()


def _lose_record(folder: Path) -> None:
    (folder / "spec.json").unlink()


def _truncate_record(folder: Path) -> None:
    path = folder / "spec.json"
    path.write_text(path.read_text()[:20])


def _empty_record(folder: Path) -> None:
    (folder / "spec.json").write_text("[]")


def _other_key(folder: Path) -> None:
    path = folder / "spec.json"
    path.write_text(path.read_text().replace(KEY, content_key(["another"])))


DAMAGES = [
    (_truncate, "checksum"),
    (_flip_a_bit, "checksum"),
    (_lose_artifact, "FileNotFoundError"),
    (_lose_record, "FileNotFoundError"),
    (_truncate_record, "JSONDecodeError"),
    (_empty_record, "TypeError"),
    (_other_key, "another key"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES, ids=[d.__name__[1:] for d, _ in DAMAGES])
def test_a_damaged_entry_is_set_aside_and_rebuilt(
    damage: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    get(ArtifactStore(tmp_path))
    damage(tmp_path / ENTRY)
    with pytest.warns(RuntimeWarning, match=f"damaged .*{reason}.* rebuilt") as seen:
        artifact = get(ArtifactStore(tmp_path))
    assert len(seen) == 1
    assert (artifact.origin, artifact.data) == ("built", b"artifact")
    assert visible(tmp_path) == [f".damaged-{ENTRY}", ENTRY]
    assert get(ArtifactStore(tmp_path), never).origin == "disk"


def test_an_entry_damaged_twice_leaves_one_folder_aside(tmp_path: Path) -> None:
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            get(ArtifactStore(tmp_path))
        _truncate(tmp_path / ENTRY)
    with pytest.warns(RuntimeWarning, match="damaged"):
        get(ArtifactStore(tmp_path))
    assert visible(tmp_path) == [f".damaged-{ENTRY}", ENTRY]


# ---- folders that cannot or must not be used --------------------------------------------------


def test_the_folder_is_created_for_its_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        get(ArtifactStore(tmp_path / "a" / "cache"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "cache").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "a" / "cache" / ENTRY).stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_folder_that_others_may_write_to_is_refused(mode: int, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    get(ArtifactStore(root), lambda: built(b"planted"))
    root.chmod(mode)
    cache = ArtifactStore(root)
    with pytest.warns(
        RuntimeWarning, match=f"other users may write to it .mode {mode:04o}"
    ) as seen:
        artifact = get(cache)
    assert len(seen) == 1
    assert (artifact.data, artifact.folder) == (b"artifact", None)
    assert get(cache, never) is artifact


def test_a_folder_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get(ArtifactStore(tmp_path), lambda: built(b"planted"))
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.warns(RuntimeWarning, match=f"belongs to user id {owner}, .* runs as {owner + 1}"):
        artifact = get(ArtifactStore(tmp_path))
    assert (artifact.data, artifact.folder) == (b"artifact", None)


def test_a_trusted_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    tmp_path.chmod(0o775)
    assert get(ArtifactStore(tmp_path, trusted=True)).folder == tmp_path / ENTRY


def test_a_file_in_place_of_the_folder_means_memory(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    with pytest.warns(RuntimeWarning, match="cannot be created .*FLASH_ATTN_INTERFACE_CACHE_DIR"):
        assert get(ArtifactStore(tmp_path / "cache")).folder is None


@pytest.fixture
def public_tmp() -> Iterator[Path]:
    """A folder that an unprivileged process can reach, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


def unprivileged(body: Callable[[], None]) -> None:
    """Runs ``body`` in a child process without root's right to write everywhere."""

    def child() -> None:
        if os.geteuid() == 0:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        body()

    process = FORK.Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_read_only_home_means_memory_and_one_warning(public_tmp: Path) -> None:
    public_tmp.chmod(0o555)

    def body() -> None:
        cache = ArtifactStore(public_tmp / "home" / "cache")
        with pytest.warns(RuntimeWarning, match="cannot be created .*Permission denied") as seen:
            first = get(cache)
            cache.get_or_build(content_key(["another"]), LABEL, NAME, built)
        assert len(seen) == 1
        assert get(cache, never) is first

    unprivileged(body)
    assert list(public_tmp.iterdir()) == []


def test_a_read_only_cache_is_still_read(public_tmp: Path) -> None:
    root = public_tmp / "cache"
    get(ArtifactStore(root))
    shutil.rmtree(root / ".locks")
    if os.geteuid() == 0:
        for path in [root, *root.rglob("*")]:
            os.chown(path, NOBODY, NOBODY)
    root.chmod(0o500)

    def body() -> None:
        cache = ArtifactStore(root)
        assert get(cache, never).origin == "disk"
        with pytest.warns(RuntimeWarning, match="cannot be written .*Permission denied") as seen:
            for name in ("second", "third"):
                built_now = cache.get_or_build(content_key([name]), LABEL, NAME, built)
                assert built_now.folder is None
        assert len(seen) == 1
        assert get(cache, never).origin == "disk"

    unprivileged(body)
    assert visible(root) == [ENTRY]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_full_disk_means_memory_and_one_warning(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[str] = []

    def write_until_full(path: Path, data: bytes) -> None:
        writes.append(path.name)
        if path.name == NAME:
            path.write_bytes(data[:3])
            raise OSError(code, os.strerror(code))
        path.write_bytes(data)

    monkeypatch.setattr(store, "_write_file", write_until_full)
    cache = ArtifactStore(tmp_path)
    with pytest.warns(RuntimeWarning, match=os.strerror(code)) as seen:
        first = get(cache)
        second = cache.get_or_build(content_key(["another"]), LABEL, NAME, built)
    assert len(seen) == 1
    assert writes == ["build.log", NAME]  # not tried again
    assert (first.data, second.data) == (b"artifact", b"artifact")
    assert get(cache, never) is first
    assert visible(tmp_path) == []


def test_a_write_that_the_kernel_cuts_short_leaves_nothing(tmp_path: Path) -> None:
    def body() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.warns(RuntimeWarning, match="File too large"):
            artifact = get(ArtifactStore(tmp_path), lambda: built(b"x" * 100_000))
        assert artifact.folder is None and len(artifact.data) == 100_000

    process = FORK.Process(target=body)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert visible(tmp_path) == []
