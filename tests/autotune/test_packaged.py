"""The tables that are packaged with the library."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

import tritonconv  # registers the operators  # noqa: F401
from tritonconv.autotune.bundle import file_name, stale
from tritonconv.autotune.verify import rebuild
from tritonconv.runtime.entries import load_bundle
from tritonconv.runtime.environment import Environment
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
def test_stale_packaged_entries_are_listed(path: Path) -> None:
    """A change of a kernel may leave tables behind; that is said here and mended on a GPU."""
    bundle = load_bundle(path)
    counts: dict[str, int] = {}
    for entry in stale(bundle):
        counts[entry.operator] = counts.get(entry.operator, 0) + 1
    for name, count in counts.items():
        total = sum(entry.operator == name for entry in bundle.entries)
        warnings.warn(
            f"{path.name}: {count} of {total} entries of {name} are stale: tune and export again",
            stacklevel=1,
        )
