"""Tables that a team shares: who can read them, and what a reader is told."""

from __future__ import annotations

import os
import stat
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from autotune_entries import DEVICE, ENV, winner
from autotune_fakes import Scale, ScaleProblem

from tritonconv.autotune.bundle import export, write
from tritonconv.autotune.store import Store
from tritonconv.runtime import entries, tables
from tritonconv.runtime.files import replace_text
from tritonconv.runtime.settings import settings
from tritonconv.runtime.tables import tuned_table

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="modes of POSIX")


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_entries_bundles_and_their_folders_follow_the_umask(tmp_path: Path, umask: int) -> None:
    root = tmp_path / "team" / "tuned"
    Store(root).save(ENV, winner(1))
    write(export(Store(root), ENV, keep_stale=True), tmp_path / "out" / "mine.json")
    made = [p for top in ("team", "out") for p in (tmp_path / top, *(tmp_path / top).rglob("*"))]
    assert len(made) >= 9
    for path in made:
        assert mode(path) == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_writing_never_changes_the_umask_of_other_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("of the whole process"))
    writers = [
        threading.Thread(target=replace_text, args=(tmp_path / "a.json", str(n))) for n in range(8)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def tier(size: int = 64) -> str:
    return str(tuned_table(DEVICE).lookup(Scale(), ScaleProblem(size)).tier)


def heard() -> list[str]:
    """Warnings of two lookups, the second after reading everything again."""
    entries.warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            tables.invalidate()
            assert tier() == "default"
    return [str(warning.message) for warning in caught]


def test_a_listing_that_is_refused_is_a_miss_and_one_warning(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    team = tmp_path / "team"
    Store(team).save(ENV, winner(1))
    listdir = os.listdir

    def refuse(path: Path) -> list[str]:
        if team in Path(path).parents:
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    with settings.override(cache_path=(team,)):
        assert tier() == "exact"
        monkeypatch.setattr(os, "listdir", refuse)
        (text,) = heard()
    assert "Permission denied" in text and str(team) in text


@pytest.mark.parametrize("name", ["nowhere", "nowhere.json"])
def test_a_shared_table_that_does_not_exist_is_one_warning(
    cache: Path, tmp_path: Path, name: str
) -> None:
    assert heard() == []  # the user's table need not exist
    with settings.override(cache_path=(tmp_path / name,)):
        (text,) = heard()
    assert "TRITONCONV_CACHE_PATH" in text and name in text


def test_a_shared_table_without_entries_of_an_operator_is_silent(
    cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "team").mkdir()
    with settings.override(cache_path=(tmp_path / "team",)):
        assert heard() == []
