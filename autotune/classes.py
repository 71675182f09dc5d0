"""Convolutions by class: how the generated kernels stand beside PyTorch's, class by class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from tritonconv.runtime.device import DeviceFacts
from tritonconv.runtime.operators import Field, Problem
from tritonconv.runtime.tables import Entry

from .analysis import geomean, p50
from .roofline import arithmetic_of, ceilings
from .search import Status

DIRECTIONS = ("forward", "dgrad", "wgrad")
CLASSES = (
    "first layers, 2-D",
    "first layers, 3-D",
    "patches",
    "transposed, 2×2/2",
    "depthwise",
    "grouped",
    "1-D",
    "3-D k×k×k",
    "3-D 1×1×1",
    "strided",
    "k×k",
    "k×k, small maps",
    "1×1",
    "1×1, small maps",
    "1×1, one pixel",
)
"""Every convolution is of one of these."""

ATEN = "aten"
_FEW_CHANNELS = 4
_SMALL_MAP = 14 * 14


def class_of(operator: str, problem: Mapping[str, Field]) -> str | None:
    """The class of a convolution product; None for another operator or a fused product.

    A transposed convolution is the input gradient of a strided one, so the two share a class: one
    entry serves both.

    Args:
        operator: ``conv2d.forward`` and its like.
        problem: the fields of its entry.

    Example:
        >>> fields = {"kind": "depthwise", "kernel": "3x3", "stride": "1x1"}
        >>> class_of("conv2d.wgrad", fields)
        'depthwise'
    """
    family, _, direction = operator.partition(".")
    plain = problem.get("epilogue", "none") == "none"
    if not family.startswith("conv") or direction not in DIRECTIONS or not plain:
        return None
    kernel, stride = _sizes(problem["kernel"]), _sizes(problem["stride"])
    row = problem.get("height") == 1 and kernel[0] == 1 and problem.get("width") != 1
    if len(kernel) == 1 or (len(kernel) == 2 and row):  # one axis runs as a map of height one
        return "1-D"
    if problem["kind"] != "dense":
        return str(problem["kind"])
    volume = len(kernel) == 3
    unpadded = not any(_sizes(problem["padding"]))
    if kernel == stride and max(kernel) >= 4 and unpadded:
        return "patches"
    if max(kernel) > 1 and cast(int, problem["in_channels"]) <= _FEW_CHANNELS:
        return "first layers, 3-D" if volume else "first layers, 2-D"
    pairs = zip(kernel, stride, strict=True)
    if max(stride) > 1 and all(taps in (hop, 2 * hop) for taps, hop in pairs):
        return "transposed, 2×2/2"
    if max(stride) > 1:
        return "strided"
    if volume:
        return "3-D 1×1×1" if max(kernel) == 1 else "3-D k×k×k"
    name = "1×1" if max(kernel) == 1 else "k×k"
    pixels = cast(int, problem["out_height"]) * cast(int, problem["out_width"])
    if name == "1×1" and pixels == 1:
        return "1×1, one pixel"
    return f"{name}, small maps" if pixels <= _SMALL_MAP else name


def _sizes(value: Field) -> tuple[int, ...]:
    return tuple(int(part) for part in str(value).split("x"))


@dataclass(frozen=True)
class Rivals:
    """Times of one problem, µs.

    Attributes:
        generated: of the fastest generated kernel.
        aten: of PyTorch's kernel: same memory format, fixed order of sums, no benchmark mode.
        dispatched: of what a tuned call runs.
    """

    generated: float
    aten: float
    dispatched: float


def is_compact(entry: Entry) -> bool:
    """Whether losing trials were left out, as a bundle does: PyTorch's kernel may be among them.

    What such entries still hold of it are the cases it won or tied, so a mean of them is biased.
    """
    return set(entry.recorded) <= {"created"}


def rivals(entry: Entry) -> Rivals | None:
    """Times to compare; None where one of the two was not timed."""
    if entry.best.timing is None:
        return None
    generated, aten = _least(entry, rival=False), _least(entry, rival=True)
    if generated is None or aten is None:
        return None
    return Rivals(generated, aten, p50(entry.best))


def _least(entry: Entry, *, rival: bool) -> float | None:
    """Least time among finalists; among those of the first round where no finalist is one."""
    for status in (Status.OK, Status.TIMED):
        found = [
            trial.timing.p50
            for trial in entry.trials
            if (trial.algorithm == ATEN) is rival
            and trial.status == status
            and trial.timing is not None
        ]
        if found:
            return min(found)
    return None


@dataclass(frozen=True)
class ClassRow:
    """One class and product.

    Attributes:
        name: of the class.
        direction: the product.
        problems: how many are compared.
        generated: geometric mean of PyTorch's time over that of the fastest generated kernel.
        dispatched: the same over what a tuned call runs.
    """

    name: str
    direction: str
    problems: int
    generated: float
    dispatched: float


@dataclass(frozen=True)
class ClassSummary:
    """Classes that occur, in order, and how many entries no comparison was possible for."""

    rows: tuple[ClassRow, ...]
    compared: int
    left_out: int


def summarize_classes(entries: Sequence[Entry]) -> ClassSummary:
    """Speed-ups over PyTorch's kernel by class and product.

    Args:
        entries: with all their trials. Fused products, and problems that PyTorch's kernel or ours
            were not timed for, are left out.
    """
    groups: dict[tuple[str, str], list[Rivals]] = {}
    for entry in entries:
        name, times = class_of(entry.operator, entry.problem), rivals(entry)
        if name is not None and times is not None:
            groups.setdefault((name, entry.operator.rpartition(".")[2]), []).append(times)
    rows = []
    for name in CLASSES:
        for direction in DIRECTIONS:
            times_of = groups.get((name, direction), [])
            generated = geomean(t.aten / t.generated for t in times_of)
            dispatched = geomean(t.aten / t.dispatched for t in times_of)
            if generated is not None and dispatched is not None:
                rows.append(ClassRow(name, direction, len(times_of), generated, dispatched))
    compared = sum(row.problems for row in rows)
    return ClassSummary(tuple(rows), compared, len(entries) - compared)


@dataclass(frozen=True)
class ClassPoint:
    """One problem under the roof, with the rates of both rivals.

    Attributes:
        name: of its class.
        direction: the product.
        arithmetic: which ceiling bounds it.
        intensity: floating-point operations per byte of compulsory traffic.
        generated: TFLOP/s of the fastest generated kernel.
        aten: TFLOP/s of PyTorch's kernel.
    """

    name: str
    direction: str
    arithmetic: str
    intensity: float
    generated: float
    aten: float


@dataclass(frozen=True)
class ClassRoofline:
    """Problems by class under the roofs of their device; no bandwidth without ceilings."""

    bandwidth: float | None
    rates: dict[str, float]
    measured: bool
    points: tuple[ClassPoint, ...]


def roofline_of_classes(
    entries: Sequence[Entry], device: DeviceFacts, parse: Callable[[Entry], Problem]
) -> ClassRoofline:
    """Place what :func:`summarize_classes` compares under the roof of its device.

    Args:
        entries: tuned on that device, with all their trials.
        device: whose ceilings are drawn.
        parse: the problem of an entry, which knows its work and its traffic.
    """
    points = []
    for entry in entries:
        name, times = class_of(entry.operator, entry.problem), rivals(entry)
        if name is None or times is None:
            continue
        problem = parse(entry)
        flops = problem.flops()
        points.append(
            ClassPoint(
                name,
                entry.operator.rpartition(".")[2],
                arithmetic_of(entry.problem),
                flops / problem.bytes_moved(),
                flops / times.generated / 1e6,
                flops / times.aten / 1e6,
            )
        )
    table = ceilings(device)
    if table is None:
        return ClassRoofline(None, {}, False, tuple(points))
    kinds = {point.arithmetic for point in points}
    rates = {kind: rate for kind, rate in table.rates.items() if kind in kinds}
    return ClassRoofline(table.bandwidth, rates, table.measured, tuple(points))
