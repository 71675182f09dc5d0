"""``autotune bench``: tuned, default and PyTorch in turns."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.table import Table

from tritonconv.runtime.device import device_facts
from tritonconv.runtime.errors import bad_value
from tritonconv.runtime.operators import Operator, Problem

from ..analysis import geomean
from ..bench import DEFAULT, GENERATED, TORCH, TORCH_ELSEWHERE, TUNED, Comparison
from ..bench import bench as run_bench
from ..host import host_times
from ..measure import CudaLab, Policy
from ..steps import CONVERTED, EAGER, OURS, StepTime, step_times
from ..suites import parse_shape
from ..tune import unique_pairs
from .common import (
    BatchOption,
    CacheDirOption,
    ChannelsOption,
    DtypeOption,
    JsonOption,
    LayoutOption,
    ModelArgsOption,
    ModelOption,
    NoColorOption,
    OperatorsArgument,
    Output,
    PrecisionOption,
    QuietOption,
    ShapesOption,
    SizeOption,
    VerboseOption,
    number,
    pairs_of,
    parse_size,
    problem_json,
    setup,
    table,
)


class Rival(enum.StrEnum):
    """Whom ``--vs`` judges by."""

    TORCH = "torch"


def bench(
    operators: OperatorsArgument = None,
    shapes: ShapesOption = None,
    dtype: DtypeOption = None,
    layout: LayoutOption = None,
    precision: PrecisionOption = None,
    policy: Annotated[
        Policy, typer.Option("--policy", help="How calls are timed.")
    ] = Policy.GRAPH_COLD,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Turns of each contender.")] = 20,
    seed: Annotated[int, typer.Option("--seed", help="Of the tensors.")] = 0,
    suite: Annotated[
        str | None, typer.Option("--suite", help="A packaged suite: another name for --shapes.")
    ] = None,
    vs: Annotated[
        Rival | None,
        typer.Option(
            "--vs", help="torch: judge the best generated kernel by PyTorch in both layouts."
        ),
    ] = None,
    model: ModelOption = None,
    model_args: ModelArgsOption = None,
    batch: BatchOption = 8,
    size: SizeOption = "224",
    channels: ChannelsOption = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="With --model: also under torch.compile.")
    ] = False,
    graph: Annotated[
        bool,
        typer.Option("--graph", help="With --model: whole steps as CUDA graphs, without the host."),
    ] = False,
    one_thread: Annotated[
        bool,
        typer.Option("--one-thread", help="With --model: no thread of autograd's own."),
    ] = False,
    batch_norm: Annotated[
        bool, typer.Option("--batch-norm", help="With --model: convert batch norms too.")
    ] = False,
    layer_norm: Annotated[
        bool, typer.Option("--layer-norm", help="With --model: convert layer norms too.")
    ] = False,
    convert_graph: Annotated[
        bool,
        typer.Option(
            "--convert-graph",
            help="With --model: ours with nn.convert(cuda_graph=True), PyTorch eager.",
        ),
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", min=0, help="With --model: compiling processes; 0: the first step compiles."
        ),
    ] = None,
    host: Annotated[
        bool, typer.Option("--host", help="Host time of eager calls instead of device time.")
    ] = False,
    json_: JsonOption = False,
    cache_dir: CacheDirOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
    no_color: NoColorOption = False,
) -> None:
    """Time what a call runs now against the untuned default and PyTorch's own kernel.

    With --model: training steps of a whole network, before and after tritonconv.nn.convert.
    """
    out = setup(as_json=json_, cache_dir=cache_dir, quiet=quiet, verbose=verbose, no_color=no_color)
    sources = {"--shapes": shapes, "--suite": suite, "--model": model}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        raise bad_value("bench", f"one of {', '.join(sources)}", ", ".join(given) or "nothing")
    with_model = {
        "--compile": compiled,
        "--graph": graph,
        "--one-thread": one_thread,
        "--batch-norm": batch_norm,
        "--layer-norm": layer_norm,
        "--convert-graph": convert_graph,
        "--jobs": jobs is not None,
    }
    for name, asked in with_model.items():
        if asked and model is None:
            raise bad_value(name, "with --model", "without")
    if model is not None:
        idle = {
            "--vs": vs is not None,
            "--host": host,
            "--precision": bool(precision),
            "operators": bool(operators),
        }
        for name, asked in idle.items():
            if asked:
                raise bad_value(name, "without --model", "with it")
        arguments = parse_shape(model_args) if model_args else None
        options = _step_options(batch, size, channels, dtype, layout)
        options |= {"compiled": compiled, "graph": graph, "one_thread": one_thread}
        options |= {"batch_norm": batch_norm, "layer_norm": layer_norm}
        options |= {"convert_graph": convert_graph, "jobs": jobs}
        times = step_times(model, arguments, **options, progress=out.say)
        _steps(out, model, times, one_thread=one_thread)
        return
    wanted = str(shapes or suite)
    lab = CudaLab()
    pairs = unique_pairs(
        pairs_of(operators, wanted, dtypes=dtype, layouts=layout, precisions=precision)
    )
    if host:
        _host(out, pairs, lab)
        return
    results: list[Comparison] = []

    def collect(comparison: Comparison) -> None:
        results.append(comparison)
        timing = comparison.timing(TUNED)
        text = "does not run" if timing is None else f"{timing.p50:.1f} µs"
        out.say(f"[{len(results)}/{len(pairs)}] {comparison.problem}: {text}")

    interrupted = False
    try:
        run_bench(
            pairs,
            policy=policy,
            turns=rounds,
            seed=seed,
            lab=lab,
            everywhere=vs is not None,
            progress=collect,
        )
    except KeyboardInterrupt:
        interrupted = True
    shown = _versus_torch(results) if vs else _versus_default(results)
    ratios = {
        "vs_default": [r.versus(DEFAULT) for r in results],
        "vs_torch": [r.versus(TORCH) for r in results],
    }
    if vs:
        ratios["tuned_vs_best_torch"] = [r.versus_torch() for r in results]
        ratios["generated_vs_best_torch"] = [r.versus_torch(GENERATED) for r in results]
    means = {
        name: geomean(ratio for ratio in values if ratio is not None)
        for name, values in ratios.items()
    }
    if vs:
        summary = _summary(results, means)
    else:
        summary = (
            f"geometric mean over {len(results)}: {number(means['vs_default'], 3, 'x')} the "
            f"default, {number(means['vs_torch'], 3, 'x')} PyTorch"
        )
    payload = {
        "device": lab.facts.as_dict(),
        "policy": str(policy),
        "interrupted": interrupted,
        "results": [comparison_json(result) for result in results],
        "geomean": means,
    }
    out.result(payload, shown, summary)
    if interrupted:
        raise typer.Exit(130)


def _host(out: Output, pairs: Sequence[tuple[Operator, Problem]], lab: CudaLab) -> None:
    """One ladder of host times per problem."""
    rows = []
    for operator, problem in pairs:
        shown = table("call", "µs on the host>", title=str(problem))
        times = host_times(
            operator.name,
            problem,
            lab.device,
            progress=lambda taken: out.say(f"{taken.call}: {taken.microseconds:.1f} µs"),
        )
        for taken in times:
            shown.add_row(taken.call, number(taken.microseconds, 1))
        rows.append((problem_json(operator.name, problem), times, shown))
    payload = {
        "device": lab.facts.as_dict(),
        "results": [
            {**described, "host_us": {taken.call: taken.microseconds for taken in times}}
            for described, times, _ in rows
        ],
    }
    out.result(payload, *(shown for _, _, shown in rows))


def _step_options(
    batch: int,
    size: str,
    channels: int | None,
    dtypes: Sequence[str] | None,
    layouts: Sequence[str] | None,
) -> dict[str, Any]:
    """How a network is run: one dtype and one memory format."""
    for name, values in (("--dtype", dtypes), ("--layout", layouts)):
        if values is not None and len(values) > 1:
            raise bad_value(name, "one value with --model", ", ".join(values))
    return {
        "batch": batch,
        "size": parse_size(size),
        "channels": channels,
        "dtype": dtypes[0] if dtypes else "bfloat16",
        "layout": layouts[0] if layouts else "channels_last",
    }


def _steps(out: Output, name: str, times: Sequence[StepTime], *, one_thread: bool) -> None:
    """Training steps of a model, each contender beside the first that is of its kind."""
    base = {row.contender: row.timing.p50 for row in times if row.timing is not None}
    shown = table(
        "training step",
        "ms>",
        "p20>",
        "p80>",
        "host ms>",
        "vs PyTorch>",
        "first step s>",
        "note",
        title=f"{name}, one thread" if one_thread else name,
    )
    rows = []
    for row in times:
        rival = base.get(row.contender.replace(OURS, EAGER).removesuffix(CONVERTED))
        ratio = rival / row.timing.p50 if rival is not None and row.timing is not None else None
        note = row.reason or (f"{row.converted} layers converted" if row.converted else "")
        timing = row.timing
        shown.add_row(
            row.contender,
            number(timing.p50 if timing else None),
            number(timing.p20 if timing else None),
            number(timing.p80 if timing else None),
            number(row.host_ms),
            number(ratio, 2, "x"),
            number(row.first_s),
            note,
        )
        rows.append(
            {
                "contender": row.contender,
                "ms": timing.p50 if timing else None,
                "p20_ms": timing.p20 if timing else None,
                "p80_ms": timing.p80 if timing else None,
                "host_ms": row.host_ms,
                "steps": timing.count if timing else 0,
                "vs_torch": ratio,
                "first_s": row.first_s,
                "converted": row.converted,
                "reason": row.reason,
            }
        )
    payload = {"device": device_facts().as_dict(), "model": name, "one_thread": one_thread}
    out.result({**payload, "results": rows}, shown)


def _summary(results: Sequence[Comparison], means: dict[str, float | None]) -> str:
    """Geometric means against PyTorch at its best, and in how many rows it is reached."""
    ours = [ratio for r in results if (ratio := r.versus_torch(GENERATED)) is not None]
    reached = sum(ratio >= 1.0 for ratio in ours)
    return (
        f"geometric mean over {len(results)}, against PyTorch's faster layout: generated kernels "
        f"{number(means['generated_vs_best_torch'], 3, 'x')} ({reached} of {len(ours)} at 1.0 or "
        f"more), the tuned library {number(means['tuned_vs_best_torch'], 3, 'x')}"
    )


def _versus_default(results: Sequence[Comparison]) -> Table:
    """What a call runs now beside the untuned default and PyTorch."""
    shown = table(
        "problem",
        "tier",
        "kernel",
        "p50 µs>",
        "p20>",
        "p80>",
        "default µs>",
        "torch µs>",
        "floor µs>",
        "of floor>",
        "vs default>",
        "vs torch>",
    )
    for result in results:
        shown.add_row(*_cells(result))
    return shown


def _versus_torch(results: Sequence[Comparison]) -> Table:
    """The best generated kernel beside PyTorch in both memory formats."""
    shown = table(
        "problem",
        "generated by",
        "p50 µs>",
        "of floor>",
        "torch µs>",
        "other layout>",
        "generated / torch>",
        "tuned / torch>",
    )
    for result in results:
        ours = next((row for row in result.measured if row.contender == GENERATED), None)
        times = {name: result.timing(name) for name in (GENERATED, TORCH, TORCH_ELSEWHERE)}
        share = result.of_floor(GENERATED)
        shown.add_row(
            str(result.problem),
            ours.candidate.algorithm if ours else "-",
            number(t.p50 if (t := times[GENERATED]) else None),
            number(None if share is None else 100 * share, 0, "%"),
            number(t.p50 if (t := times[TORCH]) else None),
            number(t.p50 if (t := times[TORCH_ELSEWHERE]) else None),
            number(result.versus_torch(GENERATED), 2, "x"),
            number(result.versus_torch(), 2, "x"),
        )
    return shown


def _cells(result: Comparison) -> tuple[str, ...]:
    timing = result.timing(TUNED)
    default, torch_ = result.timing(DEFAULT), result.timing(TORCH)
    share = result.of_floor()
    return (
        str(result.problem),
        str(result.tier),
        result.measured[0].candidate.algorithm,
        number(timing.p50 if timing else None),
        number(timing.p20 if timing else None),
        number(timing.p80 if timing else None),
        number(default.p50 if default else None),
        number(torch_.p50 if torch_ else None),
        number(result.floor_us),
        number(None if share is None else 100 * share, 0, "%"),
        number(result.versus(DEFAULT), 2, "x"),
        number(result.versus(TORCH), 2, "x"),
    )


def comparison_json(result: Comparison) -> dict[str, Any]:
    """A comparison in JSON output."""
    rows: dict[str, Any] = {}
    for row in result.measured:
        timing = row.timing
        rows[row.contender] = {
            "algorithm": row.candidate.algorithm,
            "config": row.candidate.config.as_dict(),
            "p50_us": timing.p50 if timing else None,
            "p20_us": timing.p20 if timing else None,
            "p80_us": timing.p80 if timing else None,
            "count": timing.count if timing else 0,
            "note": row.reason,
        }
    return {
        **problem_json(result.operator, result.problem),
        "tier": str(result.tier),
        "floor_us": result.floor_us,
        "of_floor": result.of_floor(),
        "vs_default": result.versus(DEFAULT),
        "vs_torch": result.versus(TORCH),
        "generated_vs_best_torch": result.versus_torch(GENERATED),
        "contenders": rows,
    }
