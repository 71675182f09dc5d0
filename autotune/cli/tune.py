"""``autotune tune``: search, check and save."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tritonconv.runtime.device import DeviceFacts
from tritonconv.runtime.errors import bad_value
from tritonconv.runtime.operators import Operator, Problem

from ..harvest import build_model, harvest
from ..measure import CudaLab, Policy
from ..search import Effort, StrategyName, make_strategy
from ..space import space
from ..store import Store
from ..suites import parse_shape
from ..tune import (
    Check,
    Options,
    Report,
    Result,
    TuningInterrupted,
    TuningStoppedError,
    tune_pairs,
    unique_pairs,
)
from .common import (
    CacheDirOption,
    DtypeOption,
    JsonOption,
    LayoutOption,
    NoColorOption,
    OperatorsArgument,
    Output,
    QuietOption,
    ShapesOption,
    TargetOption,
    VerboseOption,
    expand_operators,
    facts_or_nominal,
    number,
    pairs_of,
    problem_json,
    setup,
    table,
)
from .progress import progress_on

Pair = tuple[Operator, Problem]
_MODEL_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def tune(
    operators: OperatorsArgument = None,
    shapes: ShapesOption = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="module:callable whose model's problems are tuned."),
    ] = None,
    model_args: Annotated[
        str | None, typer.Option("--model-args", help='Its arguments: "num_classes=3".')
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Batch of the model's input.")] = 8,
    size: Annotated[
        str, typer.Option("--size", help="Height and width of the model's input: 224 or 160x192.")
    ] = "224",
    channels: Annotated[
        int, typer.Option("--channels", min=1, help="Channels of the model's input.")
    ] = 3,
    dtype: DtypeOption = None,
    layout: LayoutOption = None,
    effort: Annotated[
        Effort, typer.Option("--effort", help="How much of each space to try.")
    ] = Effort.QUICK,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Time for everything: 60s, 10m, 2h.")
    ] = None,
    max_configs: Annotated[
        int | None, typer.Option("--max-configs", min=1, help="Most candidates per problem.")
    ] = None,
    policy: Annotated[
        Policy, typer.Option("--policy", help="How candidates are timed.")
    ] = Policy.GRAPH_COLD,
    check: Annotated[
        Check, typer.Option("--check", help="Which candidates are compared with float64.")
    ] = Check.FINALISTS,
    seed: Annotated[int, typer.Option("--seed", help="Of the search order and the tensors.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Time again what is stored.")] = False,
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
    options = Options(effort, max_configs, policy, check, seed, force)
    if (shapes is None) == (model is None):
        raise bad_value("tune", "either --shapes or --model", "both" if shapes else "neither")
    lab = None if dry_run else CudaLab()  # before anything else: without a GPU there is no point
    if shapes is not None:
        pairs = pairs_of(operators, shapes, dtypes=dtype, layouts=layout)
    else:
        assert model is not None
        pairs = _model_pairs(
            model, model_args, operators, (batch, channels, *parse_size(size)), dtype, layout
        )
    pairs = unique_pairs(pairs)
    if dry_run:
        facts, _ = facts_or_nominal(target)
        _dry_run(out, pairs, facts, options)
        return

    reports: Sequence[Report] = ()
    stopped: BaseException | None = None
    try:
        with progress_on(out.err, out.verbosity) as progress:
            reports = tune_pairs(
                pairs, budget_s=seconds, options=options, progress=progress, lab=lab
            )
    except (TuningInterrupted, TuningStoppedError) as error:
        reports, stopped = error.reports, error
    _results(out, reports, stopped, len(pairs))
    if isinstance(stopped, TuningInterrupted):
        raise typer.Exit(130)
    if stopped is not None:
        out.say(f"error: {stopped}")
        raise typer.Exit(1)
    if any(report.result is Result.FAILED for report in reports):
        raise typer.Exit(3)


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


def parse_size(text: str) -> tuple[int, int]:
    """Height and width from ``224`` or ``160x192``.

    Raises:
        ArgumentValueError: another form.
    """
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip())
    if match is None:
        raise bad_value("size", "224 or 160x192", repr(text))
    return int(match[1]), int(match[2] or match[1])


def _model_pairs(
    name: str,
    arguments: str | None,
    operators: Sequence[str] | None,
    shape: tuple[int, ...],
    dtypes: Sequence[str] | None,
    layouts: Sequence[str] | None,
) -> list[Pair]:
    """Problems of one training step of a model, on the GPU where there is one."""
    wanted = expand_operators(operators)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = build_model(name, parse_shape(arguments) if arguments else None).to(device).train()
    pairs: list[Pair] = []
    for layout in layouts or ("channels_last",):
        if layout not in ("channels_last", "contiguous"):
            raise bad_value("layout", "channels_last | contiguous", repr(layout))
        last = layout == "channels_last"
        memory = torch.channels_last if last else torch.contiguous_format
        network.to(memory_format=memory)  # type: ignore[call-overload]
        inputs = torch.randn(shape, device=device).contiguous(memory_format=memory)
        for dtype in dtypes or ("bfloat16",):
            if dtype not in _MODEL_DTYPES:
                raise bad_value("dtype", " | ".join(_MODEL_DTYPES), repr(dtype))
            amp = None if dtype == "float32" else _MODEL_DTYPES[dtype]
            pairs += harvest(network, inputs, amp=amp)
    if not pairs:
        raise bad_value("model", f"calls of tritonconv's operators in {name}", "none")
    return [pair for pair in pairs if not wanted or pair[0].name in wanted]


def _dry_run(out: Output, pairs: Sequence[Pair], facts: DeviceFacts, options: Options) -> None:
    rows: list[dict[str, Any]] = []
    shown = table("problem", "space>", "planned>", "dropped>", "by algorithm")
    left_out: dict[tuple[str, str], list[int]] = {}  # configs of each problem, 0 for all of them
    examples: dict[tuple[str, str], str] = {}
    for operator, problem in pairs:
        found = space(operator, problem, facts)
        strategy = make_strategy(
            StrategyName.AUTO,
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


def _results(
    out: Output, reports: Sequence[Report], stopped: BaseException | None, asked: int
) -> None:
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
        "interrupted": isinstance(stopped, TuningInterrupted),
        "tables": str(Store().root),
        "reports": [report_json(report) for report in reports],
    }
    out.result(payload, shown)
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
        "planned": report.planned,
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
