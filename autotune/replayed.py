"""Search strategies played back on recorded tables, in the form that plots take."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from typing import Any

from tritonconv.runtime.tables import Entry

from .analysis import SearchRun


def search_runs(entries: Sequence[Entry]) -> tuple[SearchRun, ...]:
    """Every strategy on every recorded problem."""
    replay: Any = importlib.import_module(f"{__package__}.replay")
    return tuple(
        SearchRun(
            str(curve.strategy),
            f"{curve.operator} {json.dumps(dict(curve.problem), sort_keys=True)}",
            curve.optimum_us,
            tuple((point.seconds, point.best_us) for point in curve.points),
        )
        for curve in replay.compare_strategies(entries)
    )
