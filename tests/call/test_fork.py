"""fork() while other threads work: the child neither hangs nor takes anything from its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_store import KEY, LABEL, NAME, built, get, never

from flash_attn_interface._common.launch import driver
from flash_attn_interface._common.runtime.store import ArtifactStore, Built, content_key

SECONDS = 20


@pytest.fixture(autouse=True)
def forking_beside_threads_is_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
        yield


def forked(body: Callable[[], None]) -> int:
    """Exit status of a child that runs `body`; SIGALRM's if it hangs."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        status = 1
        try:
            body()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def while_building(cache: ArtifactStore, body: Callable[[], None]) -> None:
    """Runs `body` while another thread is in the middle of building KEY."""
    building, finish = threading.Event(), threading.Event()

    def slow() -> Built:
        building.set()
        assert finish.wait(SECONDS)
        return built()

    thread = threading.Thread(target=get, args=(cache, slow))
    thread.start()
    assert building.wait(SECONDS)
    try:
        body()
    finally:
        finish.set()
        thread.join()


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_a_child_forked_while_a_thread_compiles_does_not_hang(
    on_disk: bool, tmp_path: Path
) -> None:
    """Another kernel is compiled; where there is no disk, also the same one."""
    cache = ArtifactStore(tmp_path / "cache" if on_disk else None)

    def child() -> None:
        other = cache.get_or_build(content_key(["another"]), LABEL, NAME, built)
        assert other.data == b"artifact"
        if not on_disk:  # else the parent's file lock is waited for, as between any two processes
            assert get(cache).data == b"artifact"

    while_building(cache, lambda: check_status(forked(child)))
    assert get(cache, never).data == b"artifact"


def check_status(status: int) -> None:
    assert status == 0


def test_a_child_waits_for_its_parents_compile_and_takes_the_result(tmp_path: Path) -> None:
    cache = ArtifactStore(tmp_path / "cache")
    children: list[int] = []

    def fork_one() -> None:
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            status = 1
            try:
                status = 0 if get(cache, never).origin == "disk" else 2
            finally:
                os._exit(status)
        children.append(child)

    while_building(cache, fork_one)
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0


def test_a_child_forked_while_a_lock_is_held_can_take_it(tmp_path: Path) -> None:
    """Every lock on the way to a kernel: of the store, of the table of kernels, of a kernel."""
    cache = ArtifactStore(tmp_path / "cache")
    kernel = driver.DeviceKernel.__new__(driver.DeviceKernel)
    kernel._guard = threading.Lock()
    key = object()
    driver._kernels[key] = kernel  # type: ignore[index]
    taken = [cache._guard, cache._thread_lock(KEY), driver._kernels_guard, kernel._guard]

    def child() -> None:
        locks = [cache._guard, cache._thread_lock(KEY), driver._kernels_guard, kernel._guard]
        for lock in locks:
            assert lock.acquire(timeout=1)

    try:
        for lock in taken:
            lock.acquire()
        assert forked(child) == 0
    finally:
        for lock in taken:
            lock.release()
        del driver._kernels[key]  # type: ignore[arg-type]


def test_a_child_leaves_the_files_of_its_parent_alone_and_removes_its_own(tmp_path: Path) -> None:
    """Without a disk cache, programs of the simulator lie in a folder of the process."""
    program = f"""
import os, sys
from pathlib import Path
from flash_attn_interface._common.runtime.store import ArtifactStore, Built
def path(key):
    return ArtifactStore(None).get_or_build(key, "l", "n", lambda: Built(b"1")).path()
mine = path("parent")
child = os.fork()
if child == 0:
    Path({str(tmp_path / "child")!r}).write_text(str(path("child")))
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert mine.read_bytes() == b"1"
print(mine)
"""
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    of_child = Path((tmp_path / "child").read_text())
    of_parent = Path(answer.stdout.strip())
    assert of_child.parents[1] != of_parent.parents[1]
    assert not of_parent.parents[1].exists() and not of_child.parents[1].exists()
