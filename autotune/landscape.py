"""The landscape of timings around the winners: parameters, contenders, shapes and the roof."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tritonconv.runtime.device import DeviceFacts
from tritonconv.runtime.operators import Field, Problem
from tritonconv.runtime.tables import Entry

from .analysis import geomean, label, p50
from .roofline import arithmetic_of, ceilings
from .search import Status

# Parameter marginals


@dataclass(frozen=True)
class Marginal:
    """How fast a problem gets with one parameter held fixed, the others free.

    Attributes:
        parameter: ``algorithm.parameter``.
        values: of the parameter, in order.
        best: least time with that value over the least time of the algorithm, 1 or more.
        typical: the same for the median time with that value.
        counts: timed configs with that value.
    """

    parameter: str
    values: tuple[int, ...]
    best: tuple[float, ...]
    typical: tuple[float, ...]
    counts: tuple[int, ...]


def marginals(entry: Entry, algorithm: str | None = None) -> tuple[Marginal, ...]:
    """Marginals of every parameter with more than one timed value.

    Args:
        entry: with its trials.
        algorithm: only of this one; of the winner's when None.
    """
    algorithm = algorithm or entry.best.algorithm
    timed = [t for t in entry.trials if t.algorithm == algorithm and t.timing is not None]
    if not timed:
        return ()
    least = min(p50(trial) for trial in timed)
    found = []
    for name in timed[0].config:
        groups: dict[int, list[float]] = {}
        for trial in timed:
            groups.setdefault(trial.config[name], []).append(p50(trial) / least)
        if len(groups) > 1:
            values = tuple(sorted(groups))
            found.append(
                Marginal(
                    f"{algorithm}.{name}",
                    values,
                    tuple(min(groups[v]) for v in values),
                    tuple(statistics.median(groups[v]) for v in values),
                    tuple(len(groups[v]) for v in values),
                )
            )
    return tuple(found)


# Speed-ups


@dataclass(frozen=True)
class HeatMap:
    """A matrix of ratios; None where there is nothing to compare."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


DEFAULT = "default"


def over_contenders(entries: Sequence[Entry]) -> HeatMap:
    """Problem × contender: how many times faster the winner is.

    Contenders are the default and every algorithm at its fastest config. An algorithm that was
    not among the finalists of a problem enters with its timing of the first round.
    """
    names = list(dict.fromkeys(t.algorithm for e in entries for t in e.trials if t.timing))
    columns = (DEFAULT, *names)
    rows, values = [], []
    for entry in entries:
        best = p50(entry.best)
        times: dict[str, float] = {}
        for status in (Status.TIMED, Status.OK):  # what the second finds replaces the first
            found: dict[str, list[float]] = {}
            for trial in entry.trials:
                if trial.status == status and trial.timing is not None:
                    found.setdefault(trial.algorithm, []).append(trial.timing.p50)
            times |= {name: min(several) for name, several in found.items()}
        if entry.default.timing is not None:
            times[DEFAULT] = entry.default.timing.p50
        rows.append(label(entry))
        values.append(tuple(times[c] / best if c in times else None for c in columns))
    return HeatMap(tuple(rows), columns, tuple(values))


def over_fields(entries: Sequence[Entry], row: str, column: str, contender: str) -> HeatMap:
    """One field of the problems × another: geometric mean of the speed-up over a contender.

    Args:
        entries: of any problems; those without the two fields are left out.
        row: name of the field down the side.
        column: name of the field along the bottom.
        contender: ``default`` or the name of an algorithm, at its fastest config.
    """
    plain = over_contenders(entries)
    cells: dict[tuple[Field, Field], list[float]] = {}
    if contender in plain.columns:
        index = plain.columns.index(contender)
        for entry, values in zip(entries, plain.values, strict=True):
            ratio = values[index]
            if ratio is not None and row in entry.problem and column in entry.problem:
                key = entry.problem[row], entry.problem[column]
                cells.setdefault(key, []).append(ratio)
    down = sorted({key[0] for key in cells}, key=_order)
    along = sorted({key[1] for key in cells}, key=_order)
    return HeatMap(
        tuple(f"{row} {value}" for value in down),
        tuple(f"{column} {value}" for value in along),
        tuple(tuple(geomean(cells.get((r, c), ())) for c in along) for r in down),
    )


def _order(value: Field) -> tuple[bool, float, str]:
    """Numbers by size, then words."""
    number = isinstance(value, int)
    return not number, float(value) if number else 0.0, str(value)


# The roof


@dataclass(frozen=True)
class RoofPoint:
    """One timed problem under the roof.

    Attributes:
        problem: in words.
        contender: ``tuned`` or ``default``.
        arithmetic: which ceiling bounds it: ``bfloat16``, ``tf32`` and so on.
        intensity: floating-point operations per byte of compulsory traffic.
        tflops: what it reaches.
        of_roof: share of the roof at its intensity; None without ceilings.
    """

    problem: str
    contender: str
    arithmetic: str
    intensity: float
    tflops: float
    of_roof: float | None


@dataclass(frozen=True)
class Roofline:
    """Problems under the roofs of their device.

    Attributes:
        bandwidth: bytes per second; None for a device without ceilings.
        rates: floating-point operations per second of the arithmetics that occur.
        measured: the ceilings were measured on such a device; otherwise datasheet figures.
        points: of every problem its default and its winner.
    """

    bandwidth: float | None
    rates: dict[str, float]
    measured: bool
    points: tuple[RoofPoint, ...]


def roofline(
    entries: Sequence[Entry], device: DeviceFacts, parse: Callable[[Entry], Problem]
) -> Roofline:
    """Place tuned problems under the roof of their device.

    Args:
        entries: tuned on that device.
        device: whose ceilings are drawn.
        parse: the problem of an entry, which knows its work and its traffic.
    """
    table = ceilings(device)
    points = []
    for entry in entries:
        problem = parse(entry)
        kind = arithmetic_of(problem.fields())
        flops, moved = problem.flops(), problem.bytes_moved()
        roof = None
        if table is not None and kind in table.rates:
            roof = min(table.rates[kind], flops / moved * table.bandwidth)
        for contender, trial in (("default", entry.default), ("tuned", entry.best)):
            if trial.timing is not None:
                rate = flops / (trial.timing.p50 * 1e-6)
                share = None if roof is None else rate / roof
                points.append(
                    RoofPoint(label(entry), contender, kind, flops / moved, rate / 1e12, share)
                )
    kinds = {point.arithmetic for point in points}
    if table is None:
        return Roofline(None, {}, False, tuple(points))
    rates = {kind: rate for kind, rate in table.rates.items() if kind in kinds}
    return Roofline(table.bandwidth, rates, table.measured, tuple(points))
