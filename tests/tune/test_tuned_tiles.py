"""Tables of tuned tiles: which one is asked, what is refused, and that shipped ones are sound."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import hopper_tree
import pytest
import torch

from flash_attn_interface import explain
from flash_attn_interface._common import env
from flash_attn_interface._common.ask.problem import Problem, Target
from flash_attn_interface._common.prebuild.build import headdim
from flash_attn_interface._common.tiles import tuned_tiles
from flash_attn_interface._common.tiles.tuned_tiles import Entry, Table, TunedTilesError
from flash_attn_interface._flash2 import decode_tiles, fwd, fwd_tiles
from flash_attn_interface._flash2 import tuning as flash2_tuning
from flash_attn_interface.call import selection
from flash_attn_interface.tune.measure import make_problem

HOPPER = hopper_tree.load()
TUNABLES = (*flash2_tuning.TUNABLES, *HOPPER.BACKEND.tunables())
H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"
KEY = "flash2/fwd/bf16/48x80/full"
TILE = {"block_m": 64, "block_n": 96, "num_warps": 4}
OTHER = {"block_m": 128, "block_n": 32, "num_warps": 8}


def problem(**changes: Any) -> Problem:
    sizes: dict[str, Any] = {"batch": 2, "heads": 4, "seqlen_q": 512, "seqlen_k": 512}
    return replace(make_problem("bf16", (48, 80), False, **sizes), **changes)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """(the user's, the package's), both empty."""
    user, packaged = tmp_path / "user", tmp_path / "packaged"
    monkeypatch.setenv(env.TUNED_TILES.name, str(user))
    monkeypatch.setattr(tuned_tiles, "PACKAGED", packaged)
    tuned_tiles.forget()
    yield user, packaged
    tuned_tiles.forget()


def put(folder: Path, tile: dict[str, Any], gpu: str = "", arch: str = "sm_90", key: str = KEY):
    table = Table(gpu, arch, "a test", {key: Entry(tile)})
    tuned_tiles.write(folder / tuned_tiles.file_name(arch, gpu), table)
    tuned_tiles.forget()


def block_n(gpu: str = H100, arch: str = "sm_90") -> int:
    return int(fwd_tiles.forward_spec(problem(), arch, gpu=gpu)["block_n"])


BUILTIN = fwd_tiles.forward_tile(problem(), "sm_90").block_n


def test_without_tables_the_trees_list_decides(folders):
    assert block_n() == BUILTIN


def test_precedence(folders):
    """User before package, GPU model before architecture."""
    user, packaged = folders
    assert BUILTIN not in (16, 48, 80, 96)
    put(packaged, {**TILE, "block_n": 16})
    assert block_n() == 16
    put(packaged, {**TILE, "block_n": 48}, H100)
    assert block_n() == 48 and block_n("NVIDIA H200") == 16 and block_n("") == 16
    put(user, {**TILE, "block_n": 80})
    assert block_n() == 80
    put(user, {**TILE, "block_n": 96}, H100)
    assert block_n() == 96 and block_n("") == 80


def test_off_means_no_tables_at_all(folders, monkeypatch):
    user, packaged = folders
    put(user, TILE, H100)
    put(packaged, TILE, H100)
    assert block_n() == 96
    monkeypatch.setenv(env.TUNED_TILES.name, "off")
    assert block_n() == BUILTIN
    assert tuned_tiles.user_folder() is None


def test_tables_of_the_user_are_in_the_cache_folder_by_default(folders, monkeypatch, tmp_path):
    monkeypatch.delenv(env.TUNED_TILES.name)
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path / "cache"))
    put(tmp_path / "cache" / "tuned", TILE, H100)
    assert block_n() == 96
    monkeypatch.setenv(env.DISK_CACHE.name, "0")
    assert block_n() == BUILTIN


@pytest.mark.parametrize(
    ("gpu", "arch"), [(A100, "sm_90"), (H100, "sm_80")], ids=["other model", "other arch"]
)
def test_a_table_of_another_gpu_is_ignored(folders, gpu, arch):
    """Say, a home folder copied from another machine, or a renamed file."""
    user, _ = folders
    table = Table(gpu, arch, "a test", {KEY: Entry({"nonsense": 1})})
    tuned_tiles.write(user / tuned_tiles.file_name("sm_90", H100), table)
    assert block_n() == BUILTIN


@pytest.mark.parametrize(
    ("tile", "reason"),
    [
        ({**TILE, "block_m": 80}, "block_m=80 is not 16 or 32 rows for each of 4 warps"),
        ({**TILE, "block_n": 40}, "block_n=40 is not a multiple of 16"),
        ({**TILE, "block_n": 992}, "min_ctas_per_sm=1, but 0 fit"),
        ({**TILE, "min_ctas_per_sm": 99}, "min_ctas_per_sm=99"),
        ({**TILE, "block_k": 3}, "block_k"),
        ({"block_m": 64}, "block_n"),
        ({**TILE, "block_n": "32"}, "integers"),
        ({**TILE, "block_n": 32.0}, "integers"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_an_entry_that_cannot_be_is_an_error_with_file_and_key(folders, tile, reason):
    user, _ = folders
    put(user, tile, H100)
    with pytest.raises(TunedTilesError) as error:
        block_n()
    text = str(error.value)
    assert reason in text and KEY in text and "nvidia-h100-80gb-hbm3.json" in text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not a readable table"),
        ("[]", "not a table of tiles"),
        ('{"format": 1}', "not a table of tiles"),
        ('{"format": 2, "gpu": "", "arch": "sm_90", "origin": "", "entries": {}}', "format 2"),
    ],
)
def test_a_damaged_table_is_an_error_with_its_name(folders, text, reason):
    user, _ = folders
    user.mkdir()
    (user / "sm_90.json").write_text(text)
    with pytest.raises(TunedTilesError, match=reason) as error:
        block_n()
    assert "sm_90.json" in str(error.value)


def test_a_table_is_read_once_per_process(folders):
    """Or two plans of one process could disagree."""
    user, _ = folders
    put(user, TILE, H100)
    assert block_n() == 96
    table = Table(H100, "sm_90", "later", {KEY: Entry(OTHER)})
    tuned_tiles.write(user / tuned_tiles.file_name("sm_90", H100), table)
    assert block_n() == 96
    tuned_tiles.forget()
    assert block_n() == 32


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"batch": 7, "total_q": 7 * 512}, True),
        ({"seqlen_k": 9999}, True),
        ({"num_heads_k": 1, "num_heads_v": 2}, True),
        ({"varlen_q": True, "varlen_k": True}, True),
        ({"page_size": 16}, True),
        ({"has_seqused_k": True}, True),
        ({"vector_bytes": 4}, True),
        ({"causal": True}, False),
        ({"window_left": 100}, False),
        ({"softcap": 3.0}, False),
        ({"alibi": True}, False),
        ({"dropout_p": 0.5}, False),
        ({"attention_chunk": 64}, False),
        ({"dtype": "fp16"}, False),
        ({"head_dim_qk": 56}, False),
        ({"head_dim_v": 88}, False),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_tile_depends_on_what_changes_the_kernel_not_on_sizes(changes, same):
    """So a row's bits do not depend on what else is in the batch, or on how it is stored."""
    first, second = (tuned_tiles.key("flash2", "fwd", problem(**c)) for c in ({}, changes))
    assert (first == second) is same


def test_keys_name_features():
    asked = problem(causal=True, softcap=2.0, dropout_p=0.1)
    assert tuned_tiles.key("hopper", "fwd", asked) == "hopper/fwd/bf16/48x80/causal+softcap+dropout"
    decode = problem(seqlen_q=1, num_heads_q=8, num_heads_k=2, num_heads_v=2)
    assert decode_tiles.row_class(decode) == 16
    key = tuned_tiles.key("flash2", "decode", decode, decode_tiles.row_class(decode))
    assert key == "flash2/decode/bf16/48x80/full/rows16"


@pytest.mark.parametrize("tunable", TUNABLES, ids=lambda t: f"{t.tree}-{t.direction}")
def test_every_direction_of_every_tree_plans_with_the_tables(folders, tunable):
    user, _ = folders
    arch = "sm_90a" if tunable.tree == "hopper" else "sm_90"
    sizes = {"seqlen_q": 1} if tunable.direction == "decode" else {}
    asked = problem(**sizes)
    builtin = tunable.builtin(asked, arch)
    chosen = next(tile for tile in tunable.candidates(asked, arch, 40) if tile != builtin)
    put(user, tuned_tiles.as_record(chosen), H100, "sm_90", tunable.key(asked))
    target = Target(arch, 0, simulated=True, gpu=H100)
    # A plan made the ordinary way, without a tile of its own.
    plan = tunable.plan(asked, target, None)
    given = tunable.plan(asked, target, chosen)
    assert plan.describe() == given.describe()
    assert plan.describe() != tunable.plan(asked, replace(target, gpu=""), None).describe()


def test_the_devices_model_reaches_the_plan(folders, monkeypatch):
    user, _ = folders
    put(user, TILE, H100)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H100)

    class OnGpu:
        device = torch.device("cuda", 3)

        def get_device(self) -> int:
            return 3

    device = selection.device_of(OnGpu())  # type: ignore[arg-type]
    assert device.gpu == H100 and device.index == 3
    target = selection.target_for("flash2", device)
    assert target == Target("sm_90", 3, gpu=H100)
    assert fwd.ForwardPlan(problem(), target).spec["block_n"] == 96
    with monkeypatch.context() as patch:
        patch.setattr(selection, "device_of", lambda tensor: device)
        assert target.describe() == "sm_90, cuda:3"


def test_simulated_devices_have_no_model(folders):
    user, packaged = folders
    put(user, TILE, H100, "sm_80")
    put(packaged, OTHER, "", "sm_80")
    shapes = ((1, 64, 2, 48), (1, 64, 2, 48), (1, 64, 2, 80))
    explanation = explain(*shapes, arch="sm_80")
    assert explanation.constants["num_warps"] == 8  # of the architecture's table


def test_writing_keeps_what_others_may_read(folders):
    user, _ = folders
    put(user, TILE, H100)
    (path,) = user.iterdir()
    assert path.stat().st_mode & 0o777 == 0o644
    assert tuned_tiles.read(path) == Table(H100, "sm_90", "a test", {KEY: Entry(TILE)})


CHOOSERS = [
    (tunable, arch)
    for tunable in TUNABLES
    for arch in ("sm_80", "sm_86", "sm_89", "sm_90")
    if tunable.tree == "flash2" or arch == "sm_90"  # for which alone the Hopper tree has kernels
]


@pytest.mark.parametrize(
    ("tunable", "arch"), CHOOSERS, ids=[f"{t.tree}-{t.direction}-{arch}" for t, arch in CHOOSERS]
)
def test_what_the_package_chooses_can_be_built_on_every_arch(tunable, arch, monkeypatch, tmp_path):
    """By its tables or by the tree's list, for the models that have tables and for the others."""
    monkeypatch.setenv(env.TUNED_TILES.name, str(tmp_path / "no such folder"))
    tuned_tiles.forget()
    built_for = "sm_90a" if tunable.tree == "hopper" else arch
    sizes = {"batch": 2, "heads": 8, "heads_kv": 2, "seqlen_q": 4096, "seqlen_k": 4096}
    if tunable.direction == "decode":
        sizes["seqlen_q"] = 1
    for dims in (*headdim.DEFAULT_PAIRS, (48, 80), (64, 64), (128, 128), (160, 224), (256, 256)):
        for causal in (False, True):
            for gpu in ("", *models(arch)):
                asked = make_problem("bf16", dims, causal, **sizes)
                tile = tunable.shipped(asked, built_for, gpu)
                assert tunable.refuses(tile, asked, built_for) is None, (dims, gpu, tile)


def models(arch: str) -> list[str]:
    """GPU models of an architecture that have a table in the package."""
    tables = [tuned_tiles.read(path) for path in PACKAGED]
    return [table.gpu for table in tables if table is not None and table.arch == arch and table.gpu]


# --- the tables of the package -----------------------------------------------------------------

PACKAGED = sorted(tuned_tiles.PACKAGED.glob("*.json"))
KINDS = {(t.tree, t.direction): t for t in TUNABLES}


def test_architectures_with_tables():
    archs = {f"sm_{n}" for n in (80, 86, 89, 90)}
    assert {path.stem for path in PACKAGED} >= {tuned_tiles.file_name("sm_90", H100)[:-5], *archs}


@pytest.mark.parametrize("path", PACKAGED, ids=lambda path: path.stem)
def test_packaged_tables_are_sound_and_used(path, monkeypatch):
    """Named after their GPU, honest about where they come from, every tile allowed and chosen."""
    monkeypatch.setenv(env.TUNED_TILES.name, str(path.parent / "no such folder"))
    tuned_tiles.forget()
    table = tuned_tiles.read(path)
    assert table is not None and path.name == tuned_tiles.file_name(table.arch, table.gpu)
    measured = table.origin.startswith(("measured on", "for all of sm_90; measured on"))
    derived = table.origin.startswith(f"derived for {table.arch}, not measured there")
    assert measured if table.arch == "sm_90" else derived
    for key, entry in table.entries.items():
        tree, direction, dtype, dims, variant, *_ = key.split("/")
        tunable = KINDS[tree, direction]
        qk, v = map(int, dims.split("x"))
        sizes = {"batch": 1, "heads": 8, "heads_kv": 2, "seqlen_q": 512, "seqlen_k": 512}
        if direction == "decode":
            sizes["seqlen_q"] = 1
        asked = make_problem(dtype, (qk, v), variant.startswith("causal"), **sizes)
        assert tunable.key(asked) == key
        arch = "sm_90a" if tree == "hopper" else table.arch
        assert tunable.shipped(asked, arch, table.gpu) == tunable.kind(**entry.tile)
        gains = ("speedup", "speedup_where_timed")
        assert max(entry.facts.get(name, 0.0) for name in gains) > 1.0
