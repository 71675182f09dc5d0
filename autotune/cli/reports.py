"""What ``autotune tune`` prints: the spaces of a dry run, the reports of a real one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tritonconv.runtime.device import DeviceFacts
from tritonconv.runtime.operators import Operator, Problem

from ..report import Options, Report, TuningInterrupted
from ..search import make_strategy
from ..space import space
from ..store import Store
from .common import Output, number, problem_json, table

Pair = tuple[Operator, Problem]


def show_dry_run(out: Output, pairs: Sequence[Pair], facts: DeviceFacts, options: Options) -> None:
    """What would be tried, and what is left out for which reason."""
    rows: list[dict[str, Any]] = []
    shown = table("problem", "space>", "planned>", "dropped>", "by algorithm")
    left_out: dict[tuple[str, str], list[int]] = {}  # configs of each problem, 0 for all of them
    examples: dict[tuple[str, str], str] = {}
    for operator, problem in pairs:
        found = space(operator, problem, facts)
        strategy = make_strategy(
            options.strategy,
            found,
            options.effort,
            max_configs=options.max_configs,
            seed=options.seed,
        )
        counts: dict[str, int] = {}
        for candidate in found.candidates:
            counts[candidate.algorithm] = counts.get(candidate.algorithm, 0) + 1
        rows.append(
            {
                **problem_json(operator.name, problem),
                "space": len(found.candidates),
                "space_hash": found.hash,
                "planned": strategy.planned,
                "first": [str(candidate) for candidate in strategy.ask()],
                "by_algorithm": counts,
                "unsupported": dict(found.unsupported),
                "dropped": [
                    {"algorithm": name, "constraint": constraint, "configs": count}
                    for (name, constraint), count in found.reasons().items()
                ],
                "default": str(found.default),
            }
        )
        shown.add_row(
            str(problem),
            str(len(found.candidates)),
            str(strategy.planned),
            str(len(found.dropped)),
            ", ".join(f"{name} {count}" for name, count in counts.items()),
        )
        for name, reason in found.unsupported.items():
            left_out.setdefault((name, reason), []).append(0)
        for (name, constraint), count in found.reasons().items():
            left_out.setdefault((name, constraint), []).append(count)
        for row in found.dropped:
            examples.setdefault((row.candidate.algorithm, row.constraint), row.reason)
    reasons = table("left out", "problems>", "configs>", "because")
    for (name, reason), configs in sorted(left_out.items()):
        total = str(sum(configs)) if any(configs) else "all"
        example = examples.get((name, reason))
        because = reason if example is None else f"{reason}, for example {example}"
        reasons.add_row(name, str(len(configs)), total, because)
    tables = [shown, reasons] if left_out else [shown]
    out.result({"device": facts.as_dict(), "dry_run": True, "problems": rows}, *tables)


def show_reports(
    out: Output,
    reports: Sequence[Report],
    stopped: BaseException | None,
    asked: int,
    wall_s: float,
) -> None:
    """The outcome of every problem."""
    shown = table(
        "problem",
        "default µs>",
        "best µs>",
        "speedup>",
        "tied>",
        "tried/space>",
        "failed",
        "best",
        "result",
    )
    for report in reports:
        entry = report.entry
        best = entry.best.timing if entry else None
        default = entry.default.timing if entry else None
        speedup = report.speedup()
        shown.add_row(
            str(report.problem),
            number(default.p50 if default else None),
            number(best.p50 if best else None),
            number(speedup, 2, "x"),
            str(len(entry.tied)) if entry else "-",
            f"{report.measured}/{report.space_size}",
            " ".join(f"{name}:{count}" for name, count in report.failures().items()) or "-",
            entry.best.algorithm if entry else "the default stays",
            str(report.result),
        )
    payload = {
        "asked": asked,
        "wall_s": round(wall_s, 2),
        "interrupted": isinstance(stopped, TuningInterrupted),
        "tables": str(Store().root),
        "reports": [report_json(report) for report in reports],
    }
    out.result(payload, shown)
    compiling = sum(
        trial.compile_s or 0.0
        for r in reports
        if r.entry and r.measured
        for trial in r.entry.trials
    )
    tried = sum(report.measured for report in reports)
    out.say(
        f"{tried} candidates of {len(reports)} problems in {wall_s:.0f} s; compiling them took "
        f"{compiling:.0f} s of processor time; tables in {Store().root}"
    )
    if any(not report.complete for report in reports):
        out.say("the budget ended some searches early; the same command goes on from here")
    for report in reports:
        for trial in report.rejected if out.verbosity >= 1 else ():
            config = " ".join(f"{name}={value}" for name, value in trial.config.items())
            out.say(f"{report.problem}: {trial.algorithm} {config}: {trial.status}: {trial.reason}")


def report_json(report: Report) -> dict[str, Any]:
    """A report in JSON output."""
    path: Path | None = report.path
    return {
        **problem_json(report.operator, report.problem),
        "result": str(report.result),
        "reason": report.reason,
        "speedup": report.speedup(),
        "space": report.space_size,
        "measured": report.measured,
        "complete": report.complete,
        "failures": dict(report.failures()),
        "rejected": [
            {
                "algorithm": trial.algorithm,
                "config": dict(trial.config),
                "status": trial.status,
                "reason": trial.reason,
            }
            for trial in report.rejected
        ],
        "wall_s": round(report.wall_s, 3),
        "path": None if path is None else str(path),
        "entry": None if report.entry is None else report.entry.to_json(),
    }
