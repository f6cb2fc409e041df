"""The table of environment variables: values, documentation, and that nothing bypasses it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flash_attn_interface._common import env

REPOSITORY = Path(__file__).resolve().parents[2]


def test_documentation_shows_exactly_the_table() -> None:
    page = (REPOSITORY / "docs" / "environment.md").read_text()
    assert env.as_markdown() in page
    documented = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert documented == sorted(v.name for v in env.VARIABLES)


def test_nothing_else_in_the_packages_reads_a_variable_by_name() -> None:
    readers = [
        path.relative_to(REPOSITORY).as_posix()
        for folder in ("common", "flash2", "hopper", "flash_attn", "flash_attn_interface")
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
        if re.search(r"(environ(\.get\(|\[)|getenv\()\s*f?[\"']", path.read_text())
    ]
    assert readers == []


def test_unset_and_empty_mean_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(env.DISK_CACHE.name, raising=False)
    assert env.DISK_CACHE.get() is True
    monkeypatch.setenv(env.DISK_CACHE.name, " ")
    assert env.DISK_CACHE.get() is True


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        (env.DISK_CACHE, "0", False),
        (env.DISK_CACHE, "off", False),
        (env.SKIP_CUDA_BUILD, "TRUE", True),
        (env.SIM_THREADS, "3", 3),
        (env.FORCE_BACKEND, "hopper", "hopper"),
        (env.CUDA_ARCHS, "80;90a", ("80", "90a")),
        (env.CUDA_ARCHS, "80, 120", ("80", "120")),
        (env.CACHE_DIR, "/a/b", Path("/a/b")),
        (env.TUNED_TILES, "off", env.OFF),
        (env.CACHE_LIMIT, "500M", 500 * 2**20),
        (env.CACHE_LIMIT, "1.5 GiB", 3 * 2**29),
        (env.LOGLEVEL, "INFO", "info"),
        (env.CXX, "ccache g++ -m64", "ccache g++ -m64"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_values(
    variable: env.Variable[object], text: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable.name, text)
    assert variable.get() == value


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        (env.DISK_CACHE, "maybe"),
        (env.SIM_THREADS, "0"),
        (env.SIM_THREADS, "many"),
        (env.FORCE_BACKEND, "fa4"),
        (env.CUDA_ARCHS, "ampere"),
        (env.CACHE_LIMIT, "much"),
        (env.LOGLEVEL, "loud"),
        (env.CXX, 'g++ "-I/include'),
        (env.CACHE_DIR, "~nosuch/x"),
        (env.PREBUILT_DIR, "~nosuch/x"),
        (env.TUNED_TILES, "~nosuch/x"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_wrong_value_is_an_error_that_says_what_is_allowed(
    variable: env.Variable[object], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable.name, text)
    with pytest.raises(ValueError) as error:
        variable.get()
    assert str(error.value).startswith(f"{variable.name}={text!r}: expected ")
    assert variable.kind in str(error.value)


def test_cache_dir_prefers_its_own_variable_then_xdg_then_home(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(env.DISK_CACHE.name, raising=False)
    monkeypatch.delenv(env.CACHE_DIR.name, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert env.cache_dir() == Path("/home/someone/.cache/flash_attn_interface")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert env.cache_dir() == Path("/home/someone/.cache/flash_attn_interface")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert env.cache_dir() == Path("/xdg/flash_attn_interface")
    monkeypatch.setenv(env.CACHE_DIR.name, "~/kernels")
    assert env.cache_dir() == Path("/home/someone/kernels")
    monkeypatch.setenv(env.DISK_CACHE.name, "0")
    assert env.cache_dir() is None


def test_no_home_means_no_disk_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in (env.CACHE_DIR.name, env.DISK_CACHE.name, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert env.cache_dir() is None


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("FLASH_ATTN_INTERFACE_CACHEDIR", "; did you mean FLASH_ATTN_INTERFACE_CACHE_DIR?"),
        ("FLASH_ATTN_CACHE_DIR", "; did you mean FLASH_ATTN_INTERFACE_CACHE_DIR?"),
        ("FLASH_ATTENTION_INTERFACE_CACHE_DIR", "; did you mean FLASH_ATTN_INTERFACE_CACHE_DIR?"),
        ("FLASH_ATTN_CUDA_ARCH", "; did you mean FLASH_ATTN_CUDA_ARCHS?"),
        ("flash_attn_interface_loglevel", "; did you mean FLASH_ATTN_INTERFACE_LOGLEVEL?"),
        ("FLASH_ATTN_SOMETHING_ELSE_AGAIN", ""),
        ("FLASH_ATTENTION_FORCE_BUILD", None),  # of FlashAttention's own build
        ("FLASH_ATTENTION_DISABLE_FP8", None),
        ("XFLASH_ATTN", None),
    ],
)
def test_misspelt_variables_are_pointed_out(
    name: str, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = env.misspelt()
    monkeypatch.setenv(name, "1")
    assert env.misspelt() == sorted(
        [*before, *([f"{name} is not read{told}"] if told is not None else [])]
    )


def test_variables_of_the_table_are_not_misspelt(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in env.VARIABLES:
        monkeypatch.setenv(variable.name, "1")
    assert not {line.split()[0] for line in env.misspelt()} & {v.name for v in env.VARIABLES}
