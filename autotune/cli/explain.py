"""``autotune explain``: which tier serves a call, and on a miss how the key differs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.table import Table

from tritonconv.runtime.diagnosis import NearMiss, near_misses
from tritonconv.runtime.freshness import changes
from tritonconv.runtime.operators import get_operator
from tritonconv.runtime.tables import TUNED_TIERS, default_choice, environment, tuned_table

from ..bundle import describe_environment
from ..roofline import floor_us
from ..space import candidate_key, describe, space
from ..suites import parse_shape
from .common import (
    CacheDirOption,
    JsonOption,
    NoColorOption,
    QuietOption,
    TargetOption,
    VerboseOption,
    facts_or_nominal,
    number,
    problem_json,
    setup,
    table,
)
from .show import because


def explain(
    operator: Annotated[str, typer.Argument(metavar="OP", help="Such as conv2d.forward.")],
    shape: Annotated[str, typer.Argument(metavar="SHAPE", help='"N=8,C=64,M=64,H=56,K=3,P=1"')],
    target: TargetOption = "sm_90",
    json_: JsonOption = False,
    cache_dir: CacheDirOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
    no_color: NoColorOption = False,
) -> None:
    """Explain which table serves a call, or which fields of the key differ from its entries."""
    out = setup(as_json=json_, cache_dir=cache_dir, quiet=quiet, verbose=verbose, no_color=no_color)
    op = get_operator(operator)
    problem = op.parse(parse_shape(shape))
    facts, real = facts_or_nominal(target)
    if not real:
        out.say(f"no GPU: as it would be on {facts.name} with the versions installed here")
    tables = tuned_table(facts)
    found = tables.find(op, problem)
    choice, located = found.choice, found.located
    default = default_choice(op, problem, facts)
    nearest = near_misses(tables.environment, tables.sources, op, problem)
    candidates = space(op, problem, facts)
    is_default = (choice.algorithm, choice.config) == (default.algorithm, default.config)

    head = Table.grid(padding=(0, 2))
    head.add_row("problem", str(problem))
    head.add_row("on", describe_environment(environment(facts).as_dict()))
    head.add_row("runs", describe(choice.algorithm, choice.config.as_dict()))
    head.add_row("tier", f"{choice.tier}: {because(found, problem)}")
    head.add_row("which is", "the default" if is_default else "not the default")
    served: Mapping[str, Any] | None = None
    if located is not None:
        timing, since = located.entry.best.timing, changes(located.entry, op)
        served = {
            "source": located.source,
            "path": str(located.path),
            "problem": dict(located.entry.problem),
            "policy": located.entry.policy,
            "environment": dict(located.entry.environment),
            "p50_us": timing.p50 if timing else None,
            "outdated": [*since.changed, *since.added],
        }
        head.add_row("served by", f"{located.source}: {located.path}")
        head.add_row("its time", number(timing.p50 if timing else None, 2, " µs"))
        if since.outdated:
            head.add_row("outdated", f"{since}: `autotune tune` times that")
    predicted = candidates.predicted.get(candidate_key(choice.algorithm, choice.config.as_dict()))
    head.add_row("model expects", number(predicted, 2, " µs"))
    head.add_row("floor", number(floor_us(problem, facts), 2, " µs"))

    shown = table("table", "the nearest entry differs in", "wanted", "found")
    for miss in nearest:
        for row, difference in enumerate(miss.differences):
            stale = difference.stale_algorithm
            name = f"the source of {stale} (stale)" if stale else difference.field
            cells = (name, str(difference.wanted), str(difference.found))
            shown.add_row("" if row else miss.source, *cells)
        if not miss.differences:
            shown.add_row(miss.source, "nothing: it is exact", "", "")
    for name in _empty(tables, nearest):
        shown.add_row(name, f"there is no entry of {op.name}", "", "")
    left_out = table("left out", "configs>", "because")
    for name, reason in candidates.unsupported.items():
        left_out.add_row(name, "all", reason)
    reasons = {(row.candidate.algorithm, row.constraint): row.reason for row in candidates.dropped}
    dropped = [
        {"algorithm": name, "constraint": broken, "configs": count, "reason": reasons[name, broken]}
        for (name, broken), count in candidates.reasons().items()
    ]
    for (name, broken), count in candidates.reasons().items():
        left_out.add_row(name, str(count), f"{broken}: {reasons[name, broken]}")
    payload = {
        **problem_json(op.name, problem),
        "device": facts.as_dict(),
        "environment": environment(facts).as_dict(),
        "environment_hash": environment(facts).hash,
        "choice": {
            "algorithm": choice.algorithm,
            "config": choice.config.as_dict(),
            "tier": str(choice.tier),
            "source": choice.source,
        },
        "is_miss": choice.tier not in TUNED_TIERS,
        "is_default": is_default,
        "served_by": served,
        "floor_us": floor_us(problem, facts),
        "predicted_us": predicted,
        "nearest": [_near_json(miss) for miss in nearest],
        "without_entries": _empty(tables, nearest),
        "space": len(candidates.candidates),
        "unsupported": dict(candidates.unsupported),
        "dropped": dropped,
    }
    out.result(payload, head, shown, *([left_out] if left_out.row_count else []))


def _empty(tables: Any, nearest: tuple[NearMiss, ...]) -> list[str]:
    known = {miss.source for miss in nearest}
    return [source.name for source in tables.sources if source.name not in known]


def _near_json(miss: NearMiss) -> dict[str, Any]:
    return {
        "source": miss.source,
        "path": str(miss.path),
        "problem": dict(miss.entry.problem),
        "differences": [
            {"field": d.field, "wanted": d.wanted, "found": d.found} for d in miss.differences
        ],
    }
