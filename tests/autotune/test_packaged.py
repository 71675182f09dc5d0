"""The tables that are packaged with the library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

import tritonconv  # registers the operators  # noqa: F401
from tritonconv.autotune.bundle import file_name, outdated, stale
from tritonconv.autotune.verify import rebuild
from tritonconv.runtime.entries import Entry, load_bundle
from tritonconv.runtime.environment import Environment
from tritonconv.runtime.freshness import changes
from tritonconv.runtime.operators import operator_names
from tritonconv.runtime.tables import packaged_directory

FOLDER = packaged_directory()
assert FOLDER is not None
BUNDLES = sorted(FOLDER.glob("*.json"))


def test_the_folder_holds_nothing_but_bundles() -> None:
    assert FOLDER is not None
    names = {path.name for path in FOLDER.iterdir()}
    assert names - {"__init__.py", "__pycache__"} == {path.name for path in BUNDLES}


@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: path.stem)
def test_a_packaged_table_loads_and_is_valid(path: Path) -> None:
    bundle = load_bundle(path)
    assert path.name == file_name(Environment.from_dict(bundle.environment))
    assert bundle.entries
    seen = set()
    for entry in bundle.entries:
        where = f"{path.name}: {entry.operator} {dict(entry.problem)}"
        assert entry.operator in operator_names(), where
        assert entry.problem_key() not in seen, f"{where} is there twice"
        seen.add(entry.problem_key())
        assert entry.best.timing is not None and entry.best.status == "ok", where
        assert not isinstance(rebuild(entry), str) or entry in stale(bundle), where
    assert path.read_text() == bundle.to_text(), f"{path.name} was edited by hand"


@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: path.stem)
def test_packaged_entries_serve(path: Path) -> None:
    """A change of a kernel leaves entries behind that serve nothing: tune and export them again.

    Those to which only another algorithm has changed go on serving, and are listed.
    """
    bundle = load_bundle(path)
    for (name, since), count in _counted(outdated(bundle)).items():
        print(f"{path.name}: {count} entries of {name} are outdated ({since})")
    lines = [
        f"{count} entries of {name} are stale ({since})"
        for (name, since), count in _counted(stale(bundle)).items()
    ]
    assert not lines, f"{path.name}, tune and export again: " + "; ".join(lines)


def _counted(entries: Iterable[Entry]) -> Counter[tuple[str, str]]:
    """Entries by operator and what has changed since."""
    return Counter((entry.operator, str(changes(entry))) for entry in entries)
