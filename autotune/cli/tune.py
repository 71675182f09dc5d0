"""``autotune tune``: search, check and save."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Sequence
from typing import Annotated

import torch
import typer

from tritonconv.runtime import missed as missed_problems
from tritonconv.runtime.device import DeviceFacts, device_facts
from tritonconv.runtime.environment import environment
from tritonconv.runtime.errors import TritonConvError, bad_value
from tritonconv.runtime.lookup import Tier
from tritonconv.runtime.operators import Operator, Problem, get_operator
from tritonconv.runtime.tables import tuned_table

from ..compiling import COMPILE_SECONDS
from ..distributed import tune_sharded, under_torchrun
from ..gpus import parse_gpus, tune_on_gpus
from ..harvest import harvest_named
from ..isolated import RUN_SECONDS
from ..laboratory import Setup, laboratory, require_gpu
from ..measure import Policy
from ..report import Progress, TuningInterrupted, TuningStoppedError
from ..search import Effort, StrategyName
from ..suites import parse_shape
from ..tune import Check, Options, Report, Result, tune_pairs, unique_pairs
from .common import (
    BatchOption,
    CacheDirOption,
    ChannelsOption,
    DtypeOption,
    ExitCode,
    JsonOption,
    LayoutOption,
    ModelArgsOption,
    ModelOption,
    NoColorOption,
    OperatorsArgument,
    Output,
    PrecisionOption,
    QuietOption,
    SeveralShapesOption,
    SizeOption,
    TargetOption,
    VerboseOption,
    expand_operators,
    facts_or_nominal,
    pairs_of,
    parse_size,
    setup,
)
from .progress import progress_on
from .reports import show_dry_run, show_reports

Pair = tuple[Operator, Problem]


class RankLostError(TritonConvError):
    """A rank of the job could not finish its share; the message says which and why."""


def tune(
    operators: OperatorsArgument = None,
    shapes: SeveralShapesOption = None,
    model: ModelOption = None,
    missed: Annotated[
        bool,
        typer.Option("--missed", help="Tune what your own programs ran untuned on this GPU."),
    ] = False,
    missing: Annotated[
        bool,
        typer.Option("--missing", help="Leave out what some table has for this very GPU."),
    ] = False,
    model_args: ModelArgsOption = None,
    batch: BatchOption = 8,
    size: SizeOption = "224",
    channels: ChannelsOption = None,
    dtype: DtypeOption = None,
    layout: LayoutOption = None,
    precision: PrecisionOption = None,
    effort: Annotated[
        Effort, typer.Option("--effort", help="How much of each space to try.")
    ] = Effort.QUICK,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Time for everything: 60s, 10m, 2h.")
    ] = None,
    max_configs: Annotated[
        int | None, typer.Option("--max-configs", min=1, help="Most candidates per problem.")
    ] = None,
    strategy: Annotated[
        StrategyName, typer.Option("--strategy", help="How a large space is searched.")
    ] = StrategyName.AUTO,
    policy: Annotated[
        Policy, typer.Option("--policy", help="How candidates are timed.")
    ] = Policy.GRAPH_COLD,
    check: Annotated[
        Check, typer.Option("--check", help="Which candidates are compared with float64.")
    ] = Check.FINALISTS,
    seed: Annotated[int, typer.Option("--seed", help="Of the search order and the tensors.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Time again what is stored.")] = False,
    gpus: Annotated[
        str | None,
        typer.Option("--gpus", help="Tune on several GPUs of this host: all, or 0,1."),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", min=0, help="Compiling processes; 0 compiles where candidates run."),
    ] = None,
    in_process: Annotated[
        bool,
        typer.Option("--in-process", help="Run candidates in this process: no protection."),
    ] = False,
    compile_timeout: Annotated[
        float, typer.Option("--compile-timeout", min=1, help="Seconds to compile a candidate.")
    ] = COMPILE_SECONDS,
    run_timeout: Annotated[
        float, typer.Option("--run-timeout", min=0.1, help="Seconds to run a candidate.")
    ] = RUN_SECONDS,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 7 when the budget ended a search early.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the spaces; measure nothing, need no GPU.")
    ] = False,
    target: TargetOption = "sm_90",
    json_: JsonOption = False,
    cache_dir: CacheDirOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
    no_color: NoColorOption = False,
) -> None:
    """Find the fastest kernel for problems, check it, and save it for every later call.

    Interrupted tuning keeps what is finished, and goes on from there when started again.
    """
    out = setup(as_json=json_, cache_dir=cache_dir, quiet=quiet, verbose=verbose, no_color=no_color)
    seconds = None if budget is None else parse_duration(budget)
    options = Options(effort, strategy, max_configs, policy, check, seed, force)
    named = [name for name, given in _sources(shapes, model, missed) if given]
    if len(named) != 1:
        raise bad_value("tune", "one of --shapes, --model, --missed", ", ".join(named) or "none")
    if precision and not shapes:
        raise bad_value("--precision", "with --shapes", "without")
    if missing and missed:
        raise bad_value(
            "--missing", "--shapes or --model", "--missed, which names untuned problems"
        )
    if missing and under_torchrun():
        raise bad_value("--missing", "one process", "torchrun, whose ranks may have other tables")
    if not dry_run:
        require_gpu()
    if shapes:
        pairs = [
            pair
            for one in shapes
            for pair in pairs_of(operators, one, dtypes=dtype, layouts=layout, precisions=precision)
        ]
    elif model is not None:
        pairs = model_pairs(
            model, model_args, operators, batch, parse_size(size), channels, dtype, layout
        )
    else:
        pairs = _missed_pairs(operators, facts_or_nominal(target)[0])
    pairs = unique_pairs(pairs)
    if missing:
        asked, pairs = len(pairs), untuned(pairs, facts_or_nominal(target)[0])
        out.say(f"{asked - len(pairs)} of {asked} problems are tuned already")
    if dry_run:
        show_dry_run(out, pairs, facts_or_nominal(target)[0], options)
        return
    if not pairs:
        why = "nothing is missing" if missing else "no problem has run untuned on this GPU"
        out.result({"asked": 0, "reports": []}, why)
        return
    setting = Setup(jobs, not in_process, compile_timeout, run_timeout)
    devices = None if gpus is None else parse_gpus(gpus)
    reports: Sequence[Report] = ()
    stopped: BaseException | None = None
    began = time.monotonic()
    try:
        with progress_on(out.err, out.verbosity) as progress:
            reports = _run(pairs, seconds, options, setting, devices, progress, out)
    except (TuningInterrupted, TuningStoppedError) as error:
        reports, stopped = error.reports, error
    # One rank speaks for all, or JSON would be interleaved.
    if not under_torchrun() or os.environ["RANK"] == "0":
        show_reports(out, reports, stopped, len(pairs), time.monotonic() - began)
    if missed:
        done = [r for r in reports if r.result in (Result.TUNED, Result.KEPT)]
        served = [(get_operator(report.operator), report.problem) for report in done]
        missed_problems.clear(environment(device_facts()), served)
    if isinstance(stopped, TuningInterrupted):
        raise typer.Exit(ExitCode.INTERRUPTED)
    if stopped is not None:
        out.say(f"error: {stopped}")
        raise typer.Exit(ExitCode.UNEXPECTED)
    if any(report.result is Result.FAILED for report in reports):
        raise typer.Exit(ExitCode.NOTHING_PASSED)
    if strict and any(not report.complete for report in reports):
        raise typer.Exit(ExitCode.PARTIAL)


def _sources(
    shapes: Sequence[str] | None, model: str | None, missed: bool
) -> tuple[tuple[str, bool], ...]:
    return ("--shapes", bool(shapes)), ("--model", model is not None), ("--missed", missed)


def _run(
    pairs: Sequence[Pair],
    seconds: float | None,
    options: Options,
    setting: Setup,
    devices: Sequence[int] | None,
    progress: Progress,
    out: Output,
) -> Sequence[Report]:
    """Tune on this GPU, on several of this host, or as one rank of a torchrun job."""
    if under_torchrun():
        sharded = tune_sharded(
            pairs, budget_s=seconds, options=options, progress=progress, setup=setting
        )
        out.say(f"one table on all ranks: {sharded.fingerprint}")
        if sharded.lost:
            lost = [f"rank {rank} did not finish: {text}" for rank, text in sharded.lost.items()]
            raise TuningStoppedError(sharded.reports, RankLostError("; ".join(lost)))
        return sharded.reports
    if devices is not None:
        return tune_on_gpus(
            pairs, devices, budget_s=seconds, options=options, progress=progress, setup=setting
        )
    with laboratory(setup=setting) as (lab, compiler):
        return tune_pairs(
            pairs,
            budget_s=seconds,
            options=options,
            progress=progress,
            lab=lab,
            compiler=compiler,
        )


def untuned(pairs: Iterable[Pair], facts: DeviceFacts) -> list[Pair]:
    """The problems that no table has an entry of, for this device and these versions."""
    table = tuned_table(facts)
    return [
        (operator, problem)
        for operator, problem in pairs
        if table.lookup(operator, problem).tier is not Tier.EXACT
    ]


def _missed_pairs(operators: Sequence[str] | None, facts: DeviceFacts) -> list[Pair]:
    """What programs ran untuned on this GPU."""
    wanted = expand_operators(operators)
    pairs = missed_problems.load(environment(facts))
    return [pair for pair in pairs if not wanted or pair[0].name in wanted]


def parse_duration(text: str) -> float:
    """Seconds from ``90``, ``60s``, ``10m`` or ``2h``.

    Raises:
        ArgumentValueError: another form, or not positive.

    Example:
        >>> parse_duration("1.5m")
        90.0
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([smh]?)", text.strip())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if seconds <= 0:
        raise bad_value("duration", "a positive time such as 60s, 10m or 2h", repr(text))
    return seconds


def model_pairs(
    name: str,
    arguments: str | None,
    operators: Sequence[str] | None,
    batch: int,
    size: Sequence[int],
    channels: int | None,
    dtypes: Sequence[str] | None,
    layouts: Sequence[str] | None,
    *,
    by_kernel: bool = False,
) -> list[Pair]:
    """Problems of one training step of a model, on the GPU where there is one."""
    wanted = expand_operators(operators)
    pairs = harvest_named(
        name,
        parse_shape(arguments) if arguments else None,
        batch=batch,
        size=size,
        channels=channels,
        dtypes=dtypes or ("bfloat16",),
        layouts=layouts or ("channels_last",),
        device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu",
        by_kernel=by_kernel,
    )
    return [pair for pair in pairs if not wanted or pair[0].name in wanted]
