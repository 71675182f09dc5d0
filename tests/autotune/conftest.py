from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from autotune_fakes import Scale

from tritonconv.autotune import tune
from tritonconv.runtime import operators, tables
from tritonconv.runtime.settings import settings


@pytest.fixture(autouse=True)
def cache(tmp_path: Path) -> Iterator[Path]:
    """An empty cache directory for every test."""
    with settings.override(cache_dir=tmp_path / "cache", cache_path=(), autotune="lookup"):
        tables.invalidate()
        tune._attempted.clear()
        yield tmp_path / "cache"
    tables.invalidate()


@pytest.fixture
def scale() -> Iterator[Scale]:
    """The fake operator, registered for the command line."""
    operator = Scale()
    operators.register(operator)
    yield operator
    operators._OPERATORS.pop(operator.name)
