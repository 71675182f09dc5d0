"""``autotune compile``: what programs will run, compiled in parallel before they run."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import triton
import typer

from tritonconv.runtime.aot import TARGETS
from tritonconv.runtime.errors import bad_value

from ..compiling import COMPILE_SECONDS
from ..precompiling import (
    Precompilation,
    Precompiled,
    PrecompileInterrupted,
    State,
    facts_of,
    precompile_pairs,
)
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
    VerboseOption,
    number,
    pairs_of,
    parse_size,
    problem_json,
    setup,
    table,
)
from .tune import model_pairs


def compile_(
    operators: OperatorsArgument = None,
    shapes: SeveralShapesOption = None,
    suite: Annotated[
        str | None, typer.Option("--suite", help="A packaged suite: another name for --shapes.")
    ] = None,
    model: ModelOption = None,
    model_args: ModelArgsOption = None,
    batch: BatchOption = 8,
    size: SizeOption = "224",
    channels: ChannelsOption = None,
    dtype: DtypeOption = None,
    layout: LayoutOption = None,
    precision: PrecisionOption = None,
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="Compiling processes.")] = None,
    compile_timeout: Annotated[
        float, typer.Option("--compile-timeout", min=1, help="Seconds to compile a problem.")
    ] = COMPILE_SECONDS,
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch", help=f"Compile for another GPU than this one: {', '.join(TARGETS)}."
        ),
    ] = None,
    json_: JsonOption = False,
    cache_dir: CacheDirOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
    no_color: NoColorOption = False,
) -> None:
    """Compile what calls will run, in parallel, so that a program's first step need not.

    The kernels land in Triton's disk cache. Nothing is measured or tuned. Interrupted, it keeps
    what is compiled, and goes on from there when started again.
    """
    out = setup(as_json=json_, cache_dir=cache_dir, quiet=quiet, verbose=verbose, no_color=no_color)
    wanted = [*(shapes or ()), *([suite] if suite is not None else [])]
    named = [name for name, given in (("--shapes", wanted), ("--model", model)) if given]
    if len(named) != 1:
        raise bad_value("compile", "one of --shapes, --suite, --model", ", ".join(named) or "none")
    if precision and not wanted:
        raise bad_value("--precision", "with --shapes", "without")
    facts = facts_of(torch.device("cuda"), arch)
    if model is None:
        pairs = [
            pair
            for one in wanted
            for pair in pairs_of(operators, one, dtypes=dtype, layouts=layout, precisions=precision)
        ]
    else:
        out.say(f"{model}: one training step on PyTorch's kernels, to see its problems")
        pairs = model_pairs(
            model,
            model_args,
            operators,
            batch,
            parse_size(size),
            channels,
            dtype,
            layout,
            by_kernel=True,
        )
    pairs = list(dict.fromkeys(pairs))
    if arch is not None:
        out.say(
            f"for the {facts.name} that {arch} stands for: it finds these kernels in a copy of "
            "this cache where torch, Triton, tritonconv and the tuned tables are the same"
        )
    done = 0

    def told(row: Precompiled) -> None:
        nonlocal done
        done += 1
        out.say(f"[{done}/{len(pairs)}] {row}")

    interrupted = False
    try:
        report = precompile_pairs(pairs, facts, jobs=jobs, timeout=compile_timeout, progress=told)
    except PrecompileInterrupted as stopped:
        report, interrupted = stopped.report, True
    _show(out, report, arch, interrupted)
    if interrupted:
        raise typer.Exit(ExitCode.INTERRUPTED)
    if report.failed:
        raise typer.Exit(ExitCode.NOTHING_PASSED)


def _show(out: Output, report: Precompilation, arch: str | None, interrupted: bool) -> None:
    """A row for every problem, and how many came out how."""
    shown = table("problem", "tier", "kernel", "kernels are", "s>", "reason")
    for row in report.rows:
        seconds = row.seconds if row.state is State.COMPILED else None
        choice = row.choice
        shown.add_row(
            str(row.problem),
            str(choice.tier),
            choice.algorithm,
            str(row.state),
            number(seconds, 1),
            row.reason,
        )
    payload = {
        "device": report.device.as_dict(),
        "nominal": arch is not None,
        "cache": triton.knobs.cache.dir,
        "interrupted": interrupted,
        "asked": report.asked,
        "compiled": len(report.compiled),
        "present": len(report.present),
        "pytorch": len(report.pytorch),
        "failed": len(report.failed),
        "seconds": round(report.seconds, 2),
        "results": [_row_json(row) for row in report.rows],
    }
    out.result(payload, shown, f"{report}; in {triton.knobs.cache.dir}")


def _row_json(row: Precompiled) -> dict[str, Any]:
    return {
        **problem_json(row.operator, row.problem),
        "algorithm": row.choice.algorithm,
        "config": row.choice.config.as_dict(),
        "tier": str(row.choice.tier),
        "state": str(row.state),
        "seconds": round(row.seconds, 3),
        "reason": row.reason,
    }
