"""``autotune verify``: check stored winners numerically again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tritonconv.runtime.entries import Entry
from tritonconv.runtime.freshness import is_stale
from tritonconv.runtime.operators import operator_names
from tritonconv.runtime.tables import environment, newest, tuned_table

from ..bundle import load_tables
from ..measure import CudaLab
from ..space import describe
from ..verify import Standing, Verified
from ..verify import quick as one_per_kernel
from ..verify import verify as verify_entries
from .common import (
    CacheDirOption,
    ExitCode,
    JsonOption,
    NoColorOption,
    OpOption,
    QuietOption,
    VerboseOption,
    expand_operators,
    fields_text,
    setup,
    table,
)


def verify(
    tables: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[TABLE]...", help="Bundles; by default all that lookups read."),
    ] = None,
    op: OpOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One problem per kernel and config, the smallest.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the tensors.")] = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 7 when some were not checked.")
    ] = False,
    json_: JsonOption = False,
    cache_dir: CacheDirOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
    no_color: NoColorOption = False,
) -> None:
    """Run the winners of tuned entries and compare their results with float64."""
    out = setup(as_json=json_, cache_dir=cache_dir, quiet=quiet, verbose=verbose, no_color=no_color)
    names = set(expand_operators([op]) if op else operator_names())
    lab = CudaLab()
    env = environment(lab.facts)
    if tables:
        bundles = [bundle for path in tables for bundle in load_tables(path)]
        asked = [(b, e) for b in bundles for e in b.entries if not op or e.operator in names]
        entries = [e for b, e in asked if dict(b.environment) == env.as_dict()]
        left_out = len(asked) - len(entries)
        if left_out:
            out.say(f"{left_out} entries of other devices or versions are left out")
    else:
        entries, left_out = _served(lab.facts, names), 0
    if quick:
        entries = one_per_kernel(entries)
    count = 0

    def tell(verdict: Verified) -> None:
        nonlocal count
        count += 1
        entry = verdict.entry
        text = f"{entry.operator} {fields_text(entry.problem)}: {verdict.standing}"
        out.say(f"[{count}/{len(entries)}] {text} {verdict.reason}".rstrip())

    results = verify_entries(entries, lab, seed=seed, progress=tell)
    shown = table("", "operator", "problem", "kernel", "error>", "budget>", "why")
    for row in results:
        if row.standing is not Standing.PASSED or out.verbosity >= 1:
            shown.add_row(*_cells(row))
    counts = {str(s): sum(row.standing is s for row in results) for s in Standing}
    summary = ", ".join(f"{number} {name}" for name, number in counts.items())
    outdated = [row for row in results if row.standing is not Standing.SKIPPED and row.outdated]
    if outdated:
        summary += f"; {len(outdated)} outdated"
    for row in outdated:
        where = f"{row.entry.operator} {fields_text(row.entry.problem)}"
        out.say(f"outdated: {where} ({row.outdated}): `autotune tune` times that")
    payload = {
        "device": lab.facts.as_dict(),
        "counts": counts,
        "outdated": len(outdated),
        "left_out": left_out,
        "results": [_result_json(row) for row in results],
    }
    out.result(payload, *([shown] if shown.row_count else []), summary)
    if counts[Standing.WRONG]:
        out.say("wrong entries stay in use until they are tuned again: `autotune tune --force`")
        raise typer.Exit(ExitCode.NUMERIC)
    if not counts[Standing.PASSED]:
        out.say("nothing was checked")
        raise typer.Exit(ExitCode.NOTHING_PASSED)
    if strict and (left_out or counts[Standing.SKIPPED]):
        raise typer.Exit(ExitCode.PARTIAL)


def _served(facts: Any, names: set[str]) -> list[Entry]:
    """The entries that lookups take, and where there is only a stale one of a problem, that."""
    tuned = tuned_table(facts)
    found: list[Entry] = []
    for name in sorted(names):
        by_problem: dict[str, list[Any]] = {}
        for located in tuned.entries(name):
            by_problem.setdefault(located.entry.problem_key(), []).append(located)
        for rows in by_problem.values():
            pool = [row for row in rows if not is_stale(row.entry)] or rows
            first = newest(row for row in pool if row.source == pool[0].source)
            assert first is not None
            found.append(first.entry)
    return found


def _cells(row: Verified) -> tuple[str, ...]:
    accuracy = row.accuracy
    return (
        str(row.standing),
        row.entry.operator,
        fields_text(row.entry.problem),
        describe(row.entry.best.algorithm, row.entry.best.config),
        "-" if accuracy is None else f"{accuracy.error:.1e}",
        "-" if accuracy is None else f"{accuracy.budget:.1e}",
        row.reason,
    )


def _result_json(row: Verified) -> dict[str, Any]:
    accuracy = row.accuracy
    return {
        "operator": row.entry.operator,
        "problem": dict(row.entry.problem),
        "best": {"algorithm": row.entry.best.algorithm, "config": dict(row.entry.best.config)},
        "standing": str(row.standing),
        "reason": row.reason,
        "outdated": row.outdated,
        "error": None if accuracy is None else accuracy.error,
        "budget": None if accuracy is None else accuracy.budget,
    }
