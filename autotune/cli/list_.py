"""``autotune list``: operators, suites and stored entries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Annotated

import typer

from tritonconv.runtime.errors import bad_value
from tritonconv.runtime.freshness import changes, is_unfinished
from tritonconv.runtime.operators import get_operator, operator_names

from ..harvest import model_names
from ..store import Store
from ..suites import load_suite, suite_names
from .common import (
    CacheDirOption,
    JsonOption,
    NoColorOption,
    QuietOption,
    VerboseOption,
    number,
    setup,
    table,
)


def list_(
    op: Annotated[str | None, typer.Option("--op", help="Only this operator or family.")] = None,
    cached: Annotated[bool, typer.Option("--cached", help="Only stored entries.")] = False,
    models: Annotated[bool, typer.Option("--models", help="Only names for --model.")] = False,
    json_: JsonOption = False,
    cache_dir: CacheDirOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
    no_color: NoColorOption = False,
) -> None:
    """List operators with their algorithms, suites of problems, models, and tuned entries."""
    out = setup(as_json=json_, cache_dir=cache_dir, quiet=quiet, verbose=verbose, no_color=no_color)
    known = table("model", "built by", "registered by")
    for model in model_names():
        known.add_row(model.name, model.target, model.package)
    model_rows = [asdict(model) for model in model_names()]
    if models:
        out.result({"models": model_rows}, known)
        out.say("any other: module:callable, or timm:NAME where timm is installed")
        return
    everything = list(Store().entries())
    names = _named(op, [item.entry.operator for item in everything])
    operators = [
        {"name": name, "algorithms": [a.name for a in get_operator(name).algorithms]}
        for name in names
        if name in operator_names()
    ]
    suites = [
        {
            "name": suite.name,
            "description": suite.description,
            "problems": len(suite.problems),
            "operators": list(suite.operators),
            **{field: list(values) for field, values in suite.choices.items()},
        }
        for suite in map(load_suite, suite_names())
    ]
    stored = [item for item in everything if item.entry.operator in names]
    entries = []
    for item in stored:
        entry = item.entry
        best, since = entry.best.timing, changes(entry)
        entries.append(
            {
                "operator": entry.operator,
                "device": entry.environment.get("device", {}).get("name", "?"),
                "problem": dict(entry.problem),
                "best": {"algorithm": entry.best.algorithm, "config": dict(entry.best.config)},
                "p50_us": None if best is None else best.p50,
                "stale": since.stale,
                "outdated": [*since.changed, *since.added] if since.outdated else [],
                "changes": str(since),
                "unfinished": is_unfinished(entry),
                "created": entry.recorded.get("created"),
                "path": str(item.path),
            }
        )
    payload: dict[str, object] = {"entries": entries}
    rendered = []
    if not cached:
        payload = {
            "operators": operators,
            "suites": suites,
            "models": model_rows,
            **payload,
        }
        shown = table("operator", "algorithms, in the order in which ties are broken")
        for row in operators:
            shown.add_row(str(row["name"]), ", ".join(row["algorithms"]))
        listed = table("suite", "problems>", "description", "operators")
        for suite in map(load_suite, suite_names()):
            listed.add_row(
                suite.name, str(len(suite.problems)), suite.description, ", ".join(suite.operators)
            )
        rendered += [shown, listed, known]
    kept = table("operator", "device", "problem", "best", "µs>", "source")
    for row, item in zip(entries, stored, strict=True):
        entry = item.entry
        kept.add_row(
            entry.operator,
            str(row["device"]),
            " ".join(f"{name}={value}" for name, value in entry.problem.items()),
            entry.best.algorithm,
            number(entry.best.timing.p50 if entry.best.timing else None),
            _freshness(row),
        )
    if entries:
        rendered.append(kept)
    out.result(payload, *rendered)
    if not entries:
        out.say(f"no tuned entries in {Store().root}")


def _freshness(row: Mapping[str, object]) -> str:
    """``current``, ``unfinished``, or what has changed since."""
    if not row["changes"]:
        return "unfinished" if row["unfinished"] else "current"
    return f"{'stale' if row['stale'] else 'outdated'} ({row['changes']})"


def _named(op: str | None, stored: Iterable[str]) -> tuple[str, ...]:
    """Registered operators, and those of stored entries, that ``--op`` means.

    Decorated kernels are registered in the programs that have them, not here.
    """
    known = tuple(dict.fromkeys((*operator_names(), *sorted(stored))))
    if op is None:
        return known
    found = (op,) if op in known else tuple(n for n in known if n.startswith(f"{op}."))
    if not found:
        raise bad_value("operator", " | ".join(known), repr(op))
    return found
