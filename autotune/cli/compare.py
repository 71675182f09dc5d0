"""``autotune compare``: two tables, problem by problem."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tritonconv.runtime.errors import bad_value

from ..bundle import describe_environment, load_tables
from ..compare import Change, Verdict
from ..compare import compare as compare_tables
from ..space import describe
from .common import (
    CacheDirOption,
    ExitCode,
    JsonOption,
    NoColorOption,
    QuietOption,
    VerboseOption,
    fields_text,
    number,
    setup,
    table,
)


class Sort(StrEnum):
    """Order of the rows."""

    PROBLEM = "problem"
    RATIO = "ratio"


def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="A bundle, or a table directory.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="What to compare with it.")],
    fail_on_regression: Annotated[
        float | None,
        typer.Option(
            "--fail-on-regression",
            metavar="PCT",
            min=0.0,
            help="Exit with 5 when a problem is slower by more than so many percent.",
        ),
    ] = None,
    only_changed: Annotated[
        bool, typer.Option("--only-changed", help="Leave out what is the SAME.")
    ] = False,
    sort: Annotated[Sort, typer.Option("--sort", help="Order of the rows.")] = Sort.PROBLEM,
    json_: JsonOption = False,
    cache_dir: CacheDirOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
    no_color: NoColorOption = False,
) -> None:
    """Compare two tables: FAST, SLOW, SAME, or AMBG where noise hides the difference."""
    out = setup(as_json=json_, cache_dir=cache_dir, quiet=quiet, verbose=verbose, no_color=no_color)
    first, second = load_tables(before), load_tables(after)
    found = compare_tables(first, second)
    if not found.changes:
        raise bad_value("compare", "tables with a problem in common", f"{before} and {after}")
    rows = list(found.changes)
    if only_changed:
        rows = [row for row in rows if row.verdict is not Verdict.SAME]
    if sort is Sort.RATIO:
        rows.sort(key=lambda row: -row.ratio)
    limit = None if fail_on_regression is None else 1 + fail_on_regression / 100
    regressed = [
        row
        for row in found.changes
        if limit is not None and row.verdict is Verdict.SLOW and row.ratio > limit
    ]

    shown = table("", "operator", "problem", "A µs>", "B µs>", "B/A>", "kernel of B")
    for row in rows:
        shown.add_row(*_cells(row))
    counts = {str(verdict): found.count(verdict) for verdict in Verdict}
    summary = ", ".join(f"{count} {name}" for name, count in counts.items())
    mean = found.geomean()
    payload = {
        "before": _side(before, first),
        "after": _side(after, second),
        "counts": counts,
        "geomean": mean,
        "only_in_before": len(found.removed),
        "only_in_after": len(found.added),
        "regressions": len(regressed),
        "changes": [_change_json(row) for row in rows],
    }
    out.result(
        payload,
        shown,
        f"{summary}; {len(found.removed)} only in A, {len(found.added)} only in B; "
        f"geometric mean B/A {number(mean, 3)}",
    )
    if regressed:
        out.say(f"{len(regressed)} problem(s) are slower by more than {fail_on_regression:g} %")
        raise typer.Exit(ExitCode.REGRESSION)


def _side(path: Path, bundles: list[Any]) -> dict[str, Any]:
    return {
        "path": str(path),
        "environments": [describe_environment(dict(bundle.environment)) for bundle in bundles],
        "entries": sum(len(bundle.entries) for bundle in bundles),
    }


def _times(row: Change) -> tuple[float | None, float | None]:
    old, new = row.before.best.timing, row.after.best.timing
    return (old.p50 if old else None), (new.p50 if new else None)


def _cells(row: Change) -> tuple[str, ...]:
    old, new = _times(row)
    kernel = describe(row.after.best.algorithm, row.after.best.config)
    return (
        str(row.verdict),
        row.after.operator,
        fields_text(row.after.problem),
        number(old),
        number(new),
        number(row.ratio, 3),
        "the same" if row.same_config else kernel,
    )


def _change_json(row: Change) -> dict[str, Any]:
    old, new = _times(row)
    return {
        "verdict": str(row.verdict),
        "operator": row.after.operator,
        "problem": dict(row.after.problem),
        "policy": row.after.policy,
        "before_us": old,
        "after_us": new,
        "ratio": row.ratio,
        "same_config": row.same_config,
        "before": {"algorithm": row.before.best.algorithm, "config": dict(row.before.best.config)},
        "after": {"algorithm": row.after.best.algorithm, "config": dict(row.after.best.config)},
    }
