"""Search strategies played back on recorded tables, in the form that plots take."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from tritonconv.runtime.tables import Entry

from .analysis import SearchRun


def search_runs(entries: Sequence[Entry]) -> tuple[SearchRun, ...]:
    """Every strategy on every recorded problem."""
    replay: Any = importlib.import_module(f"{__package__}.replay")
    return tuple(
        SearchRun(str(run.strategy), str(run.problem), float(run.optimum_us), tuple(run.points))
        for run in replay.compare_strategies(entries)
    )
