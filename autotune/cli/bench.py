"""``autotune bench``: tuned, default and PyTorch in turns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from tritonconv.runtime.errors import bad_value
from tritonconv.runtime.operators import Operator, Problem

from ..bench import DEFAULT, TORCH, TUNED, Comparison
from ..bench import bench as run_bench
from ..host import host_times
from ..measure import CudaLab, Policy
from ..tune import unique_pairs
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
    VerboseOption,
    number,
    pairs_of,
    problem_json,
    setup,
    table,
)


def bench(
    operators: OperatorsArgument = None,
    shapes: ShapesOption = None,
    dtype: DtypeOption = None,
    layout: LayoutOption = None,
    policy: Annotated[
        Policy, typer.Option("--policy", help="How calls are timed.")
    ] = Policy.GRAPH_COLD,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Turns of each contender.")] = 20,
    seed: Annotated[int, typer.Option("--seed", help="Of the tensors.")] = 0,
    host: Annotated[
        bool, typer.Option("--host", help="Host time of eager calls instead of device time.")
    ] = False,
    json_: JsonOption = False,
    cache_dir: CacheDirOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
    no_color: NoColorOption = False,
) -> None:
    """Time what a call runs now against the untuned default and PyTorch's own kernel."""
    out = setup(as_json=json_, cache_dir=cache_dir, quiet=quiet, verbose=verbose, no_color=no_color)
    if shapes is None:
        raise bad_value("bench", "--shapes", "nothing")
    lab = CudaLab()
    pairs = unique_pairs(pairs_of(operators, shapes, dtypes=dtype, layouts=layout))
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
        run_bench(pairs, policy=policy, turns=rounds, seed=seed, lab=lab, progress=collect)
    except KeyboardInterrupt:
        interrupted = True
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
    payload = {
        "device": lab.facts.as_dict(),
        "policy": str(policy),
        "interrupted": interrupted,
        "results": [comparison_json(result) for result in results],
        "geomean": {"vs_default": geomean(results, DEFAULT), "vs_torch": geomean(results, TORCH)},
    }
    summary = (
        f"geometric mean over {len(results)}: {number(geomean(results, DEFAULT), 3, 'x')} the "
        f"default, {number(geomean(results, TORCH), 3, 'x')} PyTorch"
    )
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


def geomean(results: Sequence[Comparison], other: str) -> float | None:
    """Geometric mean of the tuned kernel's speed over another's, where both run."""
    ratios = [ratio for r in results if (ratio := r.versus(other)) is not None]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


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
        "contenders": rows,
    }
