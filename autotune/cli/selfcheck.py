"""``autotune selfcheck``: measure the tuner itself."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tritonconv.runtime.errors import bad_value

from .. import selfcheck as checks
from ..laboratory import laboratory
from ..measure import NoDeviceError
from ..report import Options
from ..search import Effort
from ..tune import unique_pairs
from .common import (
    DtypeOption,
    JsonOption,
    LayoutOption,
    NoColorOption,
    OperatorsArgument,
    Output,
    QuietOption,
    VerboseOption,
    number,
    pairs_of,
    setup,
    table,
)
from .plot import agreement_text
from .tune import parse_duration


class Name(StrEnum):
    """What is measured."""

    STABILITY = "stability"
    LOOKUP = "lookup"
    REGRET = "regret"
    WALL = "wall"


def selfcheck(
    name: Annotated[Name, typer.Argument(help="What to measure.", show_default=False)],
    operators: OperatorsArgument = None,
    shapes: Annotated[
        str, typer.Option("--shapes", help="The problems: a suite, a JSON file, or a shape.")
    ] = "resnet50",
    dtype: DtypeOption = None,
    layout: LayoutOption = None,
    problems: Annotated[
        int | None,
        typer.Option(
            "--problems",
            min=1,
            help="At most so many, evenly spaced. Default: 20 for stability, else all.",
        ),
    ] = None,
    runs: Annotated[int, typer.Option("--runs", min=2, help="stability: fresh tunes.")] = 10,
    unseen: Annotated[
        int, typer.Option("--unseen", min=1, help="regret: problems that are never tuned.")
    ] = 40,
    arms: Annotated[
        list[str] | None,
        typer.Option("--arm", help="wall: parallel first, then serial, triton.autotune; repeat."),
    ] = None,
    effort: Annotated[
        Effort, typer.Option("--effort", help="How much of each space to try.")
    ] = Effort.QUICK,
    max_configs: Annotated[
        int | None, typer.Option("--max-configs", min=1, help="Most candidates per problem.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="stability: time of each run: 60s, 10m.")
    ] = None,
    work: Annotated[
        Path, typer.Option("--work", file_okay=False, help="Folder for tables and kernels.")
    ] = Path("tritonconv-selfcheck"),
    json_: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
    no_color: NoColorOption = False,
) -> None:
    """Measure the tuner itself; what it tunes goes to a folder of its own, not to your tables.

    stability: do fresh tunes of the same problems agree, with the tie-break and without. lookup:
    host time of our lookup and of the hit path of triton.autotune. regret: problems never tuned,
    as looked up and as tuned. wall: time to tune with parallel and with serial compilation, and
    with what triton.autotune does for the same configs.
    """
    if not torch.cuda.is_available():
        raise NoDeviceError("measuring the tuner needs a CUDA GPU, and PyTorch sees none")
    out = setup(as_json=json_, cache_dir=None, quiet=quiet, verbose=verbose, no_color=no_color)
    pairs = unique_pairs(pairs_of(operators, shapes, dtypes=dtype, layouts=layout))
    limit = problems or (20 if name is Name.STABILITY else len(pairs))
    pairs = checks.spread(pairs, limit)
    folder = work.absolute() / name
    options: dict[str, Any] = {"effort": str(effort), "max_configs": max_configs}
    if budget is not None and name is not Name.STABILITY:
        raise bad_value("--budget", f"none for {name}", budget)
    if name is Name.STABILITY:
        seconds = None if budget is None else parse_duration(budget)
        _stability(
            out,
            checks.stability(
                pairs, folder, runs=runs, options=options, budget_s=seconds, say=out.say
            ),
        )
    elif name is Name.LOOKUP:
        _lookup(out, checks.lookup_times(pairs[0]))
    elif name is Name.REGRET:
        others = checks.unseen_pairs(pairs, unseen)
        with laboratory() as (lab, compiler):
            found = checks.regret(
                pairs,
                others,
                folder,
                options=Options(effort=effort, max_configs=max_configs),
                lab=lab,
                compiler=compiler,
                say=out.say,
            )
        _regret(out, found)
    else:
        chosen = arms or (checks.PARALLEL, checks.SERIAL, checks.TRITON)
        _wall(out, checks.wall_time(pairs, folder, arms=chosen, options=options, say=out.say))


def _stability(out: Output, found: checks.Stability) -> None:
    shown = table("problem", "configs chosen>", "by the least median>", "largest / least time>")
    for row in found.agreement.rows:
        shown.add_row(
            row.problem,
            str(len(set(row.chosen))),
            str(len(set(row.fastest))),
            number(row.spread, 3),
        )
    payload = {
        "check": "stability",
        **dataclasses.asdict(found.agreement),
        "seconds": list(found.seconds),
        "folders": [str(folder) for folder in found.folders],
    }
    out.result(payload, shown, agreement_text(found.agreement))
    folders = " ".join(f"--tables {folder}" for folder in found.folders)
    out.say(f"to draw it: autotune plot agreement {folders}")


def _lookup(out: Output, found: list[Any]) -> None:
    shown = table("call", "µs on the host>")
    for taken in found:
        shown.add_row(taken.call, number(taken.microseconds, 3))
    out.result({"check": "lookup", "host_us": {t.call: t.microseconds for t in found}}, shown)


def _regret(out: Output, found: checks.UnseenSummary) -> None:
    shown = table("problem", "served by", "as looked up µs>", "as tuned µs>", "regret>")
    for row in sorted(found.rows, key=lambda row: row.ratio or 0.0, reverse=True):
        shown.add_row(
            row.problem,
            str(row.tier),
            number(row.looked_up_us),
            number(row.tuned_us),
            number(row.ratio, 3),
        )
    summary = (
        f"{len(found.rows)} problems never tuned, {found.base} tuned: geometric mean "
        f"{number(found.geomean, 3)}, worst {number(found.worst, 3)}"
    )
    rows = [{**dataclasses.asdict(row), "ratio": row.ratio} for row in found.rows]
    payload = {**dataclasses.asdict(found), "check": "regret", "rows": rows}
    out.result(payload, shown, summary)


def _wall(out: Output, found: checks.WallTime) -> None:
    shown = table("tuning", "seconds>", "configs>", "times the first>", "problems")
    ratios = found.speedups()
    for arm in found.arms:
        results = ", ".join(f"{count} {what}" for what, count in arm.done.results.items())
        shown.add_row(
            arm.name,
            number(arm.done.seconds, 1),
            str(arm.done.configs),
            number(ratios[arm.name], 2),
            results,
        )
    arms = [
        {"name": arm.name, **dataclasses.asdict(arm.done), "times_the_first": ratios[arm.name]}
        for arm in found.arms
    ]
    out.result({"check": "wall", "problems": found.problems, "arms": arms}, shown)
