"""``autotune show``: what serves a problem, and the stored entry behind it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from tritonconv.runtime.freshness import Changes, changes, is_unfinished
from tritonconv.runtime.operators import Problem, get_operator
from tritonconv.runtime.tables import Entry, Found, Tier, Trial, environment, tuned_table

from ..roofline import floor_us
from ..search import Status
from ..space import describe
from ..suites import parse_shape
from .common import (
    CacheDirOption,
    JsonOption,
    NoColorOption,
    Output,
    QuietOption,
    TargetOption,
    VerboseOption,
    facts_or_nominal,
    number,
    problem_json,
    setup,
    table,
)


def show(
    operator: Annotated[str, typer.Argument(metavar="OP", help="Such as conv2d.forward.")],
    shape: Annotated[str, typer.Argument(metavar="SHAPE", help='"N=8,C=64,M=64,H=56,K=3,P=1"')],
    all_configs: Annotated[
        bool, typer.Option("--all-configs", help="Also candidates that were no finalists.")
    ] = False,
    target: TargetOption = "sm_90",
    json_: JsonOption = False,
    cache_dir: CacheDirOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
    no_color: NoColorOption = False,
) -> None:
    """Show which kernel a call would run and why, and the timings behind it."""
    out = setup(as_json=json_, cache_dir=cache_dir, quiet=quiet, verbose=verbose, no_color=no_color)
    op = get_operator(operator)
    problem = op.parse(parse_shape(shape))
    facts, real = facts_or_nominal(target)
    served = tuned_table(facts)
    found = served.find(op, problem)
    choice = found.choice
    located = next(served.exact(op, problem), None)
    entry = None if located is None else located.entry
    floor = floor_us(problem, facts)
    if not real:
        out.say(f"no GPU: as it would be on {facts.name} with the versions installed here")
    head = Table.grid(padding=(0, 2))
    head.add_row("problem", str(problem))
    head.add_row("runs", describe(choice.algorithm, choice.config.as_dict()))
    source = f" ({choice.source})" if choice.source else ""
    head.add_row("because", because(found, problem) + source)
    head.add_row("floor", number(floor, 2, " µs"))
    since = Changes() if entry is None else changes(entry, op)
    if since.outdated:
        head.add_row("outdated", f"{since}: `autotune tune` times that")
    if entry is not None and is_unfinished(entry):
        head.add_row("unfinished", "not all was tried: `autotune tune` goes on with it")
    payload = {
        **problem_json(op.name, problem),
        "device": facts.as_dict(),
        "environment_hash": environment(facts).hash,
        "choice": {
            "algorithm": choice.algorithm,
            "config": choice.config.as_dict(),
            "tier": str(choice.tier),
            "source": choice.source,
        },
        "floor_us": floor,
        "entry": None if entry is None else entry.to_json(),
        "outdated": [*since.changed, *since.added],
        "path": None if located is None else str(located.path),
    }
    if entry is None:
        out.result(payload, head)
    else:
        for name, value in entry.recorded.items():
            if not isinstance(value, dict):
                head.add_row(name, str(value))
        head.add_row("policy", entry.policy)
        out.result(payload, head, _trials(out, entry, all_configs))


TIERS = {
    Tier.EXACT: "this very problem is tuned",
    Tier.BUCKET: "a problem of the same size class is tuned",
    Tier.NEAREST: "the nearest tuned problem",
    Tier.FAMILY: "a problem like it is tuned for the same architecture, elsewhere",
    Tier.DEFAULT: "nothing like it is tuned: the default",
}


def because(found: Found, problem: Problem) -> str:
    """Why a lookup chose what it did."""
    if found.stale is None:
        return TIERS[found.choice.tier]
    entry = found.stale.entry
    exact = dict(entry.problem) == dict(problem.fields())
    which = "this very problem" if exact else "the nearest problem"
    changed = f"{entry.best.algorithm} has changed since"
    return f"{which} is tuned, but {changed} (stale): the default"


def _trials(out: Output, entry: Entry, everything: bool) -> Table:
    shown = table("", "algorithm", "config", "p50 µs>", "p20>", "p80>", "n>", "error>", "status")
    tied = set(entry.tied)
    ranked = sorted(
        enumerate(entry.trials),
        key=lambda item: (item[1].timing is None, item[1].timing.p50 if item[1].timing else 0.0),
    )
    for index, trial in ranked:
        if not everything and trial.status == Status.TIMED and trial != entry.default:
            continue
        shown.add_row(*_row(index, trial, entry, tied))
    return shown


def _row(index: int, trial: Trial, entry: Entry, tied: set[int]) -> tuple[str, ...]:
    mark = "best" if trial == entry.best else "tied" if index in tied else ""
    if trial == entry.default:
        mark = f"{mark} default".strip()
    timing = trial.timing
    return (
        mark,
        trial.algorithm,
        " ".join(f"{name}={value}" for name, value in trial.config.items()),
        number(timing.p50 if timing else None),
        number(timing.p20 if timing else None),
        number(timing.p80 if timing else None),
        str(timing.count) if timing else "-",
        "-" if trial.max_error is None else f"{trial.max_error:.1e}",
        f"{trial.status}: {trial.reason}" if trial.reason else trial.status,
    )
