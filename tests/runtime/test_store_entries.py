"""Single entries of an ArtifactStore: who may read them, prebuilt ones, checking and discarding."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from test_store import DAMAGES, ENTRY, KEY, LABEL, NAME, _truncate, get, visible

from flash_attn_interface._common.runtime import store
from flash_attn_interface._common.runtime.store import ArtifactStore, content_key, find_prebuilt

# ---- modes of entries ------------------------------------------------------------------------


def test_entries_of_a_shared_folder_can_be_read_by_those_who_can_read_the_folder(
    tmp_path: Path,
) -> None:
    """What was built for a fleet is read by other users, through a mount or after a copy."""
    tmp_path.chmod(0o755)
    get(ArtifactStore(tmp_path, trusted=True))
    assert stat.S_IMODE((tmp_path / ENTRY).stat().st_mode) == 0o755


def test_a_shared_folder_is_made_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        get(ArtifactStore(tmp_path / "new", trusted=True))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o755


# ---- prebuilt, verified, discarded -----------------------------------------------------------


def test_a_prebuilt_entry_is_found_without_touching_its_folder(tmp_path: Path) -> None:
    get(ArtifactStore(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    artifact = find_prebuilt(tmp_path, KEY, LABEL, NAME)
    assert artifact is not None
    assert (artifact.origin, artifact.data) == ("prebuilt", b"artifact")
    assert find_prebuilt(tmp_path, content_key(["other"]), LABEL, NAME) is None
    assert find_prebuilt(tmp_path / "absent", KEY, LABEL, NAME) is None
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_prebuilt_entry_is_reported_kept_and_not_used(tmp_path: Path) -> None:
    get(ArtifactStore(tmp_path))
    _truncate(tmp_path / ENTRY)
    with pytest.warns(RuntimeWarning, match="prebuilt kernel is damaged .*reinstall") as seen:
        assert find_prebuilt(tmp_path, KEY, LABEL, NAME) is None
    assert len(seen) == 1
    assert visible(tmp_path) == [ENTRY]


def _rename(folder: Path) -> None:
    folder.rename(folder.with_name(f"{LABEL}-0123456789abcdef"))


@pytest.mark.parametrize(
    "damage", [d for d, _ in DAMAGES] + [_rename], ids=lambda d: d.__name__[1:]
)
def test_an_entry_is_checked_without_its_key(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    get(ArtifactStore(tmp_path))
    store.check_entry(tmp_path / ENTRY)
    damage(tmp_path / ENTRY)
    (folder,) = (p for p in tmp_path.iterdir() if p.name in visible(tmp_path))
    with pytest.raises(store.DamagedEntryError, match=folder.name):
        store.check_entry(folder)


def test_a_discarded_entry_is_gone_and_built_anew(tmp_path: Path) -> None:
    get(ArtifactStore(tmp_path))
    store.discard_entry(tmp_path / ENTRY)
    assert visible(tmp_path) == []
    assert get(ArtifactStore(tmp_path)).origin == "built"
