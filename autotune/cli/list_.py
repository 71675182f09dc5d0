"""``autotune list``: operators, suites and stored entries."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

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
    expand_operators,
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
    names = expand_operators([op]) if op else operator_names()
    operators = [
        {"name": name, "algorithms": [a.name for a in get_operator(name).algorithms]}
        for name in names
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
    stored = [s for s in Store().entries() if not op or s.entry.operator in names]
    sources = {name: get_operator(name).source_hash() for name in operator_names()}
    entries = []
    for item in stored:
        entry = item.entry
        best = entry.best.timing
        entries.append(
            {
                "operator": entry.operator,
                "device": entry.environment.get("device", {}).get("name", "?"),
                "problem": dict(entry.problem),
                "best": {"algorithm": entry.best.algorithm, "config": dict(entry.best.config)},
                "p50_us": None if best is None else best.p50,
                "stale": sources.get(entry.operator) != entry.source_hash,
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
        for name in names:
            shown.add_row(name, ", ".join(a.name for a in get_operator(name).algorithms))
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
            "stale" if row["stale"] else "current",
        )
    if entries:
        rendered.append(kept)
    out.result(payload, *rendered)
    if not entries:
        out.say(f"no tuned entries in {Store().root}")
